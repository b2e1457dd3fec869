"""`score`: tasks meet in one orthogonal basis, and what they do off its diagonal is pruned (arXiv 2603.05768)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, require_choice
from foldd.fusion.offline.spectral import matrix_workspace, matrixwise
from foldd.fusion.tsv_m import equal_ranks, shared_basis

THRESHOLDS = ("paper", "code", "diagonal")
_DEVIATIONS = 1.96  # of a normal distribution, 95 % lie within


@dataclass(frozen=True)
class OfflineScore:
    """θ = θ⁰ + scaling · U·(Σ prune(Uᵀ·τ_i·V))·Vᵀ per matrix; the rest is the mean.

    Attributes:
        threshold: which off-diagonal elements are kept, see `prune`. The paper's figures come from its code, which
            differs from its text.
    """

    name: ClassVar[str] = "score"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False

    threshold: str = "paper"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self.name, "threshold", self.threshold, THRESHOLDS)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(vectors: list[Tensor]) -> Tensor:
            return score_merge(vectors, self.threshold).mul_(self.scaling)

        yield from matrixwise(models, combine, progress, vectors=True)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return matrix_workspace(sizes, count + 2, 7)


def score_merge(
    vectors: Sequence[Tensor], threshold: str, ranks: Sequence[int] | None = None, tasks: int | None = None
) -> Tensor:
    """The merge of one matrix [m, n] of N tasks → [m, n], in the type of the first.

    U and V are the polar factors of the tasks' leading singular vectors, ⌊min(m, n)/N⌋ of each task, side by side.
    Every *whole* task matrix is projected into that basis, pruned there, and summed. Where N does not divide min(m, n)
    the published code leaves zero columns, which its decomposition completes as it likes, and their diagonal counts;
    here they do not exist. And μ in `prune` depends on the signs of singular vectors, which a library chooses: here
    each column of U has its largest element positive. So the result is the same on every machine.

    Args:
        ranks: of each task; equal shares where None.
        tasks: how many the "code" threshold is divided by; N where None.
    """
    ranks = equal_ranks(vectors) if ranks is None else ranks
    if not any(ranks):
        return torch.stack(list(vectors)).mean(0)
    left, _, right = shared_basis(vectors, ranks)
    # A pair of singular vectors may have either sign, and the mean of the off-diagonal elements depends on it.
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    left, right = left * signs, right * signs
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for vector in vectors:
        total += prune(left.T @ vector.double() @ right, threshold, len(vectors) if tasks is None else tasks)
    return (left @ total @ right.T).to(vectors[0].dtype)


def prune(projected: Tensor, threshold: str, tasks: int) -> Tensor:
    """A projected task matrix [r, r] without off-diagonal outliers; the diagonal stays.

    An element x off the diagonal stays where it lies near their mean μ, in standard deviations σ (with n − 1):
    "paper": |x − μ| < 1.96·σ, over the off-diagonal elements. "code": |x − μ| ≤ 1.96·σ/tasks, over all r² elements with
    the diagonal set to zero. "diagonal": none stays.
    """
    size = len(projected)
    diagonal = torch.diag(projected.diagonal())
    if threshold == "diagonal" or size < 2:
        return diagonal
    off = projected - diagonal
    if threshold == "code":
        mean, deviation = off.mean(), off.std()
        kept = (off - mean).abs() <= _DEVIATIONS * deviation / tasks
    else:
        number = size * (size - 1)
        mean = off.sum() / number
        squares = ((off - mean) ** 2).fill_diagonal_(0.0)
        kept = (off - mean).abs() < _DEVIATIONS * (squares.sum() / (number - 1)).sqrt()
    return diagonal + torch.where(kept, off, 0.0)
