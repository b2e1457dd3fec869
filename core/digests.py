"""SHA-256 of files and of sets of tensors.

A tensor digest is independent of file layout: tensors are taken in name order, and each contributes its
name in UTF-8, NUL, its type, NUL, its shape in decimal with commas, NUL, and its little-endian bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

CHUNK_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """Hex digest of a file's content, read in 1 MiB pieces; `beat` is called after each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


class TensorDigest:
    """Accumulates tensors in name order; the caller names each tensor's stored type."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: bytes | None = None

    def add(self, name: str, dtype: str, array: np.ndarray) -> None:
        """Adds one tensor.

        Raises:
            ValueError: the names do not come in ascending order of their UTF-8 bytes.
        """
        key = name.encode()
        if self._last is not None and key <= self._last:
            raise ValueError(f"tensor {name!r} is out of name order")
        self._last = key
        shape = ",".join(str(n) for n in array.shape)
        self._digest.update(key + b"\0" + dtype.encode() + b"\0" + shape.encode() + b"\0")
        # Slices keep a memory-mapped tensor out of memory; numpy converts byte order only where it must.
        flat = array.reshape(-1)
        step = max(1, CHUNK_BYTES // max(1, array.itemsize))
        for start in range(0, flat.size, step):
            piece = np.ascontiguousarray(flat[start : start + step])
            self._digest.update(piece.astype(piece.dtype.newbyteorder("<"), copy=False).tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def base_digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Digest of a base network θ⁰, as ``foldd.base`` in a bundle names it.

    Args:
        tensors: (name, array) of every floating-point tensor, statistics included, heads not, any order.
            Half precision counts as float32.
    """
    digest = TensorDigest()
    for name, array in sorted(tensors, key=lambda item: item[0].encode()):
        digest.add(name, "float32", array.astype(np.float32, copy=False))
    return digest.hexdigest()
