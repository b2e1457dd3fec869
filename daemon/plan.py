"""Fixing what decides a fold's bytes, before the work: method, options, seed, threads, limits."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from foldd.daemon.jobs import Plan
from foldd.daemon.settings import METHOD_TABLES, Fold, Gate, Heads, Quantize

FAST_ITERATIONS = 100
PAPER_ITERATIONS = 20_000


def make_plan(fold: Fold, heads: Heads, quantize: Quantize, gate: Gate, config_digest: str) -> dict[str, Any]:
    """The plan as the ledger keeps it. Thread counts change the order of sums, so the real number is fixed here."""
    head_options = msgspec.structs.asdict(heads)
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
        iterations=iterations_for(quantize.effort),
        state=quantize.state,
        agreement=gate.agreement,
        config_digest=config_digest,
    )
    result: dict[str, Any] = msgspec.to_builtins(plan)
    return result


def iterations_for(effort: str | float) -> int:
    """Iterations of reconstruction a block."""
    return {"fast": FAST_ITERATIONS, "paper": PAPER_ITERATIONS}[str(effort)]


def stored_plan(plan: dict[str, Any] | None) -> Plan:
    """A plan out of the ledger."""
    return msgspec.convert(plan, Plan)


def _options(fold: Fold, method: str) -> dict[str, Any]:
    fields = {table: name for name, table in METHOD_TABLES.items()}
    table = getattr(fold, fields.get(method, method), None)
    return {} if table is None else msgspec.structs.asdict(table)
