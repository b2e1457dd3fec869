"""`opcm`'s projection of one matrix, by factorisation: full decomposition as published, thin one, Gram matrix."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import say
from foldd.fusion.opcm import orthogonal_part

ALPHA = 0.5
SHAPES = ((768, 768), (3072, 768), (768, 3072))  # of a transformer of width 768

Projection = Callable[[Tensor, Tensor], Tensor]


def published(merged: Tensor, vector: Tensor) -> Tensor:
    """All of u and v, in the type of the arguments (arXiv 2501.09522 and its code)."""
    u, s, vt = torch.linalg.svd(merged, full_matrices=True)
    above = s.cumsum(0) / s.sum() > ALPHA
    closed = int(above.int().argmax())
    z = u.T @ vector @ vt.T
    z.fill_diagonal_(0)
    z[:closed, :closed] = 0
    return u @ z @ vt


def thin(merged: Tensor, vector: Tensor) -> Tensor:
    """The same with a thin decomposition of the tall orientation in float64."""
    if merged.shape[0] < merged.shape[1]:
        return thin(merged.T, vector.T).T
    wide = vector.double()
    u, s, vt = torch.linalg.svd(merged.double(), full_matrices=False)
    closed = int((s.cumsum(0) / s.sum() > ALPHA).int().argmax())
    z = u.T @ wide @ vt.T
    taken = torch.diag(z.diagonal())
    taken[:closed, :closed] = z[:closed, :closed]
    return (wide - u @ taken @ vt).to(vector.dtype)


def shipped(merged: Tensor, vector: Tensor) -> Tensor:
    return orthogonal_part(merged, vector, ALPHA)


METHODS: dict[str, Projection] = {"opcm-published": published, "opcm-thin-svd": thin, "opcm": shipped}


def opcm_rows(repeats: int) -> list[dict[str, Any]]:
    """Seconds (medians, interleaved) and the largest difference from the published form in float64, relative to the
    largest element."""
    rows = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        merged, vector = (torch.randn(shape, generator=generator) for _ in range(2))
        expected = published(merged.double(), vector.double())
        scale, differences = float(expected.abs().max()), {}
        for name, project in METHODS.items():  # untimed: a library's first call sets it up
            differences[name] = float((project(merged, vector) - expected).abs().max()) / scale
        taken: dict[str, list[float]] = {name: [] for name in METHODS}
        busy: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(repeats):
            for name, project in METHODS.items():
                begun, worked = time.perf_counter(), time.process_time()
                project(merged, vector)
                taken[name].append(time.perf_counter() - begun)
                busy[name].append(time.process_time() - worked)
        for name in METHODS:
            say(f"{name} {shape[0]}×{shape[1]}: {statistics.median(busy[name]):.2f} CPU s")
            rows.append({
                "base": f"{shape[0]}x{shape[1]}", "method": name, "model_bytes": 4 * merged.numel(),
                "seconds": statistics.median(taken[name]), "seconds_low": min(taken[name]),
                "seconds_high": max(taken[name]), "cpu_seconds": statistics.median(busy[name]),
                "difference": differences[name],
            })  # fmt: skip
    return rows
