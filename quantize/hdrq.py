"""HDRQ: post-training quantization that leaves models fit to be merged (Shin et al., ICML 2025).

Weights are rounded so that each block gives what the float one gave, under noise in place of rounding, which flattens
the loss around them (equations 8, 9), and under a pull towards θ⁰, which keeps models that are quantized apart near
each other (equation 10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foldd.base.blocks import Block, batch_axis, find_blocks
from foldd.base.folded import FoldedLayer, FoldedNetwork
from foldd.base.lazy import over
from foldd.core.quantized import ActivationRange, QuantizedModel, QuantizedTensor
from foldd.quantize.descent import Descent
from foldd.quantize.latent import Latent, Rounding
from foldd.quantize.places import Place, find_places
from foldd.quantize.reconstruct import Ranges, Stretch, reconstruct
from foldd.quantize.steps import best_step, nearest_codes

Progress = Callable[[float], None]
PIECE = 64  # inputs at a time where nothing is learned: bounds the activations
FIRST_BITS = 8  # of the first layer, weights and input, whatever the others have


@dataclass(frozen=True)
class Hdrq:
    """How a model is quantized.

    Attributes:
        weight_bits: 2 … 8.
        activation_bits: None for weights only.
        per_channel: one step for each output channel, which costs nothing in onnxruntime; the paper has one a tensor.
        noise: equation 9; without it weights are rounded really from the start.
        pull: λ of the distance to θ⁰.
        descent: of the reconstruction; None rounds to the nearest.
        layer_by_layer: reconstructs each layer by itself, blocks or not.
    """

    name: ClassVar[str] = "hdrq"
    weight_bits: int = 8
    activation_bits: int | None = 8
    per_channel: bool = True
    noise: bool = True
    pull: float = 5e-2
    descent: Descent | None = field(default_factory=lambda: Descent(100))
    layer_by_layer: bool = False

    def rounding(self, weight: Tensor, step: Tensor, bits: int, base: Tensor | None) -> Rounding:
        """How one weight is rounded; other schemes put their own here."""
        return Latent(weight, step, bits, base=base, noise=self.noise, pull=self.pull)

    def step(self, weight: Tensor, bits: int) -> Tensor:
        """A weight's step before anything is learned."""
        return best_step(weight, bits, per_channel=self.per_channel)

    def bits_of(self, network: FoldedNetwork, layer: FoldedLayer) -> int:
        return FIRST_BITS if layer == network.layers[0] else self.weight_bits

    def quantize(
        self,
        network: FoldedNetwork,
        weights: Mapping[str, Tensor],
        base: Mapping[str, Tensor] | None,
        ranges: Mapping[str, ActivationRange],
        inputs: Tensor | None,
        *,
        seed: int,
        progress: Progress = lambda _: None,
    ) -> QuantizedModel:
        """Quantizes a network.

        Args:
            weights: of the network with its norms folded, float32; read one block at a time.
            base: θ⁰'s, the same names; None for no pull.
            ranges: of activations by place, to start from; empty for weights only.
            inputs: calibration inputs [n, …]; without them weights are rounded to the nearest.
            seed: of everything that is drawn.
        """
        run = _Run(self, network, weights, base, ranges, torch.Generator().manual_seed(seed))
        if inputs is None or self.descent is None:
            for layer in network.layers:
                run.round_nearest(layer)
        else:
            run.reconstruct(inputs, progress)
        return run.result()


def as_shipped(weight_bits: int, activation_bits: int | None, iterations: int) -> Hdrq:
    """For an artifact that is served and never merged: rounding is real from the start, and nothing pulls to θ⁰.

    Noise and pull buy fitness for merging with accuracy (docs/quantization.md has the figures), and foldd merges in
    float, or in integers that it rounds itself.
    """
    descent = Descent(iterations) if iterations else None
    return Hdrq(weight_bits, activation_bits, noise=False, pull=0.0, descent=descent)


def as_published(weight_bits: int, activation_bits: int | None, iterations: int = 20_000, rate: float = 1e-3) -> Hdrq:
    """With the paper's settings: steps per tensor, rate 1e-3 (the authors' code: 1e-4), the last 3,500 of 20,000 real.

    λ = 5e-2 is absolute, as printed. Steps are learned as logarithms: the published rate of 1e-3 for a step itself
    would be many times the step at 8 bits; that of activations, 4e-5, is about 4e-3 of theirs.
    """
    descent = Descent(iterations, rate=rate, in_steps=False, range_rate=4e-3) if iterations else None
    return Hdrq(weight_bits, activation_bits, per_channel=False, noise=True, pull=5e-2, descent=descent)


