"""`otmf-paper`: optimal-transport masked fusion as published (arXiv 2511.19561, equation 4 and algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.batches import batches, calibration_sets, check_finite, features_of
from foldd.fusion.masks import MaskedMerge
from foldd.fusion.method import FoldReport, Progress, Training, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.transport import BLUR, sinkhorn_divergence


@dataclass(frozen=True)
class OtmfPaper:
    """Two masks of the model's size, trained by the Sinkhorn divergence to two frozen teachers.

    θ = θ⁰ + α·m_pre ⊙ τ_pre + (1−α)·m_post ⊙ τ_post, masks unconstrained reals that start at one, with every float
    tensor but BatchNorm statistics. Even steps take a batch of the previous task's inputs, the merged model before
    this fold as teacher, and train m_pre; odd steps a batch of the incoming task's, its own model, and m_post. The
    masks of the lowest single-batch loss are kept, compared across both kinds of steps. Features are not normalised.
    All of this as published; what is not done is the paper's retraining of heads with labels.

    Where the previous task left no inputs, the incoming task's stand in for them.
    """

    name: ClassVar[str] = "otmf-paper"
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

        Held at a time beside θ⁰, the state and the incoming vector, which may all stay in their files, in multiples of
        the model: the student's weights 1, the masks 2, Adam's moments 4, the best merge so far 1; activations of one
        batch.

        Raises:
            BadCheckpoint: `no-calibration` where it has no inputs (but for the first fold), `features-not-finite`
                where its network overflows on them, `missing-tensors`.
        """
        progress(0.0)
        base = state.base
        vector = task_vector(base, checkpoint)
        if not state.count:
            progress(1.0)
            return finish(self.name, state, checkpoint, vector, vector)
        inputs, warnings = calibration_sets(state, checkpoint)
        masked = MaskedMerge(
            base,
            state.merged,
            vector,
            merge_statistics(base, state.merged, vector, state.count),
            channels=False,
            scale=(self.alpha, 1 - self.alpha),
        )
        teachers = tuple(
            features_of(base, masked.fill(teacher), x)
            for teacher, x in zip((state.merged, vector), inputs, strict=True)
        )
        check_finite(checkpoint.task, *teachers)
        generator = torch.Generator().manual_seed(seed)
        draws = tuple(batches(len(x), self.batch, generator) for x in inputs)
        sides = (_Side(masked, masked.pre, self.learning_rate), _Side(masked, masked.post, self.learning_rate))
        best = {name: torch.empty_like(weight) for name, weight in masked.weights.items()}
        masked.write_merged(best)
        losses: list[float] = []
        for step in range(self.steps):
            turn = step % 2
            index = next(draws[turn])
            features = base.features(masked.rebuild(), inputs[turn][index])
            check_finite(checkpoint.task, features)
            loss = sinkhorn_divergence(features, teachers[turn][index], blur=self.blur)
            losses.append(float(loss.detach()))
            if losses[-1] <= min(losses):
                masked.write_merged(best)
            sides[turn].step(loss)
            progress((step + 1) / self.steps)
        training = Training(
            steps=self.steps,
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            loss_best=min(losses, default=None),
            warnings=warnings,
        )
        return finish(self.name, state, checkpoint, vector, best, training=training)


class _Side:
    """One of the two masks with Adam's moments, which take a step for each tensor as soon as its gradient is known."""

    def __init__(self, masked: MaskedMerge, side: Tensor, learning_rate: float) -> None:
        self._masked, self._side = masked, side
        self._masks = {name: masked.factors(side, name)[0] for name in masked.masked}
        self._optimisers = {name: torch.optim.Adam([mask], lr=learning_rate) for name, mask in self._masks.items()}

    def step(self, loss: Tensor) -> None:
        self._masked.backward_by_tensor(loss, self._side, self._take)

    def _take(self, name: str, gradient: Tensor) -> None:
        self._masks[name].grad = gradient
        self._optimisers[name].step()
        self._masks[name].grad = None
