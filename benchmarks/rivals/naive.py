"""`otmf-naive`: OTMF as one writes it down from the paper (arXiv 2511.19561, equation 4 and algorithm 1).

Everything is held and everything is run again: both teachers' weights, two masks of the model's size in autograd, Adam
over each as a whole, and in every step the student's and the teacher's network. It computes what `otmf-paper` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import batches, calibration_sets
from foldd.fusion.method import FoldReport, Progress, Training, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.transport import BLUR, sinkhorn_divergence

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class OtmfNaive:
    """The published settings."""

    name: ClassVar[str] = "otmf-naive"
    needs_calibration: ClassVar[bool] = True

    alpha: float = 0.8
    learning_rate: float = 0.01
    steps: int = 100
    batch: int = 16
    blur: float = BLUR

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in.

        Raises:
            BadCheckpoint: `no-calibration` where it has no inputs (but for the first fold), `missing-tensors`.
        """
        base = state.base
        vector = dict(task_vector(base, checkpoint))
        if not state.count:
            return finish(self.name, state, checkpoint, vector, vector)
        inputs, warnings = calibration_sets(state, checkpoint)
        base_weights, vectors = dict(base.weights), (dict(state.merged), vector)
        statistics = merge_statistics(base, vectors[0], vector, state.count)
        names = [name for name in base_weights if base.role(name) is not Role.STATISTIC]
        teachers = [{name: weight + side[name] for name, weight in base_weights.items()} for side in vectors]
        masks = [{name: torch.ones_like(base_weights[name]) for name in names} for _ in vectors]
        optimisers = [torch.optim.Adam(list(side.values()), lr=self.learning_rate) for side in masks]

        def merged(pre: Weights, post: Weights) -> Weights:
            one, two = vectors
            return {
                name: self.alpha * pre[name] * one[name] + (1 - self.alpha) * post[name] * two[name] for name in names
            } | statistics

        generator = torch.Generator().manual_seed(seed)
        draws = [batches(len(x), self.batch, generator) for x in inputs]
        best_loss, best, losses = math.inf, masks, []
        for step in range(self.steps):
            turn = step % 2
            for side, trained in zip(masks, (turn == 0, turn == 1), strict=True):
                for mask in side.values():
                    mask.requires_grad_(trained)
            x = inputs[turn][next(draws[turn])]
            student = {name: base_weights[name] + change for name, change in merged(*masks).items()}
            with torch.no_grad():
                goal = base.features(teachers[turn], x)
            loss = sinkhorn_divergence(base.features(student, x), goal, blur=self.blur)
            losses.append(float(loss.detach()))
            if losses[-1] <= best_loss:
                best_loss = losses[-1]
                best = [{name: mask.detach().clone() for name, mask in side.items()} for side in masks]
            optimisers[turn].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimisers[turn].step()
            progress((step + 1) / self.steps)
        training = Training(
            steps=self.steps,
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            loss_best=min(losses, default=None),
            warnings=warnings,
        )
        return finish(self.name, state, checkpoint, vector, merged(*best), training=training)
