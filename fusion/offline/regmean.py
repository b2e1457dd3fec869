"""`regmean`: least squares, every layer's outputs on every task's inputs (Jin et al. 2023, arXiv 2212.09849)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldd.base.walk import Lane
from foldd.fusion.method import Progress
from foldd.fusion.offline.average import running_mean
from foldd.fusion.offline.contract import Models, Piece, elementwise, require_share, size_of, weight_names

DEAD = 1e-9  # of the mean diagonal; a Gram matrix has zeros where an input is always zero


@dataclass(frozen=True)
class OfflineRegMean:
    """W = Σ W_i·G_i · (Σ G_i)⁻¹ for every affine layer, G_i = XᵀX of its inputs in model i; all else is the mean.

    A convolution is a linear layer on patches. As published only weights are merged so; biases are means. The models
    walk through the network side by side, so that one layer's matrices are held at a time, beside the activations.

    Attributes:
        scale: of the Gram matrices' off-diagonal elements; less is nearer to the mean.
    """

    name: ClassVar[str] = "regmean"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = False

    scale: float = 0.9

    def __post_init__(self) -> None:
        require_share(self.name, "scale", self.scale, low=0, high=1)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        assert models.calibration is not None
        calibration = models.calibration
        lanes = [Lane(_Weights(models, model), inputs) for model, inputs in enumerate(calibration.inputs)]
        layers = calibration.network.walker.layers
        fitted = set()
        for layer, inputs in calibration.network.walker.walk(lanes):
            if layer.weight not in models.names:
                continue
            pairs = []
            for lane, x in zip(lanes, inputs, strict=True):
                weight = lane.weights[layer.weight]
                own = weight[0].numel()  # inputs of a group; a bias would stand behind them
                rows = layer.rows(x, weight)[:, :, :own].double()
                gram = rows.transpose(1, 2) @ rows
                pairs.append((weight.double().reshape(len(gram), -1, own), self._shrunk(gram)))
            yield Piece(layer.weight, 0, regression_mean(pairs).reshape(-1).float())
            fitted.add(layer.weight)
            progress(len(fitted) / (len(layers) + 1))
        rest = [name for name in weight_names(models) if name not in fitted]
        mean = lambda _name, _start, parts: running_mean(parts)  # noqa: E731
        yield from elementwise(models, mean, lambda _: None, vectors=False, names=rest)

    def _shrunk(self, gram: Tensor) -> Tensor:
        return self.scale * gram + (1 - self.scale) * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return 4 * sum(sizes) + 8 * max(sizes, default=0) * (2 * count + 4)


def regression_mean(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ W·G · (Σ G)⁻¹ of pairs (W [g, o, d], G [g, d, d]), float64; where no input says anything, the mean of the W."""
    gram = torch.stack([g for _, g in pairs]).sum(0)
    target = torch.stack([w @ g for w, g in pairs]).sum(0)
    floor = DEAD * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(DEAD)[:, None, None]
    mean = torch.stack([w for w, _ in pairs]).mean(0)
    ridged = gram + floor * torch.eye(gram.shape[1], dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(ridged, (target + floor * mean).transpose(1, 2)).transpose(1, 2)
    return solved


class _Weights(Mapping[str, Tensor]):
    """One model's tensors, read when the network asks for them."""

    def __init__(self, models: Models, model: int) -> None:
        self._models, self._model = models, model

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._models.names:
            raise KeyError(name)
        return self._models.weights(self._model, name, 0, size_of(self._models, name)).view(self._models.shape(name))

    def __contains__(self, name: object) -> bool:
        return name in self._models.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._models.names)

    def __len__(self) -> int:
        return len(self._models.names)
