"""Where activations are quantized: what integer kernels take and give.

A layer in integers takes integers. A convolution must give integers too, and so must the addition behind it, or
onnxruntime computes it in float. The exception is a transformer's patches, a convolution of the input without ReLU or
addition behind it, whose output no layer takes as it is: it gains no time from integers and loses 1.6 dB. It has no
place, and only its weights are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from foldd.base.folded import FoldedNetwork

_RELU, _ADD = "aten.relu.default", "aten.add.Tensor"


@dataclass(frozen=True)
class Place:
    """One activation that is quantized.

    Attributes:
        keys: its names, as `QuantizedModel.activations` has them; one activation may be several layers' input.
        node: whose value it is.
        everywhere: whether all that takes the value takes it quantized; otherwise only the layers.
        taken: whether a layer takes it; otherwise it is there only so that integer kernels can give it.
    """

    keys: tuple[str, ...]
    node: Node
    everywhere: bool
    taken: bool

    @property
    def key(self) -> str:
        return self.keys[0]


def find_places(network: FoldedNetwork) -> tuple[Place, ...]:
    """All places, in the order of the graph."""
    keys: dict[Node, list[str]] = {}
    everywhere: set[Node] = set()
    taken = {layer.source for layer in network.layers}
    for layer in network.layers:
        output, addition = _behind_relu(layer.node), _added(network, layer.node)
        if layer.source is network.entry and output is layer.node and output not in taken and addition is None:
            continue
        keys.setdefault(layer.source, []).append(f"{layer.weight}:input")
        if not layer.is_convolution:
            continue
        keys.setdefault(output, []).append(f"{layer.weight}:output")
        everywhere.add(output)
        if output is layer.node and addition is not None:
            total = _behind_relu(addition)
            keys.setdefault(total, []).append(f"{layer.weight}:sum")
            everywhere.add(total)
    return tuple(
        Place(tuple(keys[node]), node, node in everywhere, node in taken) for node in network.nodes if node in keys
    )


def _behind_relu(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and str(users[0].target) == _RELU else node


def _added(network: FoldedNetwork, node: Node) -> Node | None:
    """The addition that takes the node's value, where it is all that does and adds another activation."""
    users = list(node.users)
    if len(users) != 1 or str(users[0].target) != _ADD:
        return None
    return users[0] if all(network.is_activation(term) for term in users[0].all_input_nodes) else None
