"""`continual-finetuning`: the merged network trained on each task in turn, with labels: what merging is compared to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import batches
from foldd.fusion.method import FoldReport, Progress, Training, finish, head_of, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.task_vector import task_vector

Labelled = Callable[[str], tuple[Tensor, Tensor]]  # task → its training inputs and labels


@dataclass(frozen=True)
class ContinualFinetuning:
    """Sequential fine-tuning under the frozen heads: of a bundle only its head and its name are used after the first.

    The first model is taken as it is, as every method does. AdamW with a one-cycle schedule, as the bundles were made,
    but fewer epochs of fewer images: cheap, and kind to what was learned before. BatchNorm statistics stay.
    """

    name: ClassVar[str] = "continual-finetuning"
    needs_calibration: ClassVar[bool] = False

    labelled: Labelled
    learning_rate: float = 1.5e-4
    epochs: int = 2
    batch: int = 64

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Trains on one more task."""
        base = state.base
        if not state.count:
            vector = task_vector(base, checkpoint)
            return finish(self.name, state, checkpoint, vector, vector)
        inputs, labels = self.labelled(checkpoint.task)
        head = head_of(checkpoint)
        weights = {name: base.weights[name] + state.merged[name] for name in base.weights}
        trained = [weights[n].requires_grad_() for n in weights if base.role(n) is not Role.STATISTIC]

        def loss_of(index: Tensor) -> Tensor:
            return F.cross_entropy(head.logits(base.features(weights, inputs[index])), labels[index])

        optimiser = torch.optim.AdamW(trained, lr=self.learning_rate)
        losses = one_cycle(
            optimiser, loss_of, len(inputs), epochs=self.epochs, batch=self.batch, seed=seed, progress=progress
        )
        merged = {name: weight.detach() - base.weights[name] for name, weight in weights.items()}
        learned = {name: merged[name] - state.merged[name] for name in merged}
        training = Training(len(losses), losses[0], losses[-1], min(losses))
        return finish(self.name, state, checkpoint, learned, merged, training=training)


def one_cycle(
    optimiser: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    *,
    epochs: int,
    batch: int,
    seed: int,
    progress: Progress = silent,
) -> list[float]:
    """Trains with a one-cycle schedule up to the optimiser's own rate, on seeded batches of `count` samples.

    Args:
        loss_of: indices of a batch → scalar.

    Returns:
        The loss of each step.
    """
    steps = epochs * (count // min(batch, count))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, optimiser.param_groups[0]["lr"], total_steps=steps + 1)
    draw = batches(count, batch, torch.Generator().manual_seed(seed))
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(next(draw))
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        progress((step + 1) / steps)
    return losses
