"""`average`: the mean of all models (model soups, Wortsman et al. 2022, arXiv 2203.05482), no base needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, elementwise, elementwise_workspace


@dataclass(frozen=True)
class OfflineAverage:
    """θ = Σ θ_i / N."""

    name: ClassVar[str] = "average"
    needs_base: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        yield from elementwise(models, lambda _name, _start, parts: running_mean(parts), progress, vectors=False)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return elementwise_workspace(count)


def running_mean(parts: list[Tensor]) -> Tensor:
    """The mean of equally shaped tensors, in the first one's memory. Equal ones give exactly themselves."""
    mean = parts[0]
    for count, part in enumerate(parts[1:], 1):
        torch.lerp(mean, part, 1 / (count + 1), out=mean)
    return mean
