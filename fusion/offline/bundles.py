"""`Models` of opened bundles beside a captured base, for programs that have both; `foldd merge` reads files itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.method import head_of, silent
from foldd.fusion.offline.contract import Calibration, OfflineMethod, merge
from foldd.fusion.state import as_tensor


class Bundles:
    """Checkpoints of one base, side by side; tensors stay in their files."""

    def __init__(self, base: Base, checkpoints: Sequence[Checkpoint]) -> None:
        self.count, self.has_base = len(checkpoints), True
        self.names: Sequence[str] = sorted(base.weights, key=str.encode)
        inputs = [as_tensor(checkpoint.inputs) for checkpoint in checkpoints if checkpoint.inputs is not None]
        heads = [head_of(checkpoint) for checkpoint in checkpoints]
        samples = [checkpoint.samples for checkpoint in checkpoints]
        self.calibration = Calibration(base, heads, inputs, samples) if len(inputs) == len(checkpoints) else None
        self._base, self._checkpoints = base, checkpoints

    def role(self, name: str) -> Role:
        return self._base.role(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._base.weights[name].shape)

    def base(self, name: str, start: int, stop: int) -> Tensor:
        return self._base.weights[name].reshape(-1)[start:stop].clone()

    def weights(self, model: int, name: str, start: int, stop: int) -> Tensor:
        checkpoint = self._checkpoints[model]
        stored = as_tensor(checkpoint.parameters[name].piece(start, stop))
        return stored.add_(self.base(name, start, stop)) if checkpoint.is_delta else stored


def merge_bundles(method: OfflineMethod, base: Base, checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The merged task vector, statistics included."""
    merged = {name: torch.empty_like(weight) for name, weight in base.weights.items()}
    for name, start, values in merge(method, Bundles(base, checkpoints), silent):
        merged[name].view(-1)[start : start + len(values)] = values
    return {name: tensor.sub_(base.weights[name]) for name, tensor in merged.items()}
