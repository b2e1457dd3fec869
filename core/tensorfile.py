"""`.safetensors` files: read without trusting or loading them, written so that equal content is equal bytes.

On reading, the safetensors library checks the header (offsets, overlaps, total length). Tensors are then viewed through
one memory map, so that opening a file costs no memory, and what was read of it is handed back. numpy has no bfloat16,
which the library therefore cannot hand out and we widen to float32 ourselves. The library's writer puts metadata into
random order: a checkpoint packed twice would have two digests and be folded twice. So we write the header ourselves.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from foldd.core.errors import BadCheckpoint
from foldd.core.tensorwriter import Entry, lay_out

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_GLANCE_BYTES = 1024 * 1024
MAX_DIMENSIONS = 32
MAX_TENSORS = 20_000

_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file; nothing is read before it is asked for."""

    name: str
    dtype: str  # as safetensors spells it: F32, BF16, I64, …
    shape: tuple[int, ...]
    start: int  # byte of the file
    _raw: np.ndarray  # uint8 view of the map

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return Entry(self.dtype, self.shape).nbytes

    def stored(self) -> np.ndarray:
        """The values as stored (bfloat16 as its uint16 bit pattern): a view, no copy."""
        kind = np.dtype(np.uint16 if self.dtype == "BF16" else _NUMPY[self.dtype]).newbyteorder("<")
        return self._raw.view(kind).reshape(self.shape)

    def float32(self) -> np.ndarray:
        """The values as a fresh float32 array of `shape`."""
        array = np.empty(self.size, np.float32)
        self.read_into(array)
        return array.reshape(self.shape)

    def read_into(self, target: np.ndarray) -> None:
        """Writes the values as float32 into a flat array of `size` elements, and holds no more of them than a piece."""
        start = 0
        for piece in self.slices():
            target[start : start + piece.size] = piece
            start += piece.size

    def slices(self, step: int = 1 << 20) -> Iterator[np.ndarray]:
        """The values in order as flat float32 pieces of at most `step` elements; what is behind is handed back."""
        stored = self.stored().reshape(-1)
        for start in range(0, self.size, step):
            yield self.piece(start, start + step)
            hand_back(stored[start : start + step])

    def piece(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` … `stop` in order, as a fresh flat float32 array."""
        piece = self.stored().reshape(-1)[start:stop]
        if self.dtype == "BF16":
            return (piece.astype(np.uint32) << 16).view(np.float32)
        # A float64 beyond float32's range becomes inf, which verification then names.
        with np.errstate(over="ignore"):
            return piece.astype(np.float32)


@dataclass(frozen=True)
class TensorFile:
    """An open `.safetensors` file: name → tensor, and the string metadata of its header."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def hand_back(array: np.ndarray) -> None:
    """Lets the kernel have an array's pages, where it is a view of a mapped file: they are read again when needed.

    Mapped pages are nobody's memory, but they count as resident as long as they lie in a process, and a limit on a
    process' memory sees no difference.
    """
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if not isinstance(owner, mmap.mmap) or not array.nbytes or not array.flags.c_contiguous:
        return
    first = np.frombuffer(owner, np.uint8).ctypes.data
    begin = array.ctypes.data - first
    # Whole pages only, but also those that are shared with neighbours: whoever needs them gets them again.
    page = begin - begin % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, page, begin + array.nbytes - page)


def header_length(path: Path) -> int | None:
    """The length in bytes that a file's own header promises.

    None where there is no readable header (yet), or one over `MAX_GLANCE_BYTES`: this only glances at a file that may
    be hostile or half-written, from a process that must stay small; `open_tensors` judges it.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            prefix = file.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= size <= MAX_GLANCE_BYTES:
                return None
            header = json.loads(file.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except Exception:  # noqa: BLE001 - whatever a stranger wrote into it
        return None
    return 8 + size + max(ends, default=0) if all(type(end) is int for end in ends) else None


def open_tensors(path: Path, *, name: str | None = None) -> TensorFile:
    """Opens a file for reading.

    Args:
        name: what errors call the file, where that is not its path's own name.

    Raises:
        BadCheckpoint: `not-safetensors`, `truncated`, `header-too-large`, `too-many-tensors`, `unknown-dtype`.
    """
    name, size = name or path.name, path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
    if len(prefix) == 8 and prefix != b"\0" * 8:
        header = struct.unpack("<Q", prefix)[0]
        if MAX_HEADER_BYTES < header < size:
            raise BadCheckpoint(
                "header-too-large",
                f"{name}: its header is {header} bytes long, the limit is {MAX_HEADER_BYTES}.",
                remedy="Put large data into tensors, not into the metadata.",
            )
    promised = header_length(path)
    if promised is not None and size < promised:
        raise BadCheckpoint(
            "truncated",
            f"{name} is {size} bytes long, its header promises {promised}.",
            why="the copy was interrupted, or its writer is gone.",
            remedy="Drop the file again; write it elsewhere and move it in, so that it appears whole.",
        )
    try:
        with safe_open(str(path), framework="np") as opened:
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(
            "not-safetensors",
            f"{name} is not a valid .safetensors file: {error}.",
            why="another kind of file, a pickle (.pt, .bin), or a damaged copy.",
            remedy="Save the checkpoint with safetensors; foldd never unpickles anything that arrives.",
        ) from error
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    entries = {tensor: entry for tensor, entry in header.items() if tensor != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise BadCheckpoint("too-many-tensors", f"{name} holds {len(entries)} tensors, the limit is {MAX_TENSORS}.")
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    tensors = {}
    for tensor in sorted(entries, key=str.encode):
        entry = entries[tensor]
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        if dtype not in _NUMPY and dtype != "BF16":
            raise BadCheckpoint(
                "unknown-dtype",
                f"{name}: tensor {tensor!r} has type {dtype}.",
                remedy=f"Store it as one of {', '.join(sorted({*_NUMPY, 'BF16'}))}.",
            )
        shape = tuple(entry["shape"])
        # Zero-size tensors may have any other dimensions, and numpy refuses to view the largest ones.
        if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > 2**62:
            raise BadCheckpoint("bad-shape", f"{name}: tensor {tensor!r} has shape {str(list(shape))[:100]}.")
        first = 8 + length + begin
        tensors[tensor] = StoredTensor(tensor, dtype, shape, first, np.asarray(data[first : 8 + length + end]))
    return TensorFile(path, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file whose bytes depend on nothing but the content.

    Not durable by itself: call it inside `files.build_file`.
    """
    spelling = {np.dtype(kind): name for name, kind in _NUMPY.items()}
    layout = lay_out({name: Entry(spelling[a.dtype], a.shape) for name, a in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(layout.header)
        for name in layout.places:
            array = np.ascontiguousarray(tensors[name])
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
