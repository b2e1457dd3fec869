"""The merged model's file or files: whole under their name, or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.files import build_file, place_directory
from foldd.core.tensorwriter import ITEM_BYTES, Entry, TensorWriter
from foldd.daemon.merge.reader import FLOATS

Metadata = Callable[[], dict[str, str]]
Fill = Callable[["Output"], None]


class Output:
    """Open files that merged tensors go into."""

    def __init__(self, writers: Mapping[str, TensorWriter], entries: Mapping[str, Entry]) -> None:
        self._writers, self._entries = writers, entries

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Stores float32 elements from `start` on, as the type that the file has.

        Raises:
            BadCheckpoint: `not-finite`, `overflow`.
        """
        dtype = self._entries[name].dtype
        # One sum is cheaper than a look at every element; it is finite unless one of them is not, or all are huge.
        if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            raise BadCheckpoint(
                "not-finite", f"The merged {name} holds values that are not finite.",
                why="one of the inputs does, or a scaling is far too large.",
            )  # fmt: skip
        stored = values.to(FLOATS[dtype])
        if dtype == "F16" and not bool(stored.isfinite().all()):
            raise BadCheckpoint(
                "overflow", f"The merged {name} has values beyond the range of float16.",
                remedy="Write it as --dtype bfloat16 or float32.",
            )  # fmt: skip
        data = stored.contiguous().view(torch.uint8).numpy().data
        self._writers[name].write(name, start * ITEM_BYTES[dtype], data)

    def write_raw(self, name: str, data: bytes) -> None:
        self._writers[name].write(name, 0, memoryview(data))


def write_file(path: Path, entries: Mapping[str, Entry], fill: Fill, metadata: Metadata) -> None:
    """Writes one file; `metadata` is asked once before, for its length, and again when all is written."""

    def build(temporary: Path) -> None:
        writer = TensorWriter(temporary, entries, metadata())
        try:
            fill(Output(dict.fromkeys(entries, writer), entries))
            writer.finish(metadata())
        finally:
            writer.close()

    build_file(path, build)


def write_folder(path: Path, shards: Sequence[Mapping[str, Entry]], fill: Fill, metadata: Metadata) -> None:
    """Writes `model-00001-of-0000N.safetensors` … and their index into a new folder.

    Raises:
        BadSetup: `output-exists`.
    """
    if path.exists():
        raise BadSetup("output-exists", f"{path} exists already.", remedy="Name a folder that is not there yet.")
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    writers: list[TensorWriter] = []
    try:
        for name, entries in zip(names, shards, strict=True):
            writers.append(TensorWriter(temporary / name, entries, metadata()))
        pairs = list(zip(writers, shards, strict=True))
        every = {tensor: entry for entries in shards for tensor, entry in entries.items()}
        fill(Output({tensor: writer for writer, entries in pairs for tensor in entries}, every))
        for writer in writers:
            writer.finish(metadata())
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in every.values())},
            "weight_map": {tensor: name for name, entries in zip(names, shards, strict=True) for tensor in entries},
        }
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        temporary.chmod(0o755)
        place_directory(temporary, path)
    except BaseException:
        for writer in writers:
            writer.close()
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def split(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """Shards of at most `limit` bytes, in name order; a tensor that is larger has one of its own."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards
