"""`magmax`: of every element the change of largest magnitude (Marczak et al. 2024, arXiv 2407.06322)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class MagMax:
    """merged ← the larger of merged and τ by magnitude, per element: the joint maximum needs no memory of its own.

    Of equal magnitudes the earlier task's stays, so that folding a model twice changes nothing (the published code
    takes the later one). The published factor λ of the result is 1 here, and whether a task was fine-tuned from θ⁰ or
    from the model before it is the sender's affair. BatchNorm statistics are merged as moments.
    """

    name: ClassVar[str] = "magmax"
    needs_calibration: ClassVar[bool] = False

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        vector = task_vector(state.base, checkpoint)
        merged: Mapping[str, Tensor] = vector
        if state.count:
            merged = {name: larger(old, vector[name]) for name, old in state.merged.items()}
            merged |= merge_statistics(state.base, state.merged, vector, state.count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)


def larger(old: Tensor, new: Tensor) -> Tensor:
    """Of every element the one of larger magnitude, the old one where they are equal."""
    return torch.where(new.abs() > old.abs(), new, old)
