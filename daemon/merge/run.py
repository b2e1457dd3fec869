"""`foldd merge` from start to end: preflight, the merge piece by piece, provenance."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foldd
from foldd.core.digests import sha256_file
from foldd.core.errors import BadSetup, Unavailable
from foldd.core.outputs import check_output
from foldd.core.scaled import CODES
from foldd.core.tensorwriter import Entry
from foldd.core.terminal import in_bytes
from foldd.daemon.memory import available_bytes, peak_rss_bytes
from foldd.daemon.merge.methods import make_offline
from foldd.daemon.merge.output import Output, split, write_file, write_folder
from foldd.daemon.merge.preflight import Agreement, agree
from foldd.daemon.merge.reader import FileModels
from foldd.daemon.merge.sources import Source, open_source
from foldd.fusion.method import head_of
from foldd.fusion.offline.contract import Calibration, OfflineMethod, merge
from foldd.fusion.state import as_tensor

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 5_000_000_000  # of a sharded output where nothing is said, as others write them
_PENDING = "0" * 64  # stands for a digest that is not known yet


@dataclass(frozen=True)
class Request:
    """What the user asks for; `shard_bytes` None: sharded if an input is, 0: one file."""

    paths: Sequence[Path]
    method: str
    options: Sequence[str]
    output: Path
    dtype: str = "same"
    shard_bytes: int | None = None


def run(request: Request, tell: Callable[[str], None], progress: Callable[[float], None]) -> dict[str, Any]:
    """Merges, and gives the facts of it.

    Args:
        tell: gets a sentence at a time, before the work.

    Raises:
        BadCheckpoint, BadSetup, Unavailable: before anything is written, or with everything removed that was.
    """
    started = time.monotonic()
    method = make_offline(request.method, request.options)
    sources = [open_source(path) for path in request.paths]
    base, models = separate(method, sources)
    agreement = agree(base, models)
    check_output(request.output, (path for source in sources for path in source.files))
    entries = _entries(agreement, request.dtype, base, models)
    shards = _shards(request, entries, sources)
    _check_room(method, agreement, entries, request.output)
    for note in _describe(method, base, models, agreement, entries):
        tell(note)
    if method.is_elementwise:
        torch.set_num_threads(1)  # pieces are small and memory is the limit: threads would only wait for each other
    calibration = _calibration(method, base, models)
    files = FileModels(agreement, tuple(model.is_delta for model in models), calibration)
    before = _stamps(sources)
    with ThreadPoolExecutor(1) as pool:  # digests are made beside the merge
        stopped = threading.Event()
        digests = {
            path: pool.submit(sha256_file, path, partial(_go_on, stopped))
            for source in sources
            for path in source.files
        }

        def metadata() -> dict[str, str]:
            return _provenance(request, method, base, models, digests)

        def fill(output: Output) -> None:
            for name, place in agreement.integers.items():
                output.write_raw(name, files.raw(place))
            for piece in merge(method, files, progress):
                for name in (piece.name, *agreement.copies.get(piece.name, ())):
                    output.write(name, piece.start, piece.values)
            for digest in digests.values():
                digest.result()
            if _stamps(sources) != before:
                raise Unavailable(
                    "input-changed", "An input was changed while it was merged.", remedy="Merge again when it rests."
                )

        try:
            if len(shards) > 1 or request.shard_bytes or not request.output.name.endswith(".safetensors"):
                write_folder(request.output, shards, fill, metadata)
            else:
                write_file(request.output, entries, fill, metadata)
        finally:
            files.close()
            stopped.set()
            for digest in digests.values():
                digest.cancel()
    return {
        "output": str(request.output), "method": method.name, "options": asdict(method),  # type: ignore[call-overload]
        "base": None if base is None else base.label, "models": [model.label for model in models],
        "tensors": len(entries), "parameters": sum(agreement.sizes), "bytes": sum(e.nbytes for e in entries.values()),
        "shards": len(shards), "notes": list(agreement.notes),
        "sha256": {str(path): digest.result() for path, digest in digests.items()},
        "seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes(),
    }  # fmt: skip


def separate(method: OfflineMethod, sources: Sequence[Source]) -> tuple[Source | None, list[Source]]:
    """Base and models. The first path is the base where the method needs one, where it is a foldd base, or where all
    others are differences to it.

    Raises:
        BadSetup: `no-base`, `no-models`, `base-as-model`.
    """
    first, *rest = sources
    has_base = bool(first.spec or method.needs_base or (rest and not first.is_bundle and all(s.is_delta for s in rest)))
    if method.needs_base and (first.is_bundle or not rest):
        raise BadSetup(
            "no-base",
            f"{method.name} works on differences to a base, and "
            + (f"{first.label} is a checkpoint's bundle, no base." if rest else "only one path is given."),
            remedy="Name the base first: foldd merge BASE CHECKPOINT…. Without it: --method average or lore.",
        )
    models = list(rest) if has_base else list(sources)
    if not models:
        raise BadSetup("no-models", f"{first.label} is a base, and no model is given to merge.")
    if wrong := [model.label for model in models if model.spec]:
        raise BadSetup("base-as-model", f"{wrong[0]} is a foldd base.", remedy="Name the base first, once.")
    return (first if has_base else None), models


def _calibration(method: OfflineMethod, base: Source | None, models: Sequence[Source]) -> Calibration | None:
    if not method.needs_calibration:
        return None
    plain = [model.label for model in models if "calibration/inputs" not in model.left_out]
    if base is None or base.directory is None or plain:
        raise BadSetup(
            "no-calibration",
            f"{method.name} runs the network on calibration inputs, "
            + (f"and {plain[0]} has none." if plain else f"and {base.label if base else 'no path'} is no foldd base."),
            remedy="Name a foldd state directory as BASE and pack the checkpoints with `foldd pack --calibration`. "
            "Without inputs the nearest is --method average, or ties with a base.",
        )
    from foldd.base.store import open_base  # brings the exporter's packages, which most merges can do without
    from foldd.core.bundle import open_bundle

    network = open_base(base.directory)
    bundles = [open_bundle(model.files[0], network.spec) for model in models]
    inputs = [as_tensor(bundle.inputs) for bundle in bundles if bundle.inputs is not None]
    return Calibration(network, [head_of(bundle) for bundle in bundles], inputs, [bundle.samples for bundle in bundles])


def _entries(agreement: Agreement, dtype: str, base: Source | None, models: Sequence[Source]) -> dict[str, Entry]:
    """What the output will hold. `same` is the first model's type; of differences, the base's; of codes, float32."""
    like = agreement.base if models[0].is_delta and agreement.base is not None else agreement.places[0]
    same = {name: "F32" if like[name].tensor.dtype == CODES else like[name].tensor.dtype for name in agreement.floats}
    entries = {name: Entry(DTYPES.get(dtype, same[name]), shape) for name, shape in agreement.floats.items()}
    entries |= {name: Entry(p.tensor.dtype, p.tensor.shape) for name, p in agreement.integers.items()}
    return {name: entries[name] for name in sorted(entries, key=str.encode)}


def _shards(request: Request, entries: Mapping[str, Entry], sources: Sequence[Source]) -> list[dict[str, Entry]]:
    limit = request.shard_bytes
    if limit is None and any(source.is_sharded for source in sources):
        limit = SHARD_BYTES
    shards = split(entries, limit) if limit else [dict(entries)]
    if len(shards) > 1 and request.output.name.endswith(".safetensors"):
        raise BadSetup(
            "output-is-one-file",
            f"The merged model takes {len(shards)} files, and {request.output} is the name of one.",
            remedy="Name a folder, or give --shard-bytes 0 for a single file.",
        )
    return shards


def _check_room(method: OfflineMethod, agreement: Agreement, entries: Mapping[str, Entry], output: Path) -> None:
    need, free = method.workspace(agreement.sizes, len(agreement.places)), available_bytes()
    if free and need > free:
        raise BadSetup(
            "not-enough-memory",
            f"{method.name} needs about {need / 1e9:.1f} GB of memory for these tensors, {free / 1e9:.1f} GB are free.",
            remedy="Stop something else, or take an elementwise method: average, task-arithmetic, ties, dare, magmax.",
        )
    need, free = sum(entry.nbytes for entry in entries.values()), shutil.disk_usage(output.absolute().parent).free
    if need > free:
        raise Unavailable(
            "disk-full", f"The merged model takes {need / 1e9:.2f} GB, there are {free / 1e9:.2f} for {output}.",
            remedy="Free some space, or write elsewhere with -o, or as --dtype bfloat16.",
        )  # fmt: skip


def _describe(
    method: OfflineMethod,
    base: Source | None,
    models: Sequence[Source],
    agreement: Agreement,
    entries: Mapping[str, Entry],
) -> list[str]:
    size = sum(entry.nbytes for entry in entries.values())
    need = method.workspace(agreement.sizes, len(models))
    return [
        f"base: {'none' if base is None else base.label}",
        f"models: {', '.join(model.label for model in models)}",
        f"{len(entries)} tensors, {sum(agreement.sizes):,} parameters; writes {in_bytes(size)}, "
        f"works in about {in_bytes(need)}",
        *agreement.notes,
    ]


def _go_on(stopped: threading.Event) -> None:
    """Ends a digest that nobody waits for any more."""
    if stopped.is_set():
        raise CancelledError


def _stamps(sources: Sequence[Source]) -> list[tuple[int, int]]:
    return [(s.st_size, s.st_mtime_ns) for source in sources for path in source.files for s in [os.stat(path)]]


def _provenance(
    request: Request,
    method: OfflineMethod,
    base: Source | None,
    models: Sequence[Source],
    digests: Mapping[Path, Future[str]],
) -> dict[str, str]:
    """What stands in the output's header. A digest that is not known yet has the length of one."""

    def files(source: Source) -> dict[str, str]:
        return {p.name: digests[p].result() if digests[p].done() else _PENDING for p in source.files}

    record = {
        "method": method.name, "options": asdict(method), "dtype": request.dtype,  # type: ignore[call-overload]
        "base": None if base is None else files(base), "models": [files(model) for model in models],
        "versions": {"foldd": foldd.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return {"format": "pt", "foldd.merge": json.dumps(record, sort_keys=True)}
