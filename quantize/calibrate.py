"""Calibration: what the activations of a network look like, and the ranges that follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from foldd.base.folded import FoldedNetwork
from foldd.core.quantized import ActivationRange
from foldd.quantize.hdrq import FIRST_BITS, PIECE
from foldd.quantize.histogram import best_range, combine, observe, widest_range
from foldd.quantize.places import Place, find_places


@torch.no_grad()
def observe_network(network: FoldedNetwork, weights: Mapping[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Place → histogram of its activations over all inputs [n, …], one share of weight 1."""
    places = {place.node: place for place in find_places(network)}
    found: dict[str, Tensor] = {}
    for piece in torch.split(inputs, PIECE):
        share = len(piece) / len(inputs)

        def look(node: Node, values: Tensor, share: float = share) -> Tensor:
            if (place := places.get(node)) is not None:
                seen = observe(values)
                seen[2:] *= share
                found[place.key] = combine(found[place.key], seen) if place.key in found else seen
            return values

        look(network.entry, piece)
        network.run(network.body, {network.entry: piece}, weights, after=look, forget=True)
    return found


def add_histograms(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both together; a place that only one has seen keeps what that one has."""
    return {
        key: combine(old[key], new[key]) if key in old and key in new else (new if key in new else old)[key]
        for key in sorted({*old, *new}, key=str.encode)
    }


def choose_ranges(
    network: FoldedNetwork, histograms: Mapping[str, Tensor], bits: int, *, widest: bool = False
) -> dict[str, ActivationRange]:
    """Place → range. The network's input, and what no layer takes, have 8 bits in any case.

    Args:
        widest: from the smallest to the largest value, instead of the range of least error.
    """
    choose = widest_range if widest else best_range
    first = network.layers[0].source
    return {
        place.key: choose(histograms[place.key], bits if place.taken and place.node is not first else FIRST_BITS)
        for place in _known(network, histograms)
    }


def _known(network: FoldedNetwork, histograms: Mapping[str, Tensor]) -> list[Place]:
    return [place for place in find_places(network) if place.key in histograms]
