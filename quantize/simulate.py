"""What a quantized network computes, in torch: integers are simulated by rounded floats."""

from __future__ import annotations

import torch
from torch import Tensor

from foldd.base.folded import FoldedNetwork
from foldd.base.lazy import Lazy, over
from foldd.core.quantized import QuantizedModel
from foldd.quantize.hdrq import PIECE
from foldd.quantize.places import find_places
from foldd.quantize.reconstruct import Ranges, Stretch


@torch.no_grad()
def simulated_features(network: FoldedNetwork, model: QuantizedModel, inputs: Tensor) -> Tensor:
    """Inputs [n, …] → features [n, width] of the quantized network."""
    weights = over(
        Lazy(model.weights, lambda name: torch.from_numpy(model.weights[name].values())),
        Lazy(model.floats, lambda name: torch.from_numpy(model.floats[name])),
    )
    stretch = Stretch(network, network.entry, network.body, Ranges(find_places(network), model.activations))
    return torch.cat([stretch.run(piece, weights) for piece in torch.split(inputs, PIECE)])
