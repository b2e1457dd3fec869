"""Fixing what decides a fold's bytes, before the work: method, options, seed, threads, limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from foldd.daemon.jobs import Plan
from foldd.daemon.settings import METHOD_TABLES, Fold, Settings

FAST_ITERATIONS, FAST_SECONDS = 100, 30.0
PAPER_ITERATIONS = 20_000
PACE = "pace.json"  # beside the base


def make_plan(settings: Settings, config_digest: str, seconds_per_iteration: float | None) -> dict[str, Any]:
    """The plan as the ledger keeps it. Thread counts change the order of sums, so the real number is fixed here.

    Args:
        seconds_per_iteration: of reconstruction, over all blocks, as `foldd init` measured it on this box.
    """
    fold, quantize, gate = settings.fold, settings.quantize, settings.gate
    head_options = msgspec.structs.asdict(settings.heads)
    plan = Plan(
        method=fold.method,
        options=_options(fold, fold.method),
        data_free_method=fold.data_free_method,
        data_free_options=_options(fold, fold.data_free_method),
        seed=fold.seed,
        threads=fold.threads or len(os.sched_getaffinity(0)),
        parity=gate.parity,
        conflict=gate.conflict,
        on_conflict=gate.on_conflict,
        heads=head_options.pop("mode"),
        head_options=head_options,
        format=quantize.format,
        quantizer="hdrq-paper" if quantize.effort == "paper" else "hdrq",
        iterations=iterations_for(quantize.effort, quantize.format, seconds_per_iteration),
        state=quantize.state,
        agreement=gate.agreement,
        change=gate.change,
        config_digest=config_digest,
    )
    result: dict[str, Any] = msgspec.to_builtins(plan)
    return result


def iterations_for(effort: str | float, form: str, seconds_per_iteration: float | None) -> int:
    """Iterations of reconstruction a block: seconds become a count here, and only the count is ever acted on.

    `fast` has none for weights of 8 bits: rounded to the nearest they are as good (docs/quantization.md).
    """
    if effort == "fast" and form.startswith("w8"):
        return 0
    if effort == "paper":
        return PAPER_ITERATIONS
    seconds = FAST_SECONDS if effort == "fast" else float(effort)
    if seconds_per_iteration is None:
        return FAST_ITERATIONS
    count = int(seconds / seconds_per_iteration)
    return min(count, FAST_ITERATIONS) if effort == "fast" else min(count, PAPER_ITERATIONS)


def read_pace(directory: Path) -> float | None:
    """Seconds of one iteration of reconstruction on this box; None where nothing was measured."""
    path = directory / PACE
    return float(json.loads(path.read_bytes())["seconds_per_iteration"]) if path.is_file() else None


def stored_plan(plan: dict[str, Any] | None) -> Plan:
    """A plan out of the ledger."""
    return msgspec.convert(plan, Plan)


def _options(fold: Fold, method: str) -> dict[str, Any]:
    fields = {table: name for name, table in METHOD_TABLES.items()}
    table = getattr(fold, fields.get(method, method), None)
    return {} if table is None else msgspec.structs.asdict(table)
