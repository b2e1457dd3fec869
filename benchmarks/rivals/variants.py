"""Methods with one thing changed that is no setting of theirs: what `ablation` measures beside the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion import otmf_paper
from foldd.fusion.batches import batches, features_of
from foldd.fusion.method import FoldMethod, FoldReport, Progress, silent
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.state import HeadTensors, MergeState, merged_weights
from foldd.fusion.transport import BLUR, transport_plan

Labelled = Callable[[str], tuple[Tensor, Tensor]]  # task → its calibration inputs and labels


def biased_sinkhorn(x: Tensor, y: Tensor, *, blur: float = BLUR) -> Tensor:
    """OT_ε(x, y) alone, without the self-terms that make a divergence of it: it shrinks clouds (Feydy et al. 2019).

    Args:
        x: features [n, width]. y: features [m, width].

    Returns:
        A scalar of x's type.
    """
    cost = 0.5 * (x[:, None, :] - y[None, :, :]).square().sum(-1)
    plan = transport_plan(cost, blur**2)
    entropy = float(torch.xlogy(plan, plan * plan.numel()).sum())
    return (plan.to(cost.dtype) * cost).sum() + blur**2 * entropy


@dataclass(frozen=True)
class BiasedPaper(OtmfPaper):
    """The published fold with the biased loss in the place of the divergence."""

    name: ClassVar[str] = "otmf-paper-biased"

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in."""
        # Not a copy of the fold with another line: the two would drift apart.
        with patch.object(otmf_paper, "sinkhorn_divergence", biased_sinkhorn):
            return super().fold(state, checkpoint, seed=seed, progress=progress)


@dataclass(frozen=True)
class Steady(Otmf):
    """An incoming task weighs `incoming` in each layer and fold, as if all layers were linear."""

    def weight(self, count: int, *, linear: bool) -> float:
        return self.incoming


@dataclass(frozen=True)
class FewInputs:
    """`otmf` with only some of each bundle's calibration inputs; fewer are always among more."""

    name: ClassVar[str] = "otmf-inputs"
    needs_calibration: ClassVar[bool] = True

    count: int

    def init(self, base: Base) -> MergeState:
        return Otmf().init(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in."""
        assert checkpoint.inputs is not None, "the bench's bundles all carry inputs"
        shuffled = torch.randperm(len(checkpoint.inputs), generator=torch.Generator().manual_seed(seed))
        few = replace(checkpoint, inputs=checkpoint.inputs[shuffled[: self.count].numpy()])
        return Otmf().fold(state, few, seed=seed, progress=progress)


@dataclass(frozen=True)
class HeadTuning:
    """A method, and after each fold the previous task's head tuned on the merged features, with labels.

    As the authors of OTMF do it: cross-entropy alone, Adam, the head of the previous task only, and after the last
    fold that of the last task too (`tune`). Older heads are not seen again.
    """

    name: ClassVar[str] = "head-tuning"
    needs_calibration: ClassVar[bool] = True

    inner: FoldMethod
    labelled: Labelled
    learning_rate: float = 0.01
    steps: int = 100
    batch: int = 16

    def init(self, base: Base) -> MergeState:
        return self.inner.init(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in, and tunes the head of the task before it."""
        new, report = self.inner.fold(state, checkpoint, seed=seed, progress=progress)
        return (new if state.previous is None else self.tune(new, state.previous, seed=seed)), report

    def tune(self, state: MergeState, task: str, *, seed: int) -> MergeState:
        """The state with one head tuned on the merge as it is."""
        inputs, labels = self.labelled(task)
        features = features_of(state.base, merged_weights(state), inputs)
        weight, bias = (
            tensor.clone().requires_grad_() for tensor in (state.heads[task].weight, state.heads[task].bias)
        )
        optimiser = torch.optim.Adam([weight, bias], lr=self.learning_rate)
        draw = batches(len(inputs), self.batch, torch.Generator().manual_seed(seed))
        for _ in range(self.steps):
            index = next(draw)
            loss = F.cross_entropy(HeadTensors(weight, bias).logits(features[index]), labels[index])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        head = HeadTensors(weight.detach(), bias.detach())
        return replace(state, heads=state.heads | {task: head})
