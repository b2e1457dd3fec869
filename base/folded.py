"""The feature network with its BatchNorms folded, run piece by piece: what quantizing and the export see of it.

The weights that it takes have the names and shapes of `fold_norms`' result, which are the skeleton's initializers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from foldd.base.batch_norm import FoldedNorm, fold_graph

LINEAR, CONVOLUTION = "aten.linear.default", "aten.conv2d.default"


@dataclass(frozen=True)
class FoldedLayer:
    """y = W·x + b: a linear layer or a two-dimensional convolution with a weight of its own.

    Attributes:
        node: the graph node that computes it.
        weight, bias: names of its tensors; `bias` is None where it has none.
    """

    node: Node
    weight: str
    bias: str | None

    @property
    def is_convolution(self) -> bool:
        return str(self.node.target) == CONVOLUTION

    @property
    def source(self) -> Node:
        """The node whose value the layer takes."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source


class FoldedNetwork:
    """A captured network without BatchNorms behind convolutions."""

    def __init__(self, module: GraphModule) -> None:
        """Takes a captured feature network, which stays as it is. It is copied and folded when somebody asks."""
        self._captured = module

    @cached_property
    def _folded(self) -> tuple[GraphModule, tuple[FoldedNorm, ...]]:
        module = copy.deepcopy(self._captured)
        return module, fold_graph(module)

    @property
    def module(self) -> GraphModule:
        return self._folded[0]

    @property
    def rules(self) -> tuple[FoldedNorm, ...]:
        return self._folded[1]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self.module.graph.nodes)

    @cached_property
    def _moving(self) -> set[Node]:
        return _dependent(self.nodes)

    @cached_property
    def layers(self) -> tuple[FoldedLayer, ...]:
        """In the order of the graph."""
        found = []
        for node in self.nodes:
            if node.op != "call_function" or str(node.target) not in (LINEAR, CONVOLUTION):
                continue
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            if any(not is_own(t) for t in (weight, bias) if t is not None) or node.args[0] not in self._moving:
                continue
            found.append(FoldedLayer(node, _name(weight), None if bias is None else _name(bias)))
        return tuple(found)

    @property
    def entry(self) -> Node:
        return next(node for node in self.nodes if node.op == "placeholder")

    @property
    def exit(self) -> Node:
        """The node whose value is the features."""
        output = next(node for node in self.nodes if node.op == "output")
        (result,) = output.all_input_nodes
        return result

    @property
    def body(self) -> tuple[Node, ...]:
        """All that is computed between the input and the features, which come last."""
        return tuple(n for n in self.nodes[: self.nodes.index(self.exit) + 1] if n.op == "call_function")

    def is_activation(self, node: Node) -> bool:
        """Whether its value is a tensor that depends on the network's inputs."""
        return node in self._moving

    def run(
        self,
        nodes: Iterable[Node],
        values: dict[Node, Any],
        weights: Mapping[str, Tensor],
        *,
        before: Callable[[FoldedLayer, Tensor], Tensor] | None = None,
        after: Callable[[Node, Tensor], Tensor] | None = None,
        forget: bool = False,
    ) -> None:
        """Computes nodes in their order into `values`, which holds what they take from outside, batch first.

        Args:
            weights: looked up when a layer needs one.
            before: may change what a layer takes, only for that layer.
            after: may change what a node gives, for all that take it.
            forget: drops each value behind the last node that takes it; the last node's stays. Activations of a whole
                network are many times its weights.
        """
        nodes = tuple(nodes)
        dead = dead_after(nodes) if forget else {}
        batch = len(next(iter(values.values())))
        layers = {layer.node: layer for layer in self.layers} if before is not None else {}
        for node in nodes:
            if node not in self._moving or node in values:
                continue  # what does not depend on the inputs is computed where it is needed
            layer, taken = layers.get(node), values
            if layer is not None and before is not None:
                taken = {**values, layer.source: before(layer, values[layer.source])}
            result = self._compute(node, taken, weights, batch)
            values[node] = after(node, result) if after is not None else result
            for gone in dead.get(node, ()):
                values.pop(gone, None)

    def _compute(self, node: Node, values: Mapping[Node, Any], weights: Mapping[str, Tensor], batch: int) -> Any:
        def value(argument: Node) -> Any:
            if argument in values:
                return values[argument]
            if argument.op == "get_attr":
                return tensor_of(argument, self.module, weights)
            if (size := _size(argument, batch)) is not None:
                return size
            return self._compute(argument, values, weights, batch)

        assert callable(node.target)
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def features(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Inputs [n, …] → features [n, width]."""
        values: dict[Node, Any] = {self.entry: inputs}
        self.run(self.body, values, weights, forget=True)
        result: Tensor = values[self.exit]
        return result


def _dependent(nodes: Iterable[Node]) -> set[Node]:
    """Nodes whose value is a tensor, or a group of them, that depends on the inputs; sizes do not count."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (
            node.op == "call_function"
            and any(argument in found for argument in node.all_input_nodes)
            and not isinstance(node.meta.get("val"), int | torch.SymInt)
        ):
            found.add(node)
    return found


def _size(node: Node, batch: int) -> int | None:
    """The value of a size that was captured as a formula of the batch."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return value if isinstance(value, int) else None


def dead_after(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """Node → what it takes and none of the nodes behind it does."""
    last = {taken: node for node in nodes for taken in node.all_input_nodes}
    dead: dict[Node, list[Node]] = {}
    for value, node in last.items():
        dead.setdefault(node, []).append(value)
    return dead


def tensor_of(node: Node, module: GraphModule, weights: Mapping[str, Tensor]) -> Any:
    """What a `get_attr` node gives: one of the weights, or else a constant of the graph."""
    name = _name(node)
    if name in weights:
        return weights[name]
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_own(node: object) -> bool:
    """Whether a layer's argument is a tensor of its own, which nothing else takes."""
    return isinstance(node, Node) and node.op == "get_attr" and len(node.users) == 1


def _name(node: object) -> str:
    assert isinstance(node, Node)
    return str(node.target)
