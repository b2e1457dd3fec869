"""`opcm`: what a task adds is first made orthogonal to what is merged (arXiv 2501.09522), data-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.matrices import as_matrix, is_factored, svd
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import norm, task_vector

STATISTIC = "opcm"  # [scale, sum of task-vector norms, their number], float64


@dataclass(frozen=True)
class Opcm:
    """S ← S + orthogonal part of τ;  merged = S · mean(‖τ‖) / ‖S‖: every merged model is as far from θ⁰ as a task's.

    The published recursion divides by a scaling λ and multiplies by it again; λ cancels, and this sum is left. S itself
    is not kept: it is `merged` times one number, and singular vectors do not see the number. Matrices and convolutions
    are projected (published: linear layers only), the rest is summed. Norms are over all tensors but BatchNorm
    statistics, which are merged as moments.

    Where another method folded the state before, its merge stands for as many tasks of its own norm.

    Attributes:
        alpha: share of the sum of singular values that is closed to new tasks; from 1 on nothing is, as published.
    """

    name: ClassVar[str] = "opcm"
    needs_calibration: ClassVar[bool] = False

    alpha: float = 0.5

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
        base = state.base
        vector = task_vector(base, checkpoint)
        length = norm(base, vector)
        merged, scale, lengths, number = vector, 1.0, length, 1.0
        if state.count:
            scale, lengths, number = _recall(state)
            lengths, number = lengths + length, number + 1
            merged = {}
            for done, (name, old) in enumerate(state.merged.items(), start=1):
                if base.role(name) is not Role.STATISTIC:
                    new = vector[name]
                    if is_factored(base, name):
                        new = orthogonal_part(as_matrix(old), as_matrix(new), self.alpha).view(new.shape)
                    merged[name] = (scale * old).add_(new)
                progress(done / (len(base.weights) + 1))
            total, mean = norm(base, merged), lengths / number
            shrink = mean / total if mean and total else 1.0  # zero vectors only: nothing to scale
            for tensor in merged.values():
                tensor.mul_(shrink)
            scale = 1 / shrink
            merged |= merge_statistics(base, state.merged, vector, state.count)
        statistics = {**state.statistics, STATISTIC: torch.tensor([scale, lengths, number], dtype=torch.float64)}
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged, statistics=statistics)


def orthogonal_part(merged: Tensor, vector: Tensor, alpha: float) -> Tensor:
    """What of a task matrix [m, n] may be added to the merged one [m, n]; the type of `vector`.

    With merged = u·diag(s)·vᵀ and z = uᵀ·vector·v: the diagonal of z and its leading k×k block are taken away, where
    the first k singular values still sum to no more than the share `alpha`. (The paper's text counts one more than its
    code, which is followed.) Of merged's zero directions nothing is taken away: the published code, with the arbitrary
    vectors of a full decomposition, also clears their diagonal.
    """
    u, s, v = svd(merged)
    closed = int((s.cumsum(0) <= alpha * s.sum()).sum()) if alpha < 1 else 0
    # Which directions are closed is decided in float64; products of what is orthonormal lose nothing in float32.
    u, v = u.to(vector.dtype), v.to(vector.dtype)
    rows = u.T @ vector
    taken = u * (rows * v.T).sum(1)  # u·diag(z)
    taken[:, :closed] = u[:, :closed] @ (rows[:closed] @ v[:, :closed])
    return vector - taken @ v.T


def _recall(state: MergeState) -> tuple[float, float, float]:
    """Scale, sum of norms and their number before this fold."""
    if STATISTIC not in state.statistics:
        return 1.0, state.count * norm(state.base, state.merged), float(state.count)
    scale, lengths, number = state.statistics[STATISTIC].tolist()
    return scale, lengths, number
