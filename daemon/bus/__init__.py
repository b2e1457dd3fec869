"""The bus: checkpoints come in, signed manifests and artifacts go out. ZeroMQ with CURVE; never torch."""
