"""`dare`: elements of each task vector dropped at random, the rest rescaled (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.offline.dare import drop_and_rescale
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class Dare:
    """θ = θ⁰ + scaling · Σ dare(τ) from the second task on; the first fold is the task's own model.

    A sum needs no memory of its own, so this is the published method on any number of tasks, exact: the second fold
    thins and scales the first task too. BatchNorm statistics are not thinned but merged as moments.

    Attributes:
        drop: the published p, the share of elements that is dropped.
        scaling: of the sum.
    """

    name: ClassVar[str] = "dare"
    needs_calibration: ClassVar[bool] = False

    drop: float = 0.5
    scaling: float = 0.3

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in. What is dropped depends on the seed, the number of the fold and the tensor's name.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        base = state.base
        vector = task_vector(base, checkpoint)
        merged: Mapping[str, Tensor] = vector
        if state.count:
            merged = {}
            for name, old in state.merged.items():
                if base.role(name) is not Role.STATISTIC:
                    if state.count == 1:
                        old = self._thinned(old, (seed, 0, name))
                    merged[name] = old + self._thinned(vector[name], (seed, state.count, name))
            merged |= merge_statistics(base, state.merged, vector, state.count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)

    def _thinned(self, vector: Tensor, key: tuple[object, ...]) -> Tensor:
        return drop_and_rescale(vector.clone(), self.drop, key=key).mul_(self.scaling)
