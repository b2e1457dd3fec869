"""`adamerging-task`, `adamerging-layer`: coefficients by entropy (AdaMerging, arXiv 2310.02575), as a fold of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import batches, calibration_sets
from foldd.fusion.method import FoldReport, Progress, Training, finish, head_of, silent
from foldd.fusion.state import HeadTensors, MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


@dataclass(frozen=True)
class AdaMergingTask:
    """θ = θ⁰ + λ₁·merged + λ₂·τ, λ trained to make the frozen heads sure of the two tasks' unlabelled inputs.

    The published method needs all task vectors and unlabelled test images of every task at once. Here are only the
    merged vector, the incoming one, and the calibration inputs of the previous and the incoming task. λ starts where
    task arithmetic would be: 0.3 for each task, so 1 for a merge that is scaled already. λ is kept in [0, 1], as
    published. Published are 500 steps of Adam at 1e-3; 50 at 1e-2 go as far and cost a tenth.

    BatchNorm statistics are merged as moments.
    """

    name: ClassVar[str] = "adamerging-task"
    needs_calibration: ClassVar[bool] = True
    per_tensor: ClassVar[bool] = False

    start: float = 0.3
    steps: int = 50
    learning_rate: float = 1e-2
    batch: int = 16  # of each task, as published

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
        vector = task_vector(base, checkpoint)
        if not state.count:
            return finish(self.name, state, checkpoint, vector, vector)
        inputs, warnings = calibration_sets(state, checkpoint)
        previous = state.heads[state.previous] if state.previous in state.heads else head_of(checkpoint)
        heads = (previous, head_of(checkpoint))
        statistics = merge_statistics(base, state.merged, vector, state.count)
        names = [name for name in base.weights if base.role(name) is not Role.STATISTIC]
        start = torch.tensor([self.start if state.count == 1 else 1.0, self.start])
        factors = start.repeat(len(names) if self.per_tensor else 1, 1).requires_grad_()
        optimiser = torch.optim.Adam([factors], lr=self.learning_rate)
        generator = torch.Generator().manual_seed(seed)
        draws = tuple(batches(len(x), self.batch, generator) for x in inputs)
        fixed = {name: base.weights[name] + statistics[name] for name in statistics}
        losses: list[float] = []

        def merged() -> dict[str, Tensor]:
            rows = factors.expand(len(names), 2)
            return {
                name: row[0] * state.merged[name] + row[1] * vector[name] for name, row in zip(names, rows, strict=True)
            }

        for step in range(self.steps):
            # Both tasks in one pass: each image has its own task's head.
            pieces = [x[next(draw)] for x, draw in zip(inputs, draws, strict=True)]
            weights = fixed | {name: base.weights[name] + change for name, change in merged().items()}
            features = base.features(weights, torch.cat(pieces)).split([len(piece) for piece in pieces])
            loss = torch.stack([entropy(head, part) for head, part in zip(heads, features, strict=True)]).sum()
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                factors.clamp_(0, 1)
            progress((step + 1) / self.steps)
        with torch.no_grad():
            result = merged() | statistics
        training = Training(self.steps, losses[0], losses[-1], min(losses), warnings=warnings)
        return finish(self.name, state, checkpoint, vector, result, training=training)


@dataclass(frozen=True)
class AdaMergingLayer(AdaMergingTask):
    """The same with a pair of coefficients for each tensor."""

    name: ClassVar[str] = "adamerging-layer"
    per_tensor: ClassVar[bool] = True


def entropy(head: HeadTensors, features: Tensor) -> Tensor:
    """Mean entropy of a head's class distributions."""
    logs = head.logits(features).log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()
