"""foldd: continual model merging for edge devices. The rooms are described in ARCHITECTURE.md."""

__version__ = "0.1.0"
