"""Layers in an ONNX graph, found by their weights, and the places whose activations are quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto, helper

from foldd.base.simplify import needed
from foldd.core.errors import BadSetup
from foldd.core.quantized import ActivationRange


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer.

    Attributes:
        weight: its initializer's name.
        node: `Conv`, `Gemm`, or the `MatMul` of `MatMul(x, Transpose(weight)) + bias`, which is how the exporter writes
            a linear layer on inputs of more than two axes.
        adder: what adds the bias: `node` itself or an `Add`; none without bias.
        slot: the bias's place among the adder's inputs.
    """

    weight: str
    node: NodeProto
    adder: NodeProto | None
    slot: int

    @property
    def input(self) -> str:
        return str(self.node.input[0])

    @property
    def bias(self) -> str | None:
        """The tensor that is added."""
        return None if self.adder is None else str(self.adder.input[self.slot])

    @property
    def output(self) -> str:
        """What the layer gives, bias added."""
        return str((self.adder or self.node).output[0])

    @property
    def transposed(self) -> bool:
        """Whether the node takes the weight as [in, out]."""
        return str(self.node.op_type) == "MatMul"


class Graph:
    """An index of an ONNX graph: who makes a tensor, who takes it, and which layers there are."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[NodeProto] = list(graph.node)
        self.shapes = {str(i.name): tuple(i.dims) for i in graph.initializer}
        self.outputs = {str(o.name) for o in graph.output}
        self.maker = {str(name): node for node in self.nodes for name in node.output}
        self.takers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.takers[str(name)].append(node)
        self.layers: dict[str, list[Layer]] = defaultdict(list)
        for node in self.nodes:
            if layer := self._layer(node):
                self.layers[layer.weight].append(layer)

    def _layer(self, node: NodeProto) -> Layer | None:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return None
        weight = str(node.input[1])
        if node.op_type == "MatMul":
            transpose = self.maker.get(weight)
            if transpose is None or transpose.op_type != "Transpose":
                return None
            weight = str(transpose.input[0])
            if len(self.shapes.get(weight, ())) != 2:
                return None
            add = self.only_taker(str(node.output[0]), "Add")
            slot = 1 if add is not None and add.input[0] == node.output[0] else 0
            if add is None or self.shapes.get(str(add.input[slot])) != self.shapes[weight][:1]:
                return Layer(weight, node, None, 0)
            return Layer(weight, node, add, slot)
        if weight not in self.shapes or (node.op_type == "Gemm" and not _is_plain(node)):
            return None
        return Layer(weight, node, node if len(node.input) > 2 and node.input[2] else None, 2)

    def only_taker(self, tensor: str, kind: str) -> NodeProto | None:
        """The node that takes a tensor, if it is the only one, of that kind, and the tensor is no output."""
        takers = self.takers[tensor]
        if len(takers) == 1 and takers[0].op_type == kind and tensor not in self.outputs:
            return takers[0]
        return None

    def users(self, weight: str) -> list[NodeProto]:
        """Who reads a weight, directly or behind the transposition of a linear layer."""
        direct = self.takers[weight]
        return [user for n in direct for user in (self.takers[str(n.output[0])] if n.op_type == "Transpose" else [n])]

    def behind_relu(self, tensor: str) -> str:
        """What a ReLU makes of a tensor, where one is all that takes it; otherwise the tensor."""
        relu = self.only_taker(tensor, "Relu")
        return tensor if relu is None else str(relu.output[0])


def replace_content(graph: onnx.GraphProto, nodes: list[NodeProto], tensors: list[TensorProto]) -> None:
    """Gives a graph these nodes, in an order that computes, and initializers, less what no output needs."""
    outputs = [str(output.name) for output in graph.output]
    kept = needed(nodes, outputs)
    made = {output for node in kept for output in node.output}
    read = {name for node in kept for name in node.input}.union(outputs) - made
    used = [tensor for tensor in tensors if tensor.name in read]
    graph.ClearField("node")
    graph.node.extend(kept)
    graph.ClearField("initializer")
    graph.initializer.extend(used)


def _is_plain(gemm: NodeProto) -> bool:
    """x · weightᵀ + bias and nothing else."""
    given = {a.name: helper.get_attribute_value(a) for a in gemm.attribute}
    return given == {"transB": 1} | {k: v for k, v in (("transA", 0), ("alpha", 1.0), ("beta", 1.0)) if k in given}


@dataclass(frozen=True)
class Places:
    """Where activations are quantized.

    Attributes:
        everywhere: tensor → (place, range): all that takes it gets the quantized values.
        at_layers: weight → (place, range): only this layer's own input.
    """

    everywhere: Mapping[str, tuple[str, ActivationRange]]
    at_layers: Mapping[str, tuple[str, ActivationRange]]


def resolve(graph: Graph, activations: Mapping[str, ActivationRange]) -> Places:
    """Finds the tensors that `QuantizedModel.activations` names.

    Raises:
        BadSetup: `unknown-place` for a name that fits nothing in this graph, `two-ranges` where two places are one
            tensor and disagree.
    """
    everywhere: dict[str, tuple[str, ActivationRange]] = {}
    at_layers: dict[str, tuple[str, ActivationRange]] = {}
    for place in sorted(activations):
        weight, _, kind = place.rpartition(":")
        layers = graph.layers.get(weight, [])
        if not layers:
            raise _unknown(place, f"no convolution or linear layer of the network has a weight {weight!r}.")
        if kind == "input":
            at_layers[weight] = (place, activations[place])
            continue
        for layer in layers:
            tensor = graph.behind_relu(layer.output)
            if kind == "sum":
                tensor = graph.behind_relu(_sum(graph, place, tensor))
            elif kind != "output":
                raise _unknown(place, "places end in `:input`, `:output` or `:sum`.")
            other, known = everywhere.setdefault(tensor, (place, activations[place]))
            if known != activations[place]:
                raise BadSetup(
                    "two-ranges",
                    f"{other} and {place} are one tensor of the network, but have different ranges.",
                    remedy="Give both the same range, or leave one out.",
                )
    return Places(everywhere, at_layers)


def _sum(graph: Graph, place: str, tensor: str) -> str:
    additions = [node for node in graph.takers[tensor] if node.op_type == "Add"]
    if len(additions) != 1:
        raise _unknown(place, f"{len(additions)} additions take what the layer gives.")
    return str(additions[0].output[0])


def _unknown(place: str, why: str) -> BadSetup:
    return BadSetup(
        "unknown-place",
        f"The network has no place {place!r} to quantize.",
        why=why,
        remedy="Quantize again for this base; places are named in foldd.core.quantized.",
    )
