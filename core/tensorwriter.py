"""Writing `.safetensors` files piece by piece, when no model fits into memory or the metadata come last."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip


class Entry(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for n in self.shape:
            count *= n
        return count


class Layout(NamedTuple):
    """Where everything stands in a file: the header's bytes, length prefix included, and each tensor's place."""

    header: bytes
    places: Mapping[str, int]
    size: int


def lay_out(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Layout:
    """The one layout that a content has; wide types first, so that all are aligned."""
    names = sorted(entries, key=lambda name: (-ITEM_BYTES[entries[name].dtype], name.encode()))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset, offsets = 0, {}
    for name in names:
        entry = entries[name]
        offsets[name] = offset
        end = offset + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + offset for name, offset in offsets.items()}
    return Layout(struct.pack("<Q", len(text)) + text, places, start + offset)


class TensorWriter:
    """A file whose tensors are written in any order, in pieces.

    Not durable by itself: use it inside `files.build_file`.

    Args:
        metadata: as it will be; values may still change in `finish`, their lengths in bytes may not.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self._entries = dict(entries)
        self._layout = lay_out(entries, metadata)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self._file, self._layout.size)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes bytes of one tensor, from its byte `start` on."""
        assert start + len(data) <= self._entries[name].nbytes, name
        place = self._layout.places[name] + start
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header and closes the file."""
        layout = lay_out(self._entries, metadata)
        assert layout.places == self._layout.places, "the metadata changed their length"
        os.pwrite(self._file, layout.header, 0)
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
