"""`magmax`: of every element the change of largest magnitude (Marczak et al. 2024, arXiv 2407.06322)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, elementwise, elementwise_workspace


@dataclass(frozen=True)
class OfflineMagMax:
    """θ = θ⁰ + scaling · τ_k per element, where |τ_k| is the largest; of equal ones the later model's, as published.

    The published scaling is chosen on validation data; here it is 1 where nothing is said.
    """

    name: ClassVar[str] = "magmax"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    scaling: float = 1.0

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(_name: str, _start: int, vectors: list[Tensor]) -> Tensor:
            largest = vectors[0]
            for vector in vectors[1:]:
                largest = torch.where(vector.abs() >= largest.abs(), vector, largest)
            return largest.mul_(self.scaling)

        yield from elementwise(models, combine, progress, vectors=True)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return elementwise_workspace(count)
