"""`lore`: an approximate base and low-rank task vectors, estimated together (LoRE-Merging, arXiv 2502.10749).

Two things follow from its algorithm 1. At convergence the base is the mean of θ_i − δ_i, so that base + *mean* of the
δ_i is plain averaging, whatever the ranks. And of two models the differences to the base are each other's negative in
every round: their δ_i cancel, and every selection is plain averaging. The method differs from it for three models and
more, with `sum` or `ties`.

The paper minimises Σ ‖θ0 + δ_i − θ_i‖² + μ‖δ_i‖_*², and thresholds singular values by a constant. That is the minimiser
for the penalty ‖δ_i‖_*, not for its square, for which the threshold would grow with the sum of the singular values. The
constant is what the algorithm prints, and what is done here: it minimises Σ ½‖θ0 + δ_i − θ_i‖² + μ_i‖δ_i‖_*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.fusion.matrices import RANK_TOLERANCE
from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, require_choice, require_share
from foldd.fusion.offline.spectral import matrix_workspace, matrixwise
from foldd.fusion.offline.ties import disjoint_mean

SELECTIONS = ("sum", "mean", "ties")


@dataclass(frozen=True)
class OfflineLore:
    """θ = θ0 + scaling · selection(δ_i) per matrix; the rest, which has no rank, is the mean. No base is needed.

    Attributes:
        share: μ_i is the singular value of θ_i − θ0 behind the ⌊share·min(m, n)⌋ largest ones, in the first round; it
            stays as it is, so that the rounds have one aim.
        rounds, tolerance: stop after so many, or where the δ_i change by less than this share of their norm.
        select: of the δ_i their `sum` (the paper's option 1), `mean`, or `ties`: the mean of those that agree with
            the sign of the sum (option 2; its printed formula names the result on both sides).
    """

    name: ClassVar[str] = "lore"
    needs_base: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False

    share: float = 0.2
    rounds: int = 100
    tolerance: float = 1e-6
    select: str = "sum"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        require_share(self.name, "share", self.share, low=0, high=1)
        require_choice(self.name, "select", self.select, SELECTIONS)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(matrices: list[Tensor]) -> Tensor:
            base, parts = estimate(matrices, self.share, self.rounds, self.tolerance)
            return base.add_(selection(parts, self.select), alpha=self.scaling)

        yield from matrixwise(models, combine, progress, vectors=False)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return matrix_workspace(sizes, 3 * count + 3, 4)


def estimate(
    matrices: Sequence[Tensor], share: float, rounds: int = 100, tolerance: float = 1e-6
) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1, step 1: θ0 and δ_i of matrices θ_i [m, n], by coordinate descent from δ_i = 0; float32.

    It works on differences to the mean of the θ_i, which changes nothing and keeps digits where the models are close.
    """
    mean = torch.stack([matrix.double() for matrix in matrices]).mean(0)
    centred = [(matrix - mean).float() for matrix in matrices]
    mean = mean.float()
    parts = [torch.zeros_like(matrix) for matrix in centred]
    if len(matrices) < 3:
        return mean, parts  # the δ_i cancel, see above; any selection gives the mean
    rank = int(share * min(mean.shape))
    bounds: list[float] = []
    base = torch.zeros_like(mean)
    for _ in range(rounds):
        base = torch.stack([matrix - part for matrix, part in zip(centred, parts, strict=True)]).mean(0)
        if not bounds:
            bounds = [singular_value(matrix - base, rank) for matrix in centred]
        change = size = 0.0
        for index, matrix in enumerate(centred):
            new = shrink(matrix - base, bounds[index])
            change += float(torch.linalg.vector_norm(new - parts[index], dtype=torch.float64)) ** 2
            size += float(torch.linalg.vector_norm(new, dtype=torch.float64)) ** 2
            parts[index] = new
        if change <= tolerance**2 * size:
            break
    return mean + base, parts


def selection(parts: Sequence[Tensor], select: str) -> Tensor:
    """Algorithm 1, step 2."""
    if select == "ties":
        return disjoint_mean(parts)
    total = torch.stack(list(parts)).sum(0)
    return total / len(parts) if select == "mean" else total


def singular_value(matrix: Tensor, place: int) -> float:
    """σ at `place`, counted from 0 and from the largest; 0 behind the last, or where it is rounding noise."""
    wide = matrix.double()
    if wide.shape[0] < wide.shape[1]:
        wide = wide.T
    if place >= wide.shape[1]:
        return 0.0
    squares = torch.linalg.eigvalsh(wide.T @ wide).flip(0).clamp_min(0.0)
    value = float(squares[place].sqrt())
    return value if value > RANK_TOLERANCE * float(squares[0].sqrt()) else 0.0


def shrink(matrix: Tensor, bound: float) -> Tensor:
    """Singular value thresholding: U·(S − bound)⁺·Vᵀ, the minimiser of ½‖δ − matrix‖² + bound·‖δ‖_*; same type.

    Vectors come from the smaller Gram matrix in float64, and only those above the bound are formed.
    """
    if bound == 0.0:
        return matrix.clone()
    if matrix.shape[0] < matrix.shape[1]:
        return shrink(matrix.T, bound).T.contiguous()
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    v = vectors[:, squares > (0.9 * bound) ** 2]
    u = wide @ v
    s = torch.linalg.vector_norm(u, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    shrunk: Tensor = u * ((s - bound).clamp_min(0.0) / s) @ v.T
    return shrunk.to(matrix.dtype)
