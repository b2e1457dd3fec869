"""Block-wise reconstruction: a block with quantized weights and activations is made to give what the float one gave.

As BRECQ (Li et al., 2021) and QDrop (Wei et al., 2022): the block gets a random mixture of what the quantized and the
float blocks before it give, each activation inside is quantized or not at random, and the squared error of its output
is descended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from foldd.base.folded import FoldedLayer, FoldedNetwork
from foldd.base.lazy import over
from foldd.core.quantized import ActivationRange
from foldd.quantize.descent import Descent
from foldd.quantize.latent import Rounding
from foldd.quantize.places import Place
from foldd.quantize.steps import fake_quantize


class Ranges:
    """Activation ranges whose steps can be learned; zero points stay, so that a zero stays a zero."""

    def __init__(self, places: tuple[Place, ...], ranges: Mapping[str, ActivationRange]) -> None:
        self._of_node = {place.node: place for place in places if place.key in ranges}
        self._ranges = dict(ranges)
        self._log_steps = {key: torch.tensor(math.log(r.step), requires_grad=True) for key, r in ranges.items()}

    def at(self, node: Node, *, everywhere: bool) -> str | None:
        """The key of the range for a node's value: for all that take it, or for layers alone."""
        place = self._of_node.get(node)
        return place.key if place is not None and place.everywhere == everywhere else None

    def parameters(self, keys: set[str]) -> list[Tensor]:
        return [self._log_steps[key] for key in sorted(keys)]

    def quantize(self, key: str, values: Tensor, stays: Tensor | None = None) -> Tensor:
        """`stays`: 1 where a value stays float."""
        r = self._ranges[key]
        return fake_quantize(values, self._log_steps[key].exp(), -r.zero_point, 2**r.bits - 1 - r.zero_point, stays)

    def result(self) -> dict[str, ActivationRange]:
        return {
            key: ActivationRange(float(self._log_steps[key].detach().exp()), r.zero_point, r.bits)
            for key, r in self._ranges.items()
        }


@dataclass(frozen=True, eq=False)
class Stretch:
    """Nodes that are computed together, from one value to one value."""

    network: FoldedNetwork
    entry: Node
    nodes: tuple[Node, ...]
    ranges: Ranges

    def run(
        self, inputs: Tensor, weights: Mapping[str, Tensor], stays: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """What comes out, with activations quantized; `stays` gives for an activation 1 where it stays float."""

        def apply(key: str | None, values: Tensor) -> Tensor:
            if key is None:
                return values
            return self.ranges.quantize(key, values, None if stays is None else stays(values))

        values: dict[Node, Any] = {self.entry: inputs}
        self.network.run(
            self.nodes,
            values,
            weights,
            before=lambda layer, x: apply(self.ranges.at(layer.source, everywhere=False), x),
            after=lambda node, y: apply(self.ranges.at(node, everywhere=True), y),
            forget=True,
        )
        result: Tensor = values[self.nodes[-1]]
        return result

    def keys(self, layers: tuple[FoldedLayer, ...]) -> set[str]:
        """The ranges that are used inside."""
        used = {self.ranges.at(layer.source, everywhere=False) for layer in layers}
        used |= {self.ranges.at(node, everywhere=True) for node in self.nodes}
        return {key for key in used if key is not None}


def reconstruct(
    stretch: Stretch,
    layers: tuple[FoldedLayer, ...],
    roundings: Mapping[str, Rounding],
    weights: Mapping[str, Tensor],
    quantized_inputs: Tensor,
    float_inputs: Tensor,
    targets: Tensor,
    descent: Descent,
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> tuple[float, float]:
    """Learns roundings and ranges of a stretch; returns the loss of the first and of the last step.

    Args:
        roundings: of the stretch's weights, by name.
        weights: the float ones, for everything else.
        quantized_inputs, float_inputs: what the quantized and the float network feed it, [n, …].
        targets: what the float stretch gives, [n, …].
    """
    groups = [group for rounding in roundings.values() for group in rounding.parameters(descent)]
    groups += [{"params": [p], "lr": descent.range_rate} for p in stretch.ranges.parameters(stretch.keys(layers))]
    optimiser = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: descent.factor(i))
    channel = 1 if targets.dim() == 4 else targets.dim() - 1
    real_from = descent.iterations - round(descent.iterations * descent.real)

    def stays(values: Tensor) -> Tensor:
        return torch.rand(values.shape, dtype=values.dtype, generator=generator).lt_(descent.drop)

    first = last = float("nan")
    for i in range(descent.iterations):
        index = torch.randint(len(targets), (min(descent.batch, len(targets)),), generator=generator)
        inputs = float_inputs[index]
        inputs = torch.lerp(quantized_inputs[index], inputs, stays(inputs))
        done = i / descent.iterations
        drawn = {
            name: rounding.weight(done, real=i >= real_from, generator=generator)
            for name, rounding in roundings.items()
        }
        output = stretch.run(inputs, over(drawn, weights), stays)
        error = (output - targets[index]).square().sum(channel).mean()
        loss = error + sum(rounding.penalty(done) for rounding in roundings.values())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        last = float(error.detach())
        first = last if i == 0 else first
        progress((i + 1) / descent.iterations)
    return first, last
