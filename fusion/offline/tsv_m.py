"""`tsv-m`: singular vectors of all tasks made orthogonal to each other (Gargiulo et al. 2025, arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece
from foldd.fusion.offline.spectral import matrix_workspace, matrixwise
from foldd.fusion.tsv_m import tsv_merge


@dataclass(frozen=True)
class OfflineTsvM:
    """θ = θ⁰ + scaling · U⊥·diag(s)·V⊥ᵀ per matrix, of every task the leading ⌊min(m, n)/N⌋ singular triples.

    The rest is the mean. Which tensors are matrices the role says, where the published code asks for two dimensions:
    embeddings are averaged here, convolutions are merged as [out, in·height·width].
    """

    name: ClassVar[str] = "tsv-m"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False

    scaling: float = 1.0

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(vectors: list[Tensor]) -> Tensor:
            return tsv_merge(vectors).mul_(self.scaling)

        yield from matrixwise(models, combine, progress, vectors=True)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return matrix_workspace(sizes, count + 2, 6)
