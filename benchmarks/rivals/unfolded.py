"""`unfolded`: nothing is merged, only heads follow: what 64 inputs a task are worth without any task vector.

With frozen heads that is `pretrained`. With aligned ones each task has a ridge from the base's own features to what its
model says: features never move, so nothing is forgotten. What a merge gains above that is what merging is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class Unfolded:
    """merged ← 0."""

    name: ClassVar[str] = "unfolded"
    needs_calibration: ClassVar[bool] = False

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Takes the head and nothing else; the seed is not used."""
        vector, nothing = task_vector(state.base, checkpoint), empty_state(state.base).merged
        return finish(self.name, state, checkpoint, vector, nothing)
