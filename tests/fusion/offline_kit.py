"""Small models in memory, as the offline methods see them."""

from __future__ import annotations

import torch
from torch import Tensor

from foldd.core.roles import Role
from foldd.fusion.method import silent
from foldd.fusion.offline.contract import OfflineMethod, merge

Tensors = dict[str, Tensor]
ROLES = {
    "a.weight": Role.MATRIX, "a.bias": Role.BIAS, "b.weight": Role.MATRIX, "c.weight": Role.CONVOLUTION,
    "e": Role.EMBEDDING, "n.running_mean": Role.STATISTIC, "n.running_var": Role.STATISTIC, "row": Role.MATRIX,
}  # fmt: skip
SHAPES = {
    "a.weight": (9, 7), "a.bias": (9,), "b.weight": (6, 11), "c.weight": (5, 3, 2, 2), "e": (1, 6),
    "n.running_mean": (5,), "n.running_var": (5,), "row": (1, 8),
}  # fmt: skip
WEIGHTS = [name for name, role in ROLES.items() if role is not Role.STATISTIC]


def random_model(seed: int, scale: float = 1.0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    model = {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return model | {"n.running_var": model["n.running_var"].abs()}


def random_models(count: int, *, seed: int = 0, spread: float = 0.1) -> tuple[Tensors, list[Tensors]]:
    """A base and models near it."""
    base = random_model(seed)
    changes = [random_model(seed + 1 + i, spread) for i in range(count)]
    return base, [{name: base[name] + change[name] for name in base} for change in changes]


class InMemory:
    def __init__(self, base: Tensors | None, models: list[Tensors]) -> None:
        self.count, self.names, self.has_base, self.calibration = len(models), sorted(models[0]), base is not None, None
        self._base, self._models = base, models

    def role(self, name: str) -> Role:
        return ROLES[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._models[0][name].shape)

    def base(self, name: str, start: int, stop: int) -> Tensor:
        assert self._base is not None
        return self._base[name].float().reshape(-1)[start:stop].clone()

    def weights(self, model: int, name: str, start: int, stop: int) -> Tensor:
        return self._models[model][name].float().reshape(-1)[start:stop].clone()


def run(method: OfflineMethod, base: Tensors | None, models: list[Tensors], progress=silent) -> Tensors:
    """The merged model; every element must come exactly once."""
    merged = {name: torch.full_like(tensor, float("nan"), dtype=torch.float32) for name, tensor in models[0].items()}
    for name, start, values in merge(method, InMemory(base, models), progress):
        flat = merged[name].view(-1)[start : start + len(values)]
        assert bool(flat.isnan().all()), f"{name} came twice"
        flat.copy_(values)
    assert not any(bool(tensor.isnan().any()) for tensor in merged.values())
    return merged
