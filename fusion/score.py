"""`score`: tasks in one orthogonal basis, conflicts off its diagonal pruned (arXiv 2603.05768), as a fold of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.offline.score import score_merge
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.tensorwise import fold_matrices
from foldd.fusion.tsv_m import ranks_by_count


@dataclass(frozen=True)
class Score:
    """merged ← SCORE(merged, τ), shared out by count: an adaptation; the published method needs all task vectors.

    Of t tasks and one more, the merged vector brings t/(t+1) of the basis and the incoming one the rest, as each
    task would in the joint method, and the pruning bound is that of t + 1 tasks. SCORE sums, so the merged vector, a
    sum already, goes in at full weight. Of two tasks this is the published result to rounding. Of more, old tasks are
    projected and pruned again with every fold.

    Matrices and convolutions are merged so; the rest, and matrices of a single row or column, are the mean by count.
    BatchNorm statistics are merged as moments.

    Attributes:
        threshold: "paper", "code" or "diagonal", see foldd.fusion.offline.score.prune.
    """

    name: ClassVar[str] = "score"
    needs_calibration: ClassVar[bool] = False

    threshold: str = "paper"

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
                return score_merge([old, new], self.threshold, ranks_by_count(rank, count), count + 1)

            folded = fold_matrices(state, vector, progress, merge)
            merged = folded | merge_statistics(base, state.merged, vector, count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)
