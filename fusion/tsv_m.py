"""`tsv-m`: singular vectors of the tasks made orthogonal to each other (TSV-M, arXiv 2412.00081), as a fold of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.matrices import Svd, polar_factor, svd
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.tensorwise import fold_matrices


@dataclass(frozen=True)
class TsvM:
    """merged ← alpha · TSV-M(merged / alpha, τ): an adaptation; the published method needs all task vectors at once.

    TSV-M sums the tasks' leading directions, so the merged vector, a sum already, and the incoming one go in at full
    weight. Of two tasks this is the published result to rounding. Of more, the rank of the merged vector is cut again
    with every fold, and old tasks lose their weaker directions. The published scaling applies to the whole sum, so it
    is taken out before a fold (after the first there is none) and put in again after it.

    Matrices and convolutions (published: every two-dimensional tensor) are merged so; the rest, and matrices of a
    single row or column, which have no rank to share, are the mean by count. BatchNorm statistics are merged as
    moments.

    Attributes:
        alpha: factor of the merged vector from the second task on; above 0.
        by_count: each task gets the same share of the rank, as it would in the joint method, so t/(t+1) for the merged
            vector of t tasks; otherwise the merged vector and the incoming one get half each.
    """

    name: ClassVar[str] = "tsv-m"
    needs_calibration: ClassVar[bool] = False

    alpha: float = 1.0
    by_count: bool = False

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Held at a time beside θ⁰ and the state: the incoming vector, the new merged one, and a few float64 matrices of
        one tensor's size.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        base, count = state.base, state.count
        vector = task_vector(base, checkpoint)
        merged: Mapping[str, Tensor] = vector
        if count:

            def merge(old: Tensor, new: Tensor, rank: int) -> Tensor:
                ranks = ranks_by_count(rank, count) if self.by_count else (rank // 2, rank // 2)
                return tsv_merge([old, new], ranks)

            folded = fold_matrices(state, vector, progress, merge, scale=self.alpha if count > 1 else 1.0)
            for tensor in folded.values():
                tensor.mul_(self.alpha)
            merged = folded | merge_statistics(base, state.merged, vector, count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)


def ranks_by_count(rank: int, count: int) -> tuple[int, int]:
    """The shares of a rank of at least 2 for the merged vector of `count` tasks and for one more task."""
    incoming = max(1, rank // (count + 1))
    return min(count * incoming, rank - incoming), incoming


def equal_ranks(vectors: Sequence[Tensor]) -> list[int]:
    """⌊min(m, n)/N⌋ for each of N tasks."""
    return [min(vectors[0].shape) // len(vectors)] * len(vectors)


def tsv_merge(vectors: Sequence[Tensor], ranks: Sequence[int] | None = None) -> Tensor:
    """The published merge of one matrix [m, n] of N tasks → [m, n], in the type of the first.

    Of each task the leading `ranks` singular triples, ⌊min(m, n)/N⌋ where None, are put side by side: u [m, r],
    s [r], v [n, r]. With the polar factors of u and v in their places, the result is u·diag(s)·vᵀ, a sum over tasks.
    A task of lower rank brings no more triples than it has; the published code fills up with arbitrary vectors.
    Without a single triple to share (more tasks than rows or columns) it is the mean.
    """
    if ranks is None:
        ranks = equal_ranks(vectors)
    if not any(ranks):
        return torch.stack(list(vectors)).mean(0)
    left, s, right = shared_basis(vectors, ranks)
    return (left * s @ right.T).to(vectors[0].dtype)


def shared_basis(vectors: Sequence[Tensor], ranks: Sequence[int]) -> Svd:
    """The tasks' leading singular triples side by side, with the polar factors of their vectors: float64."""
    us, ss, vs = [], [], []
    for vector, rank in zip(vectors, ranks, strict=True):
        u, s, v = svd(vector)
        us.append(u[:, :rank])
        ss.append(s[:rank])
        vs.append(v[:, :rank])
    return Svd(polar_factor(torch.cat(us, 1)), torch.cat(ss), polar_factor(torch.cat(vs, 1)))
