"""`uowq`: the merge and the incoming task weigh by samples and by how far they are apart (arXiv 2601.10779)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import FORWARD_BATCH, calibration_sets, check_finite
from foldd.fusion.fisher import Logits, fisher_products
from foldd.fusion.method import FoldReport, Progress, Training, finish, head_of, silent
from foldd.fusion.state import HeadTensors, MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.transfer_weights import fold_share

STATISTIC = "uowq"  # [samples folded so far, tasks that they are of], float64
MAX_INPUTS = 256  # of a calibration set; more cost time and change the share by little
UNKNOWN_SAMPLES = 1000.0  # of a task, where no checkpoint so far has told its count


@dataclass(frozen=True)
class Uowq:
    """merged ← α·merged + (1 − α)·τ with the α of `fold_share`, the method's form for one model that serves all tasks.

    δ is taken from the difference of the two networks under the mean of two Fisher informations: the merged network's
    on the previous task's calibration inputs, and the incoming network's on its own, each under its frozen head. The
    importance of the old tasks is by count, (t − 1)/t; samples are summed over the folds.

    With equal counts of samples α is (t − 1)/t whatever δ is: the plain average. The method is for unequal counts.

    A checkpoint without a count (`foldd.samples`) counts as many as the mean of those before, and so do tasks that
    another method folded before this one; the report warns. BatchNorm statistics are merged as moments of a mixture
    with the weights α and 1 − α.

    Attributes:
        dimension: d of δ; 0: the number of trained parameters, as published. A network that is tuned for a few epochs
            uses far fewer (`effective_dimension`), and at the published d samples alone decide.
    """

    name: ClassVar[str] = "uowq"
    needs_calibration: ClassVar[bool] = True

    dimension: float = 0.0

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; the seed is not used.

        Held at a time beside θ⁰ and the state: the incoming vector, the difference of the two, one network's weights
        or the new merged vector.

        Raises:
            BadCheckpoint: `no-calibration` where it has no inputs (but for the first fold), `features-not-finite`
                where its network overflows on them, `missing-tensors`.
            BadSetup: `no-forward-derivative` where torch cannot differentiate the network forwards.
        """
        progress(0.0)
        base = state.base
        vector = task_vector(base, checkpoint)
        previous, new, warnings = _samples(state, checkpoint)
        merged, shares = dict(vector), {}
        if state.count:
            discrepancy, unseen = self._discrepancy(state, checkpoint, vector, progress)
            warnings += unseen
            alpha = fold_share(previous, new, discrepancy, state.count / (state.count + 1))
            # A step from the old merge, not a weighted sum: equal vectors then fold to exactly themselves.
            merged = {name: old + (1 - alpha) * (vector[name] - old) for name, old in state.merged.items()}
            merged |= merge_statistics(base, state.merged, vector, alpha / (1 - alpha))
            shares = {"merged": alpha, "incoming": 1 - alpha}
        total = torch.tensor([previous + new, state.count + 1], dtype=torch.float64)
        progress(1.0)
        return finish(
            self.name,
            state,
            checkpoint,
            vector,
            merged,
            statistics={**state.statistics, STATISTIC: total},
            training=Training(shares=shares, warnings=warnings),
        )

    def _discrepancy(
        self, state: MergeState, checkpoint: Checkpoint, vector: Mapping[str, Tensor], progress: Progress
    ) -> tuple[float, tuple[str, ...]]:
        """δ, and what to warn of."""
        base = state.base
        (old_inputs, new_inputs), warnings = calibration_sets(state, checkpoint)
        difference = {name: vector[name] - state.merged[name] for name in free_names(base)}
        new_head = head_of(checkpoint)
        sides = [(vector, new_head, new_inputs)]
        if not warnings:  # the previous task left inputs, and its head is known
            assert state.previous is not None
            sides.append((state.merged, state.heads[state.previous], old_inputs))
        total = 0.0
        for done, (side, head, inputs) in enumerate(sides, start=1):
            logits, free = task_logits(base, side, head)
            inputs = inputs[:MAX_INPUTS]
            with torch.no_grad():
                check_finite(checkpoint.task, *(logits(free, piece) for piece in torch.split(inputs, FORWARD_BATCH)))
            total += float(fisher_products(logits, free, [difference], inputs)[0, 0])
            progress(0.9 * done / len(sides))
        return total / len(sides) / (self.dimension or count_parameters(base)), warnings


def free_names(base: Base) -> list[str]:
    """The trained parameters: all tensors but BatchNorm statistics."""
    return [name for name in base.weights if base.role(name) is not Role.STATISTIC]


def count_parameters(base: Base) -> int:
    """d as published: the number of trained parameters, heads not among them, since they are frozen."""
    return sum(base.weights[name].numel() for name in free_names(base))


def task_logits(base: Base, vector: Mapping[str, Tensor], head: HeadTensors) -> tuple[Logits, dict[str, Tensor]]:
    """A network θ⁰ + vector under a frozen head, as a function of its trained parameters, and these."""
    weights = {name: weight + vector[name] for name, weight in base.weights.items()}
    free = {name: weights.pop(name) for name in free_names(base)}

    def logits(parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return head.logits(base.features({**weights, **parameters}, inputs))

    return logits, free


def _samples(state: MergeState, checkpoint: Checkpoint) -> tuple[float, float, tuple[str, ...]]:
    """Samples folded before, those of the incoming task, and what to warn of."""
    folded, tasks = state.statistics[STATISTIC].tolist() if STATISTIC in state.statistics else (0.0, 0.0)
    known = folded / tasks if tasks else None
    new = checkpoint.samples or known or UNKNOWN_SAMPLES
    warnings: tuple[str, ...] = ()
    if checkpoint.samples is None:
        warnings += (f"{checkpoint.task} does not tell its count of samples (foldd.samples): {new:.0f} are assumed.",)
    if missing := state.count - tasks:
        warnings += (
            f"{missing:.0f} tasks were folded by another method: {known or new:.0f} samples each are assumed.",
        )
    return folded + missing * (known or new), new, warnings
