"""`ties`: trim, elect a sign, take the mean of those that agree (Yadav et al. 2023, arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import (
    PIECE,
    Models,
    Piece,
    elementwise,
    elementwise_workspace,
    require_share,
    size_of,
    spans,
    weight_names,
)

_DIGIT = 16  # bits: a magnitude is found in two steps of 2¹⁶ counters


@dataclass(frozen=True)
class OfflineTies:
    """θ = θ⁰ + scaling · τ, τ the mean over the models that agree with the sign of the sum, after trimming.

    Trimming is over the whole task vector, as published: two passes over all tensors find each model's exact bound,
    in half a megabyte a model.

    Attributes:
        density: share of all elements of a task vector, the largest, that trimming leaves; the published 20 %.
        scaling: the published λ = 1 where nothing can be validated.
    """

    name: ClassVar[str] = "ties"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    density: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        require_share(self.name, "density", self.density, low=0, high=1)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        bounds = least_kept(models, self.density, lambda share: progress(0.6 * share))

        def combine(_name: str, _start: int, vectors: list[Tensor]) -> Tensor:
            for vector, bound in zip(vectors, bounds, strict=True):
                vector.mul_(vector.abs() >= bound)
            return disjoint_mean(vectors).mul_(self.scaling)

        yield from elementwise(models, combine, progress, vectors=True, begin=0.6)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return elementwise_workspace(count) + 16 * PIECE + count * (16 << _DIGIT)


def disjoint_mean(parts: Sequence[Tensor]) -> Tensor:
    """Per element the mean of those non-zero parts that have the sign of the sum; 0 where the sum is 0. Fresh."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    sign = total.sign_()
    merged, number = torch.zeros_like(sign), torch.zeros_like(sign)
    for part in parts:
        agrees = part * sign > 0
        merged.add_(part * agrees)
        number.add_(agrees)
    return merged.div_(number.clamp_min_(1))


def least_kept(models: Models, density: float, progress: Progress) -> list[float]:
    """Of each model the smallest magnitude among the ⌊density·n⌋ largest (at least one) of its task vector.

    Magnitudes of float32 sort as their bit patterns do: the first pass counts the upper 16 bits, the second the lower
    16 of those that share the upper ones with the magnitude in question.
    """
    names = weight_names(models)
    total = sum(size_of(models, name) for name in names)
    if not total:
        return [0.0] * models.count
    places = [max(1, int(density * total))] * models.count  # counted from the largest
    uppers = [0] * models.count
    counts = np.zeros((models.count, 1 << _DIGIT), np.int64)
    done = 0
    for step in range(2):
        for name, start, stop in spans(models, names):
            base = models.base(name, start, stop)
            for model in range(models.count):
                vector = models.weights(model, name, start, stop).sub_(base)
                bits = vector.abs_().numpy().view(np.uint32)
                upper = bits >> _DIGIT
                digits = upper if step == 0 else bits[upper == uppers[model]] & ((1 << _DIGIT) - 1)
                counts[model] += np.bincount(digits, minlength=1 << _DIGIT)
            done += stop - start
            progress(done / (2 * total))
        for model in range(models.count):
            digit, places[model] = _digit_at(counts[model], places[model])
            uppers[model] = uppers[model] << _DIGIT | digit
        counts[:] = 0
    return [float(np.uint32(bits).view(np.float32)) for bits in uppers]


def _digit_at(counts: np.ndarray, place: int) -> tuple[int, int]:
    """The digit that holds the place-th largest, and the place within that digit."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, place))
    return len(counts) - 1 - index, place - (int(above[index - 1]) if index else 0)
