"""The base network as the methods see it: canonical weights and a pure feature function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from foldd.base.folded import FoldedNetwork
from foldd.base.walk import Walker
from foldd.core.base_spec import BaseSpec
from foldd.core.roles import Role

FeatureFunction = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Base:
    """The frozen pre-trained network θ⁰.

    Attributes:
        spec: names, shapes, roles and digest of the tensors.
        weights: canonical name → float32 tensor, statistics included; counters and the head are left out. Of a base
            in a state directory they stay in the file, and each access reads one anew.
        features: (weights, inputs [n, *input_shape]) → features [n, width], a pure function that is
            differentiable in the weights. `weights` must have the keys of `Base.weights`.
        walker: the same network, layer by layer, for methods that look inside.
        folded: the same network with its BatchNorms folded, as quantizing and the export see it.
    """

    spec: BaseSpec
    weights: Mapping[str, Tensor]
    features: FeatureFunction
    walker: Walker
    folded: FoldedNetwork

    def role(self, name: str) -> Role:
        return self.spec.tensors[name].role
