"""`task-arithmetic`: the base and a scaled sum of all task vectors (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, elementwise, elementwise_workspace


@dataclass(frozen=True)
class OfflineTaskArithmetic:
    """θ = θ⁰ + scaling · Σ (θ_i − θ⁰)."""

    name: ClassVar[str] = "task-arithmetic"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    scaling: float = 0.3  # the published choice where nothing can be validated

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(_name: str, _start: int, vectors: list[Tensor]) -> Tensor:
            return scaled_sum(vectors, self.scaling)

        yield from elementwise(models, combine, progress, vectors=True)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return elementwise_workspace(count)


def scaled_sum(parts: list[Tensor], scaling: float) -> Tensor:
    """scaling · Σ parts, in the first one's memory."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total.mul_(scaling)
