"""`ties`: trim, elect a sign, merge (Yadav et al. 2023, arXiv 2306.01708, algorithm 1) as a continual baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.method import FoldReport, Progress, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class Ties:
    """merged ← merged + scaling · TIES(merged, τ), the continual form that the OPCM paper (arXiv 2501.09522) compares.

    Two quirks of its code are kept. The result is *added* to the merged vector, which is one of its two inputs, and
    does not replace it: the merged vector's own largest elements grow by the factor 1 + scaling with every fold, 1.5⁷
    over eight tasks, so accuracy falls apart after a few; `adds = false` replaces. And the first task is scaled too;
    here its own model is published first, and scaled when the second comes.

    BatchNorm statistics are not trimmed or counted but merged as moments.

    Attributes:
        density: share of all elements of a task vector, the largest, that trimming leaves.
        scaling: weight of the TIES result.
        adds: False: merged ← scaling · TIES(merged, τ), the first task at full weight.
    """

    name: ClassVar[str] = "ties"
    needs_calibration: ClassVar[bool] = False

    density: float = 0.2
    scaling: float = 0.5
    adds: bool = True

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Held at a time beside θ⁰ and the state: the incoming vector, and the magnitudes of one vector or the new merged
        one.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        base = state.base
        vector = task_vector(base, checkpoint)
        merged: Mapping[str, Tensor] = vector
        if state.count:
            weight = self.scaling if self.adds and state.count == 1 else 1.0
            old_least = least_kept(base, state.merged, self.density)
            progress(0.4)
            new_least = least_kept(base, vector, self.density)
            progress(0.8)
            merged = {}
            for name, old in state.merged.items():
                if base.role(name) is not Role.STATISTIC:
                    kept = weight * trim(old, old_least), trim(vector[name], new_least)
                    result = self.scaling * elect(*kept)
                    merged[name] = weight * old + result if self.adds else result
            merged |= merge_statistics(base, state.merged, vector, state.count)
        progress(1.0)
        return finish(self.name, state, checkpoint, vector, merged)


def least_kept(base: Base, vector: Mapping[str, Tensor], density: float) -> float:
    """The smallest magnitude among the ⌊density·n⌋ largest (at least one) of all tensors but statistics."""
    names = [name for name in base.weights if base.role(name) is not Role.STATISTIC]
    magnitudes = np.empty(sum(math.prod(base.spec.tensors[name].shape) for name in names), dtype=np.float32)
    start = 0
    for name in names:
        part = vector[name].numpy().reshape(-1)
        np.abs(part, out=magnitudes[start : start + part.size])
        start += part.size
    # In place, and without the index array, twice as large, that torch's kthvalue makes.
    place = len(magnitudes) - min(max(1, int(density * len(magnitudes))), len(magnitudes))
    magnitudes.partition(place)
    return float(magnitudes[place])


def trim(tensor: Tensor, least: float) -> Tensor:
    """The tensor with zeros where magnitudes fall below `least`."""
    return torch.where(tensor.abs() >= least, tensor, 0.0)


def elect(one: Tensor, other: Tensor) -> Tensor:
    """The sum of those of two elements that have the sign of their sum; nothing where they cancel exactly.

    The sum, as that code does it, where TIES itself takes the mean of the elements that agree.
    """
    sign = (one + other).sign()
    return torch.where(one.sign() == sign, one, 0.0) + torch.where(other.sign() == sign, other, 0.0)
