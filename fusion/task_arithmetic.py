"""`task-arithmetic`: a scaled sum of all task vectors (Ilharco et al. 2023, equation of section 4)."""

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
class TaskArithmetic:
    """θ = θ⁰ + λ·Σ τ from the second task on; the first fold is the task's own model.

    The sum needs no memory of its own. After one fold merged is τ₁ itself, so the second scales both,
    λ·(τ₁ + τ₂), and every later one adds λ·τ: at each t ≥ 2 exactly the published sum. BatchNorm statistics are
    not scaled or summed but merged as moments.
    """

    name: ClassVar[str] = "task-arithmetic"
    needs_calibration: ClassVar[bool] = False

    scaling: float = 0.3  # the published choice where nothing can be validated

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
            old_scaling = self.scaling if state.count == 1 else 1.0
            merged = {name: old_scaling * old + self.scaling * vector[name] for name, old in state.merged.items()}
            merged |= merge_statistics(state.base, state.merged, vector, state.count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)
