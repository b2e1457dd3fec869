"""`fisher`: every element weighted by how much its model's decisions depend on it (Matena & Raffel, 2111.09832)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base
from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, require_share, size_of, weight_names
from foldd.fusion.state import HeadTensors

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class OfflineFisher:
    """θ = Σ F_i·θ_i / Σ F_i with diagonal Fisher information F_i, of each model on its own calibration inputs.

    F_i is scaled to the mean 1 for each model, since one that is learned less well would outvote the others otherwise.
    Unlike other methods this one holds models: one at a time with its gradients, and the two sums.

    Attributes:
        floor: added to the scaled F_i: where no task cares, the result is the mean.
        seed: of the classes that are drawn.
    """

    name: ClassVar[str] = "fisher"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = False

    floor: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require_share(self.name, "floor", self.floor, low=1e-12, high=1e12)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        assert models.calibration is not None
        calibration, names = models.calibration, weight_names(models)
        total: Weights = {}
        weighted: Weights = {}
        for model in range(models.count):
            weights = {n: models.weights(model, n, 0, size_of(models, n)).view(models.shape(n)) for n in models.names}
            head, inputs = calibration.heads[model], calibration.inputs[model]
            fisher = diagonal_fisher(calibration.network, weights, names, head, inputs, seed=self.seed + model)
            elements = sum(values.numel() for values in fisher.values())
            scale = sum(float(values.sum(dtype=torch.float64)) for values in fisher.values()) / elements or 1.0
            for name, values in fisher.items():
                share = values.div_(scale).add_(self.floor)
                product = share * weights[name]
                total[name] = share if name not in total else total[name].add_(share)
                weighted[name] = product if name not in weighted else weighted[name].add_(product)
            progress((model + 1) / (models.count + 1))
        for name in names:
            yield Piece(name, 0, weighted.pop(name).div_(total.pop(name)).reshape(-1))

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return 4 * sum(sizes) * 6


def diagonal_fisher(
    base: Base, weights: Weights, names: Sequence[str], head: HeadTensors, inputs: Tensor, *, seed: int
) -> Weights:
    """Mean squared gradient of log p(class), input by input, the class drawn from the model's own prediction."""
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    for name in names:
        weights[name].requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    fisher = {name: torch.zeros_like(weights[name], requires_grad=False) for name in names}
    for one in torch.split(inputs, 1):
        logits = head.logits(base.features(weights, one))
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(F.cross_entropy(logits, drawn), [weights[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            fisher[name].addcmul_(gradient, gradient, value=1 / len(inputs))
    return fisher
