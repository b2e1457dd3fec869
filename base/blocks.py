"""Cutting a network into blocks that can be looked at one after the other.

A cut is a place where a single activation crosses the graph: parameters and sizes do not count. So a block begins with
one value and ends with one, a residual connection lies inside, and no names need to be known. The value is a tensor
with the batch as its first axis, so that inputs can be drawn from what a block gave: the halves of a split value are no
cut, and neither is a sequence whose tokens come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor
from torch.fx import Node

from foldd.base.folded import FoldedLayer, FoldedNetwork

MAX_LAYERS = 8  # a longer stretch without a cut is taken layer by layer


@dataclass(frozen=True)
class Block:
    """A stretch of the graph from one value to one value.

    Attributes:
        entry: the node whose value goes in; not among `nodes`.
        nodes: what the block computes, in order; the last one is what comes out.
        layers: of these, each with a weight.
        together: whether the layers are few enough to be reconstructed as one; otherwise each by itself.
    """

    entry: Node
    nodes: tuple[Node, ...]
    layers: tuple[FoldedLayer, ...]
    together: bool = True

    @property
    def exit(self) -> Node:
        return self.nodes[-1]


def find_blocks(network: FoldedNetwork) -> tuple[Block, ...]:
    """The blocks in their order: from the input to the features, each node in exactly one, each with a weight.

    What follows a block without a weight of its own (a ReLU, a pooling) belongs to it; what comes before the first
    weight belongs to the first block.
    """
    moving = [node for node in network.nodes if network.is_activation(node)]
    pieces: list[list[Node]] = [[]]
    for node, alone in zip(moving[1:], _alone(moving)[1:], strict=True):
        pieces[-1].append(node)
        if alone and _batch_first(node, moving[0]):
            pieces.append([])
    if not pieces[-1]:
        pieces.pop()
    layers = {layer.node: layer for layer in network.layers}
    joined: list[list[Node]] = []
    for piece in pieces:
        weightless = not any(node in layers for node in piece)
        first_waits = bool(joined) and not any(node in layers for node in joined[-1])
        if joined and (weightless or first_waits):
            joined[-1] += piece
        else:
            joined.append(list(piece))
    blocks, entry = [], moving[0]
    for piece in joined:
        inside = tuple(layers[node] for node in piece if node in layers)
        blocks.append(Block(entry, tuple(piece), inside, len(inside) <= MAX_LAYERS))
        entry = piece[-1]
    return tuple(blocks)


def batch_axis(node: Node) -> int:
    """The axis of a tensor whose length depends on how many inputs there are."""
    return next((i for i, length in enumerate(node.meta["val"].shape) if isinstance(length, SymInt)), 0)


def _batch_first(node: Node, entry: Node) -> bool:
    """Whether a node's value is a tensor with one row for each input."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim():
        return False
    rows: Any = value.shape[0]
    return isinstance(rows, SymInt) and bool(rows.node.expr == entry.meta["val"].shape[0].node.expr)


def _alone(moving: list[Node]) -> list[bool]:
    """For each activation, in order: is it the only one that is still needed once it is computed?"""
    place = {node: i for i, node in enumerate(moving)}
    last_use = [max((place[user] for user in node.users if user in place), default=len(moving)) for node in moving]
    open_until, result = -1, []
    for i in range(len(moving)):
        result.append(open_until <= i)  # nothing older is used by anything later
        open_until = max(open_until, last_use[i])
    return result
