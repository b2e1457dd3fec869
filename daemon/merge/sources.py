"""What `foldd merge` reads: single files, sharded models, bundles, a foldd base. Headers only, torch not needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from foldd.core.base_spec import BaseSpec, read_base_spec
from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.scaled import ScaledTensor, scaled
from foldd.core.tensorfile import StoredTensor, open_tensors

MAX_INDEX_BYTES = 64 * 1024 * 1024
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are."""

    path: Path
    tensor: StoredTensor

    def bytes(self, limit: int | None = None) -> Iterator[bytes]:
        """The tensor's bytes, or the first `limit`, in pieces. Read, not mapped: mapped pages count as memory used.

        Of codes their steps come first, whatever the limit: equal codes alone are not equal weights.
        """
        if isinstance(self.tensor, ScaledTensor):
            yield self.tensor.step.tobytes()
        left = self.tensor.nbytes if limit is None else min(limit, self.tensor.nbytes)
        with self.path.open("rb") as file:
            file.seek(self.tensor.start)
            while left and (piece := file.read(min(left, 1 << 20))):
                left -= len(piece)
                yield piece


@dataclass(frozen=True)
class Source:
    """One model as files.

    Attributes:
        label: the path as it was given.
        files: all files that its tensors are in.
        tensors: name → place; of a bundle its parameters under the base's names.
        is_delta: the tensors are differences to the base.
        base_digest: of θ⁰, which a bundle names.
        left_out: tensors that are no weights: a bundle's head and calibration set.
        directory: of a foldd base; None for all else.
        spec: of a foldd base.
    """

    label: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Place]
    is_sharded: bool = False
    is_delta: bool = False
    base_digest: str | None = None
    left_out: tuple[str, ...] = ()
    directory: Path | None = None
    spec: BaseSpec | None = None

    @property
    def is_bundle(self) -> bool:
        return self.base_digest is not None


def open_source(path: Path) -> Source:
    """Opens a `.safetensors` file, an index file, a folder with either, or a foldd state directory.

    Raises:
        BadCheckpoint: what is there cannot be read; `broken-index`, or a code of core.tensorfile.
        BadSetup: `no-such-input`, `ambiguous-input`.
    """
    if path.is_dir():
        for folder in (path / "base", path):
            if (folder / "base.json").is_file():
                return _foldd_base(path, folder)
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise BadSetup(
                "ambiguous-input" if found else "no-such-input",
                f"{path} holds {len(found)} index or .safetensors files, so it is not clear which model is meant."
                if found
                else f"{path} holds no .safetensors file.",
                remedy="Name the file itself.",
            )
        return _sharded(path, found[0]) if found[0].name.endswith(INDEX) else _single(path, found[0])
    if not path.exists():
        raise BadSetup("no-such-input", f"There is no {path}.", remedy="Check the path.")
    return _sharded(path, path) if path.name.endswith(".json") else _single(path, path)


def _single(label: Path, path: Path) -> Source:
    file = open_tensors(path)
    places = {name: Place(path, tensor) for name, tensor in file.tensors.items()}
    digest = file.metadata.get("foldd.base")
    if "foldd.format" not in file.metadata or digest is None:
        return Source(str(label), (path,), places)
    kinds = sorted({name.partition("/")[0] for name in places} & {"model", "delta"})
    if len(kinds) != 1:
        raise BadCheckpoint("mixed-parameters", f"{path} must hold either model/… or delta/… tensors.")
    weights = (kinds[0] + "/", "step/")
    return Source(
        str(label),
        (path,),
        {name: Place(path, tensor) for name, tensor in scaled(file.tensors, kinds[0], str(path)).items()},
        is_delta=kinds[0] == "delta",
        base_digest=digest,
        left_out=tuple(name for name in places if not name.startswith(weights)),
    )


def _sharded(label: Path, index: Path) -> Source:
    shards = _read_index(index)
    tensors: dict[str, Place] = {}
    for shard in sorted(set(shards.values())):
        path = index.parent / shard
        if not path.is_file():
            raise BadCheckpoint(
                "broken-index", f"{index} names {shard}, which is not there.",
                why="the model was copied or downloaded in part.", remedy="Fetch the missing file.",
            )  # fmt: skip
        for name, tensor in open_tensors(path).tensors.items():
            if name in tensors:
                raise BadCheckpoint(
                    "duplicate-tensor", f"{index}: {name!r} is in {tensors[name].path.name} and again in {shard}.",
                    remedy="Remove one of the two; which is meant cannot be told.",
                )  # fmt: skip
            tensors[name] = Place(path, tensor)
    if lost := [name for name, shard in shards.items() if name not in tensors or tensors[name].path.name != shard]:
        raise BadCheckpoint(
            "broken-index", f"{index}: {lost[0]!r} is not in {shards[lost[0]]}, and {len(lost) - 1} more are misplaced."
        )
    tensors = {name: place for name, place in tensors.items() if name in shards}
    files = tuple(index.parent / shard for shard in sorted(set(shards.values())))
    return Source(str(label), files, {n: tensors[n] for n in sorted(tensors, key=str.encode)}, is_sharded=True)


def _read_index(index: Path) -> dict[str, str]:
    """An index's `weight_map`: tensor → file name, plain names in the index's own folder only."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise BadCheckpoint("broken-index", f"{index} is larger than {MAX_INDEX_BYTES} bytes.")
    try:
        shards = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadCheckpoint("broken-index", f"{index} has no weight_map that can be read: {error}.") from error
    if not isinstance(shards, dict) or not shards:
        raise BadCheckpoint("broken-index", f"{index}: its weight_map is no table, or empty.")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(
                "broken-index", f"{index}: {str(shard)[:100]!r} is no .safetensors file of its own folder.",
                why="an index may not lead out of its folder.",
            )  # fmt: skip
    return shards


def _foldd_base(label: Path, folder: Path) -> Source:
    weights = folder / "weights.safetensors"
    spec, file = read_base_spec(folder / "base.json"), open_tensors(weights)
    places = {name: Place(weights, tensor) for name, tensor in file.tensors.items()}
    return Source(str(label), (weights,), places, base_digest=None, directory=folder, spec=spec)
