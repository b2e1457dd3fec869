"""`average`: the running mean of all task vectors (SWA, Izmailov et al. 2018), the data-free default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class Average:
    """merged ← (t·merged + τ)/(t+1)."""

    name: ClassVar[str] = "average"
    needs_calibration: ClassVar[bool] = False

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Raises:
            BadCheckpoint: it lacks tensors of the base.
        """
        progress(0.0)
        vector = task_vector(state.base, checkpoint)
        merged: Mapping[str, Tensor] = vector
        if state.count:
            # A step from the old mean, not a weighted sum: equal vectors then fold to exactly themselves.
            share = 1.0 / (state.count + 1)
            merged = {name: old + share * (vector[name] - old) for name, old in state.merged.items()}
            merged |= merge_statistics(state.base, state.merged, vector, state.count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)
