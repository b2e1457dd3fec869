"""The daemon's own identity: the configured one, or one that `foldd init` made in the state directory."""

from __future__ import annotations

from pathlib import Path

from foldd.core.signatures import Identity, new_identity, read_identity, write_identity
from foldd.daemon.config import Config
from foldd.daemon.layout import Layout

NAME = "daemon"


def identity_path(config: Config) -> Path:
    if config.settings.bus.identity:
        return config.resolve(config.settings.bus.identity)
    return Layout(config.root).keys / f"{NAME}.key"


def daemon_identity(config: Config) -> Identity:
    """Manifests are always signed, bus or not.

    Raises:
        BadSetup: `no-key`, `bad-key`, `key-readable`.
    """
    path = identity_path(config)
    if not config.settings.bus.identity and not path.exists():
        write_identity(new_identity(NAME), path.parent)
    return read_identity(path)
