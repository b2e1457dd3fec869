"""Cutting a captured network at its feature output: what follows it (the base's own head) is left out."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from foldd.base.load import capture, input_shape_of
from foldd.core.errors import BadSetup

_LINEAR = "aten.linear.default"


def cut_at_features(program: ExportedProgram, *, features: str = "", head: str = "") -> ExportedProgram:
    """A program that maps inputs [n, …] to features [n, width] and holds no tensor that this does not need.

    Args:
        features: name of a graph node, or of the submodule whose output is the feature output.
        head: name of the linear layer whose input is the feature output. With neither, the output itself is.

    Raises:
        BadSetup: `no-features` where the name is not found, `bad-features` where the shape is not [n, width].
    """
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    node = _find(module, features, head)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not isinstance(value.shape[1], int):
        shape = list(value.shape) if isinstance(value, torch.Tensor) else "no tensor"
        raise BadSetup(
            "bad-features",
            f"The feature output {node.name} is {shape}, expected [batch, width].",
            remedy="Pool and flatten the features inside the network, and name that output.",
        )
    for output in [n for n in module.graph.nodes if n.op == "output"]:
        module.graph.erase_node(output)
    # After the last node: everything the features need stands before them, the rest is dead and goes.
    module.graph.output(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return capture(_plain(module), input_shape_of(program))


def _plain(module: GraphModule) -> GraphModule:
    """The same graph as a module of its own: with its new output, and only the tensors that it reads."""
    fresh = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            fresh.output(copies[node.args[0]])
        else:
            copies[node] = fresh.node_copy(node, lambda n: copies[n])
    return GraphModule(module, fresh)


def _find(module: GraphModule, features: str, head: str) -> Node:
    nodes = list(module.graph.nodes)
    if features:
        named = [n for n in nodes if n.name == features]
        inside = [n for n in nodes if n.op == "call_function" and features in _modules_of(n)]
        if not (found := named or inside):
            raise BadSetup(
                "no-features",
                f"The base has no node and no submodule {features!r}.",
                remedy=f"Its submodules end with: {', '.join(_submodules(nodes)[-6:])}.",
            )
        node = found[-1]
        assert isinstance(node, Node)
        return node
    if head:
        for node in nodes:
            if str(node.target) == _LINEAR and node.args[1].target == f"{head}.weight":
                source = node.args[0]
                assert isinstance(source, Node)
                return source
        linear = [str(n.args[1].target).removesuffix(".weight") for n in nodes if str(n.target) == _LINEAR]
        raise BadSetup(
            "no-features",
            f"The base has no linear layer {head!r}.",
            remedy=f"Its linear layers end with: {', '.join(linear[-5:]) or '(none)'}.",
        )
    output = nodes[-1].args[0]
    outputs = [n for n in torch.utils._pytree.tree_leaves(output) if isinstance(n, Node)]
    if len(outputs) != 1:
        raise BadSetup(
            "no-features",
            f"The base has {len(outputs)} outputs.",
            remedy="Name the feature output with `features`, or the head layer with `head`.",
        )
    source = outputs[0]
    assert isinstance(source, Node)
    return source


def _modules_of(node: Node) -> set[str]:
    stack = node.meta.get("nn_module_stack", {})
    return {str(entry[0]).removeprefix("L['self'].") for entry in stack.values()}


def _submodules(nodes: list[Node]) -> list[str]:
    seen: dict[str, None] = {}
    for node in nodes:
        for name in sorted(_modules_of(node)):
            if name:
                seen[name] = None
    return list(seen)
