"""The affine layers of a captured network: y = W·x + b, with the BatchNorm behind it where there is one.

A convolution is the same on patches. Methods that look at what a layer gets and gives see all of them as one matrix
[out, in + 1] whose last column is the bias; this module translates to and from the network's own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from foldd.base.batch_norm import FoldedNorm, find_norms
from foldd.base.folded import CONVOLUTION, LINEAR, is_own

POSITIONS = 64  # rows per input, about: neighbouring places of an image are much alike, and so are its tokens


@dataclass(frozen=True)
class AffineLayer:
    """One layer. Shapes: g groups (1 but for grouped convolutions), o outputs and d inputs of a group, bias included.

    Attributes:
        node: the graph node that computes it.
        weight, bias: canonical names; `bias` is the tensor that takes up the bias, BatchNorm's shift where there is
            one, or None: then d is without bias.
        norm: the BatchNorm behind it.
        kernel: None for a linear layer; (stride, padding, dilation) of a convolution.
    """

    node: str
    weight: str
    bias: str | None
    groups: int = 1
    norm: FoldedNorm | None = None
    kernel: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None

    def is_linear(self, weight: Tensor) -> bool:
        """Whether it is a linear layer of tokens, or of the patches that it cuts an image into: a convolution whose
        stride is its kernel, as vision transformers begin."""
        size = tuple(weight.shape[2:])
        return self.kernel is None or (max(size) > 1 and self.kernel[0] == size)

    def rows(self, inputs: Tensor, weight: Tensor, positions: int = POSITIONS) -> Tensor:
        """What the layer multiplies: inputs as the graph has them → [g, rows, d], a one at the end of each row.

        Of each input about `positions` rows: a grid of an image's places, or tokens that are spread evenly, other ones
        for each input.
        """
        if self.kernel is None:
            rows = _tokens(inputs, positions)
        else:
            stride, padding, dilation = self.kernel
            kernel = tuple(weight.shape[2:])
            step = _step(
                [
                    (size + 2 * p - d * (k - 1) - 1) // s + 1
                    for size, s, p, d, k in zip(inputs.shape[2:], stride, padding, dilation, kernel, strict=True)
                ],
                positions,
            )
            patches = F.unfold(
                inputs, kernel, dilation=dilation, padding=padding, stride=tuple(step * s for s in stride)
            )  # [n, g·d, positions]
            split = patches.reshape(len(patches), self.groups, -1, patches.shape[2])
            rows = split.permute(1, 0, 3, 2).reshape(self.groups, -1, split.shape[2])
        if self.bias is None:
            return rows
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)

    def picked(self, outputs: Tensor, positions: int = POSITIONS) -> Tensor:
        """Something of the output's shape → [g, rows, o], the same rows as `rows` gives."""
        if self.kernel is None:
            return _tokens(outputs, positions)
        step = _step(outputs.shape[2:], positions)
        flat = outputs[:, :, ::step, ::step].flatten(2)
        split = flat.reshape(len(flat), self.groups, -1, flat.shape[2])
        return split.permute(1, 0, 3, 2).reshape(self.groups, -1, split.shape[2])

    def matrix(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The layer as one matrix: float64 [g, o, d], BatchNorm included."""
        weight = weights[self.weight].double()
        flat = weight.reshape(len(weight), -1)
        shift = flat.new_zeros(len(flat)) if self.bias is None else weights[self.bias].double()
        if self.norm is not None:
            factor = self._factor(weights)
            mean = weights[self.norm.mean].double()
            inner = 0.0 if self.norm.bias is None else weights[self.norm.bias].double()
            if self.norm.shift is None:  # BatchNorm without one: the convolution's own bias is the layer's
                shift, inner = flat.new_zeros(len(flat)), shift
            flat, shift = flat * factor[:, None], shift + factor * (inner - mean)
        if self.bias is not None:
            flat = torch.cat([flat, shift[:, None]], 1)
        return flat.reshape(self.groups, -1, flat.shape[1])

    def assign(self, matrix: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that make `matrix` [g, o, d] the layer, beside BatchNorm's own: name → float32.

        The inverse of `matrix` where the layer has a bias; a scale of zero is left alone, since nothing passes it.
        """
        flat = matrix.reshape(-1, matrix.shape[2])
        shift = None
        if self.bias is not None:
            flat, shift = flat[:, :-1], flat[:, -1]
        if self.norm is not None and shift is not None:
            factor, mean = self._factor(weights), weights[self.norm.mean].double()
            alive = factor.abs() > torch.finfo(torch.float32).tiny
            safe = torch.where(alive, factor, torch.ones_like(factor))
            old = weights[self.weight].double().reshape(flat.shape)
            flat = torch.where(alive[:, None], flat / safe[:, None], old)
            if self.norm.shift is None and self.norm.bias is not None:
                shift = torch.where(alive, shift / safe + mean, weights[self.norm.bias].double())
            else:
                inner = 0.0 if self.norm.bias is None else weights[self.norm.bias].double()
                shift = shift - factor * (inner - mean)
        tensors = {self.weight: flat.float().reshape(weights[self.weight].shape).contiguous()}
        if self.bias is not None and shift is not None:
            tensors[self.bias] = shift.float()
        return tensors

    def _factor(self, weights: Mapping[str, Tensor]) -> Tensor:
        assert self.norm is not None
        factor = (weights[self.norm.variance].double() + self.norm.epsilon).rsqrt()
        return factor if self.norm.scale is None else factor * weights[self.norm.scale].double()


def find_layers(module: GraphModule) -> tuple[AffineLayer, ...]:
    """The affine layers in the order of the graph: linear layers and two-dimensional convolutions with tensors of
    their own. Shared ones, transposed and other convolutions are left out: methods treat those as any tensor."""
    norms = {rule.weight: rule for rule, _, _ in find_norms(module)}
    layers = []
    for node in module.graph.nodes:
        kind = str(node.target)
        if node.op != "call_function" or kind not in (LINEAR, CONVOLUTION):
            continue
        tensors = [node.args[1], node.args[2] if len(node.args) > 2 else None]
        if any(t is not None and not is_own(t) for t in tensors):
            continue
        weight, bias = (None if t is None else str(t.target) for t in tensors)
        assert weight is not None
        if kind == LINEAR:
            layers.append(AffineLayer(node.name, weight, bias))
            continue
        stride, padding, dilation, groups = _arguments(node)
        rule = norms.get(weight)
        if rule is not None:
            bias = rule.shift or rule.bias
            if bias is None:
                continue  # a norm without any bias to put the mean into
        layers.append(AffineLayer(node.name, weight, bias, groups, rule, (stride, padding, dilation)))
    return tuple(layers)


def _arguments(node: Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    """Stride, padding, dilation and groups of a two-dimensional convolution, defaults filled in."""
    rest: list[Any] = [*node.args[3:], None, None, None, None][:4]
    stride, padding, dilation, groups = (
        default if value is None else value for value, default in zip(rest, (1, 0, 1, 1), strict=True)
    )
    return _pair(stride), _pair(padding), _pair(dilation), int(groups)


def _pair(value: Any) -> tuple[int, int]:
    sizes = list(value) if isinstance(value, list | tuple) else [value]
    return int(sizes[0]), int(sizes[-1])


def _step(sizes: Sequence[int], positions: int) -> int:
    """Of the grid of places that are looked at, along both axes of an output of this height and width."""
    return max(1, round(math.sqrt(math.prod(sizes) / positions)))


def _tokens(inputs: Tensor, positions: int) -> Tensor:
    """[n, …, d] → [1, n·min(…, positions), d]."""
    tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    count = tokens.shape[1]
    if count > positions:
        images = torch.arange(len(tokens))[:, None]
        tokens = tokens[images, (torch.arange(positions) * count // positions + images) % count]
    return tokens.reshape(1, -1, inputs.shape[-1])
