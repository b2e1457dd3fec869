"""`nufilt`: null-space filtering (NUFILT, arXiv 2509.21413): a task is added where the merge so far has little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.matrices import as_matrix, is_factored, svd
from foldd.fusion.method import FoldReport, Progress, Training, finish, silent
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector

INITIAL = 0.02  # standard deviation of A's first values


@dataclass(frozen=True)
class Nufilt:
    """merged ← merged + τ·(P + B·A), per matrix [out, in].

    P = I − V_p·V_pᵀ closes the merged matrix's leading input directions V_p to the new task. B·A, of low rank and
    trained by Adam, opens them again where the new task's own leading directions V_t need it:

        ‖(τ − merged − τ·(P + B·A))·V_t‖² + ‖τ·(P + B·A)·V_p‖²

    Different from the published code:
    - Every matrix and convolution is filtered, and every other tensor is added. There, only attention and first
      feed-forward layers are, and the rest stays the base's. BatchNorm statistics are merged as moments.
    - The first task is taken as it is. There, it loses 128 input directions to the decomposition of a zero matrix.
    - Ranks end at what a tensor has: V_p and V_t at the directions that are not zero, V_p also at half of the inputs
      (a small matrix would take nothing new otherwise), A and B at the number of inputs.
    - Tensors are trained one after another. Adam and the loss know no tensor of another, so only the memory differs.

    Attributes:
        rank_previous, rank_new: columns of V_p and V_t.
        lora_rank: rows of A and columns of B.
        steps, learning_rate: of Adam.
    """

    name: ClassVar[str] = "nufilt"
    needs_calibration: ClassVar[bool] = False

    rank_previous: int = 128
    rank_new: int = 8
    lora_rank: int = 64
    steps: int = 50
    learning_rate: float = 1e-3

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in. The losses of the report are sums over all tensors.

        Held at a time beside θ⁰ and the state: the incoming vector, the new merged one, and a few float64 matrices or
        the training of one tensor.

        Raises:
            BadCheckpoint: `missing-tensors` where it lacks tensors of the base.
        """
        progress(0.0)
        base = state.base
        vector = task_vector(base, checkpoint)
        if not state.count:
            progress(1.0)
            return finish(self.name, state, checkpoint, vector, vector)
        generator = torch.Generator().manual_seed(seed)
        losses = [0.0] * self.steps
        merged: dict[str, Tensor] = {}
        for done, (name, old) in enumerate(state.merged.items(), start=1):
            if base.role(name) is not Role.STATISTIC:
                new = vector[name]
                if is_factored(base, name):
                    filtered, course = self._filter(as_matrix(old), as_matrix(new), generator)
                    new = filtered.view(new.shape)
                    losses = [total + loss for total, loss in zip(losses, course, strict=True)]
                merged[name] = old + new
            progress(done / (len(base.weights) + 1))
        merged |= merge_statistics(base, state.merged, vector, state.count)
        progress(1.0)
        training = Training(
            steps=self.steps,
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            loss_best=min(losses, default=None),
        )
        return finish(self.name, state, checkpoint, vector, merged, training=training)

    def _filter(self, merged: Tensor, vector: Tensor, generator: torch.Generator) -> tuple[Tensor, list[float]]:
        """τ·(P + B·A) of one matrix [out, in], and the loss before each step."""
        inputs = vector.shape[1]
        previous = svd(merged).v[:, : min(self.rank_previous, inputs // 2)].to(vector.dtype)
        own = svd(vector).v[:, : self.rank_new].to(vector.dtype)
        passed = vector - (vector @ previous) @ previous.T
        # Both terms in one product: P·V_p is zero, so on V_p the filter B·A alone is asked for nothing.
        directions = torch.cat([own, previous], 1)
        goal = torch.cat([(vector - merged - passed) @ own, torch.zeros_like(vector @ previous)], 1)
        rank = min(self.lora_rank, inputs)
        a = (INITIAL * torch.randn(rank, inputs, generator=generator, dtype=vector.dtype)).requires_grad_()
        b = torch.zeros(inputs, rank, dtype=vector.dtype, requires_grad=True)
        optimiser = torch.optim.Adam([a, b], lr=self.learning_rate)
        losses: list[float] = []
        for _ in range(self.steps):
            optimiser.zero_grad()
            loss = ((vector @ b) @ (a @ directions) - goal).square().sum()
            losses.append(float(loss.detach()))
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            return passed + (vector @ b) @ a, losses
