"""Walking through a captured network node by node, several sets of weights side by side.

`Base.features` runs a network as a whole. Here the caller stops at each affine layer, sees what every network feeds
into it, and may change a layer before it is computed: what comes behind then sees the change. Nothing but the
activations that are still needed is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from foldd.base.folded import dead_after, tensor_of
from foldd.base.layers import AffineLayer


@dataclass
class Lane:
    """One network on its way: weights by canonical name, looked up when a node needs them, and inputs [n, …].

    A walk takes the inputs away, so that they are gone when no node needs them any more.
    """

    weights: Mapping[str, Tensor]
    inputs: Tensor
    features: Tensor | None = None  # [n, width], when the walk is over
    values: dict[Node, Any] = field(default_factory=dict)


class Walker:
    """Runs a captured feature network on lanes."""

    def __init__(self, module: GraphModule, layers: Sequence[AffineLayer]) -> None:
        self.layers = tuple(layers)
        self._module = module
        self._layer_of = {layer.node: layer for layer in layers}
        self._nodes = list(module.graph.nodes)
        self._dead_after = dead_after(self._nodes)

    @torch.no_grad()
    def walk(self, lanes: Sequence[Lane]) -> Iterator[tuple[AffineLayer, list[Tensor]]]:
        """Yields each affine layer with each lane's inputs to it, as the graph has them, before it is computed.

        Changes to a lane's weights between two yields count for all that is computed afterwards.
        """
        for node in self._nodes:
            if node.op == "output":
                for lane in lanes:
                    (result,) = torch.utils._pytree.tree_leaves(map_arg(node.args[0], lane.values.__getitem__))
                    lane.features, lane.values = result, {}
                return
            layer = self._layer_of.get(node.name)
            if layer is not None:
                yield layer, [lane.values[node.args[0]] for lane in lanes]
            for lane in lanes:
                self._run(node, lane)
                if node.op == "placeholder":
                    lane.inputs = lane.inputs.new_empty(0)
                for dead in self._dead_after.get(node, ()):
                    lane.values.pop(dead, None)

    def gradients(
        self,
        weights: Mapping[str, Tensor],
        inputs: Tensor,
        objective: Callable[[Tensor], Tensor],
        take: Callable[[AffineLayer, Tensor], None],
    ) -> None:
        """Hands over ∂objective/∂(a layer's output), as the graph has it, for each affine layer that one reaches.

        As soon as a layer's is known, the last layer's first: they are never held all at once.

        Args:
            objective: features [n, width] → scalar, a sum over the inputs.
        """
        lane = Lane(weights, inputs.detach().clone().requires_grad_())
        with torch.enable_grad():
            for node in self._nodes:
                if node.op == "output":
                    (features,) = torch.utils._pytree.tree_leaves(map_arg(node.args[0], lane.values.__getitem__))
                    objective(features).backward()  # type: ignore[no-untyped-call]
                    return
                self._run(node, lane)
                layer = self._layer_of.get(node.name)
                if layer is not None and lane.values[node].requires_grad:
                    lane.values[node].register_hook(partial(take, layer))
                for dead in self._dead_after.get(node, ()):
                    lane.values.pop(dead, None)

    def _run(self, node: Node, lane: Lane) -> None:
        if node.op == "placeholder":
            lane.values[node] = lane.inputs
        elif node.op == "call_function":
            arguments = map_arg(node.args, lambda n: self._value(n, lane))
            keywords = map_arg(node.kwargs, lambda n: self._value(n, lane))
            assert callable(node.target)
            lane.values[node] = node.target(*arguments, **keywords)
        elif node.op != "get_attr":
            raise AssertionError(f"a captured network has no {node.op} nodes")

    def _value(self, node: Node, lane: Lane) -> Any:
        return tensor_of(node, self._module, lane.weights) if node.op == "get_attr" else lane.values[node]