class _Run:
    """One quantization: what was rounded so far."""

    def __init__(
        self,
        how: Hdrq,
        network: FoldedNetwork,
        weights: Mapping[str, Tensor],
        base: Mapping[str, Tensor] | None,
        ranges: Mapping[str, ActivationRange],
        generator: torch.Generator,
    ) -> None:
        self._how, self._network, self._weights, self._base = how, network, weights, base
        self._places: tuple[Place, ...] = find_places(network) if ranges else ()
        self._ranges = Ranges(self._places, ranges)
        self._generator = generator
        self._done: dict[str, QuantizedTensor] = {}
        self._losses: dict[str, tuple[float, float]] = {}

    def round_nearest(self, layer: FoldedLayer) -> None:
        weight, bits = self._weights[layer.weight], self._how.bits_of(self._network, layer)
        step = self._how.step(weight, bits)
        self._done[layer.weight] = QuantizedTensor(nearest_codes(weight, step, bits).numpy(), step.numpy(), bits)

    def reconstruct(self, inputs: Tensor, progress: Progress) -> None:
        blocks = find_blocks(self._network)
        through_float = through_quantized = inputs
        total, before = len(self._network.layers), 0
        for block in blocks:
            stretch = Stretch(self._network, block.entry, block.nodes, self._ranges)
            plain = Stretch(self._network, block.entry, block.nodes, Ranges((), {}))
            with torch.no_grad():
                targets = _pieces(plain, through_float, self._weights)

            def report(fraction: float, before: int = before, count: int = len(block.layers)) -> None:
                progress((before + fraction * count) / total)

            if block.together and not self._how.layer_by_layer:
                self._learn(stretch, block.layers, through_quantized, through_float, targets, report)
            else:
                self._layer_by_layer(block, through_quantized, through_float, report)
            with torch.no_grad():
                through_quantized = _pieces(stretch, through_quantized, self._rounded(block.layers))
            through_float = targets
            before += len(block.layers)

    def _learn(
        self,
        stretch: Stretch,
        layers: tuple[FoldedLayer, ...],
        quantized: Tensor,
        plain: Tensor,
        targets: Tensor,
        progress: Progress,
    ) -> None:
        descent = self._how.descent
        assert descent is not None
        held = {name: self._weights[name] for layer in layers for name in (layer.weight, layer.bias) if name}
        roundings = {}
        for layer in layers:
            bits, weight = self._how.bits_of(self._network, layer), held[layer.weight]
            base = None if self._base is None else self._base[layer.weight]
            roundings[layer.weight] = self._how.rounding(weight, self._how.step(weight, bits), bits, base)
        losses = reconstruct(
            stretch, layers, roundings, over(held, self._weights), quantized, plain, targets, descent,
            self._generator, progress,
        )  # fmt: skip
        self._losses[layers[-1].weight] = losses
        for name, rounding in roundings.items():
            self._done[name] = rounding.result()

    def _layer_by_layer(self, block: Block, quantized: Tensor, plain: Tensor, progress: Progress) -> None:
        """A stretch of many layers without a cut: each against its own float output, on what reaches it."""
        no_ranges = Ranges((), {})
        for i, layer in enumerate(block.layers):
            until = block.nodes[: block.nodes.index(layer.source) + 1] if layer.source in block.nodes else ()
            alone = Stretch(self._network, layer.source, (layer.node,), self._ranges)
            with torch.no_grad():
                reached = quantized, plain
                if until:
                    walk = Stretch(self._network, block.entry, until, self._ranges)
                    still = Stretch(self._network, block.entry, until, no_ranges)
                    axis = batch_axis(layer.source)  # tokens may come first; what a linear layer does is the same
                    reached = (
                        _pieces(walk, quantized, self._rounded(block.layers[:i]), axis).movedim(axis, 0),
                        _pieces(still, plain, self._weights, axis).movedim(axis, 0),
                    )
                targets = _pieces(
                    Stretch(self._network, layer.source, (layer.node,), no_ranges), reached[1], self._weights
                )
            self._learn(
                alone, (layer,), *reached, targets,
                lambda fraction, i=i: progress((i + fraction) / len(block.layers)),  # type: ignore[misc]
            )  # fmt: skip

    def _rounded(self, layers: tuple[FoldedLayer, ...]) -> Mapping[str, Tensor]:
        done = {layer.weight: torch.from_numpy(self._done[layer.weight].values()) for layer in layers}
        return over(done, self._weights)

    def result(self) -> QuantizedModel:
        how, ranges = self._how, self._ranges.result()
        report: dict[str, Any] = {
            "weight_bits": how.weight_bits, "activation_bits": how.activation_bits if ranges else None,
            "layers": len(self._done),
            "iterations": 0 if how.descent is None or not self._losses else how.descent.iterations,
            "losses": {name: list(pair) for name, pair in self._losses.items()},
        }  # fmt: skip
        floats = {name: self._weights[name].numpy() for name in self._weights if name not in self._done}
        activations = {key: ranges[place.key] for place in self._places for key in place.keys if place.key in ranges}
        return QuantizedModel(dict(self._done), floats, activations, report)


def _pieces(stretch: Stretch, inputs: Tensor, weights: Mapping[str, Tensor], axis: int = 0) -> Tensor:
    """What comes out for all inputs, `PIECE` at a time; `axis`: along which it holds them."""
    return torch.cat([stretch.run(piece, weights) for piece in torch.split(inputs, PIECE)], axis)
