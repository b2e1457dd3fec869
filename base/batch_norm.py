"""Folding BatchNorm into the convolution before it, as a pure function of the weights.

In evaluation y = γ·(conv(x) − μ)/√(σ² + ε) + β is one convolution with weight W·γ/√(σ² + ε) and
bias (b − μ)·γ/√(σ² + ε) + β. Where it can be done is read from the graph once; it is then applied to the weights
of every generation.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node

_FOLDABLE = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


class FoldedNorm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One convolution and the BatchNorm that it swallows, by tensor name."""

    weight: str
    bias: str | None  # of the convolution before folding
    scale: str | None  # γ
    shift: str | None  # β
    mean: str
    variance: str
    epsilon: float
    folded_bias: str  # name of the bias afterwards

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that it reads."""
        names = (self.weight, self.bias, self.scale, self.shift, self.mean, self.variance)
        return tuple(name for name in names if name is not None)


def find_norms(module: GraphModule) -> list[tuple[FoldedNorm, Node, Node]]:
    """Every (rule, convolution node, BatchNorm node) that can be folded."""
    found = []
    state = set(module.state_dict(keep_vars=True))
    for norm in module.graph.nodes:
        if norm.op != "call_function" or not str(norm.target).startswith("aten.batch_norm"):
            continue
        conv = norm.args[0]
        if not isinstance(conv, Node) or not str(conv.target).startswith(_FOLDABLE) or len(conv.users) != 1:
            continue
        weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
        tensors = [weight, bias, *norm.args[1:5]]
        # A weight that a second layer shares cannot take up one layer's statistics.
        if any(t is not None and (t.op != "get_attr" or len(t.users) != 1) for t in tensors):
            continue
        names = [None if t is None else str(t.target) for t in tensors]
        assert names[0] is not None
        assert names[4] is not None
        assert names[5] is not None
        owner = names[0].removesuffix(".weight")
        folded = names[1] or f"{owner}.bias"
        if names[1] is None and folded in state:
            continue
        rule = FoldedNorm(names[0], names[1], names[2], names[3], names[4], names[5], float(norm.args[7]), folded)
        found.append((rule, conv, norm))
    return found


def fold_graph(module: GraphModule) -> tuple[FoldedNorm, ...]:
    """Takes the foldable BatchNorms out of a captured network, in place; their convolutions get a bias of zeros.

    Tensors that nothing reads any more go too. The weights that fit it are what `fold_norms` makes by the rules.
    """
    rules = []
    for rule, conv, norm in find_norms(module):
        owner, _, leaf = rule.folded_bias.rpartition(".")
        channels = norm.meta["val"].shape[1]
        parent = module.get_submodule(owner)
        setattr(parent, leaf, nn.Parameter(torch.zeros(int(channels))))
        with module.graph.inserting_before(conv):
            bias = module.graph.get_attr(rule.folded_bias)
        arguments = list(conv.args) + [None] * (3 - len(conv.args))
        arguments[2] = bias
        conv.args = tuple(arguments)
        norm.replace_all_uses_with(conv)
        module.graph.erase_node(norm)
        rules.append(rule)
    module.graph.eliminate_dead_code()
    module.recompile()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in list(module.state_dict(keep_vars=True)):
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    return tuple(rules)


def fold_norms(weights: Mapping[str, np.ndarray], rules: tuple[FoldedNorm, ...]) -> dict[str, np.ndarray]:
    """Weights of the network without the folded BatchNorms.

    Args:
        weights: canonical name → float32 array.

    Returns:
        name → float32 array; computed in float64, rounded once. Arrays that no rule touches are passed on.
    """
    result = dict(weights)
    for rule in rules:
        variance = result.pop(rule.variance).astype(np.float64)
        mean = result.pop(rule.mean).astype(np.float64)
        factor = 1.0 / np.sqrt(variance + rule.epsilon)
        if rule.scale is not None:
            factor = factor * result.pop(rule.scale)
        bias = -mean if rule.bias is None else result.pop(rule.bias) - mean
        bias = bias * factor
        if rule.shift is not None:
            bias = bias + result.pop(rule.shift)
        weight = result[rule.weight]
        shaped = factor.reshape(-1, *[1] * (weight.ndim - 1))
        result[rule.weight] = (weight * shaped).astype(np.float32)
        result[rule.folded_bias] = bias.astype(np.float32)
    return result
