"""`lore`: low-rank task vectors over an approximate base (LoRE-Merging, arXiv 2502.10749), estimated in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.matrices import as_matrix, is_factored
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.offline.lore import shrink, singular_value
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector

PREFIX = "lore/"  # statistics: of each matrix the approximate base, as a difference to θ⁰


@dataclass(frozen=True)
class Lore:
    """δ = SVT(τ − c),  c ← mean of all (τ − δ),  merged = c + scaling · Σ δ: an adaptation of algorithm 1.

    The published method goes over all models round after round. Here each comes once and is set against the running
    approximate base c, which starts at θ⁰: the incoming task's low-rank part δ over c is kept at full weight, what is
    left of it goes into the mean that c is. With `scaling` = 1/t in place of the sum this is plain averaging, as the
    published mean is at convergence; unlike the published method it differs from averaging for two tasks.

    Matrices and convolutions are estimated so; the rest, and what has too few rows or columns for a rank of one, is the
    mean by count. BatchNorm statistics are merged as moments. The state holds c, another copy of the matrices. Where
    another method folded the state before, its merge stands for one vector of as many tasks.

    Attributes:
        share: the threshold is the singular value of τ − c behind the ⌊share·min(m, n)⌋ largest ones.
        scaling: the published λ, from the second task on.
    """

    name: ClassVar[str] = "lore"
    needs_calibration: ClassVar[bool] = False

    share: float = 0.2
    scaling: float = 1.0

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Held at a time beside θ⁰ and the state: the incoming vector, the new merged one, the new approximate base, and a
        few float64 matrices of one tensor's size.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        base, count = state.base, state.count
        vector = task_vector(base, checkpoint)
        merged, statistics = {}, dict(state.statistics)
        for done, (name, new) in enumerate(vector.items(), start=1):
            if is_factored(base, name):
                old = state.statistics.get(PREFIX + name)
                merged[name], statistics[PREFIX + name] = self._merge(state.merged[name], old, new, count)
            elif base.role(name) is not Role.STATISTIC:
                merged[name] = state.merged[name] + (new - state.merged[name]) / (count + 1) if count else new
            progress(done / (len(base.weights) + 1))
        if count:
            merged |= merge_statistics(base, state.merged, vector, count)
        else:
            merged = vector
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged, statistics=statistics)

    def _merge(self, merged: Tensor, running: Tensor | None, new: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """One tensor after `count` tasks and one more: (merged, approximate base), fresh tensors."""
        if not count:
            part = self._low_rank(new)
            return new, new - part
        if running is None:  # another method folded it
            running = merged - self._low_rank(merged)
        parts = (merged - running) / (1.0 if count == 1 else self.scaling)
        part = self._low_rank(new - running)
        after = running + (new - part - running) / (count + 1)
        return after + self.scaling * (parts + part), after

    def _low_rank(self, tensor: Tensor) -> Tensor:
        matrix = as_matrix(tensor)
        bound = singular_value(matrix, int(self.share * min(matrix.shape)))
        return shrink(matrix, bound).view(tensor.shape)
