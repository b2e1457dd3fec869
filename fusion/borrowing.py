"""How much another task's samples count in tuning a head: same classes, another domain (UOWQ, arXiv 2601.10779).

Equation (12), w = 1/(1 + N·t) with t = (θ₁ − θ₀)ᵀJ(θ₁ − θ₀)/d, for softmax regression on the features after the fold:
θ are heads, each tuned on its own samples alone, J is the target's Fisher information.

**d** is what a head that is tuned really uses of its parameters: `effective_dimension`, with losses on the samples
themselves and on each of them left out. A head of 7 classes on 192 features has 1,158 of them. But the targets are
logits, which say more than drawn labels would, and the ridge is shrunk to the old head: d of 1 to 16 was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from foldd.fusion.fisher import Parameters, fisher_products
from foldd.fusion.heads import Fit
from foldd.fusion.state import HeadTensors
from foldd.fusion.transfer_weights import effective_dimension, source_weight


@dataclass(frozen=True, eq=False)
class Tuning:
    """How a head is moved.

    Attributes:
        old: the head before.
        fit: features [n, width] of the inputs that it is moved by.
        targets: what it should say of them, [n, classes].
    """

    old: HeadTensors
    fit: Fit
    targets: Tensor

    @cached_property
    def head(self) -> HeadTensors:
        return self.fit.move(self.old, self.targets)

    @property
    def dimension(self) -> float:
        """d: how many dimensions the move uses, at least 1; the classes have the probabilities that targets give."""
        own, held_out = (
            float(F.cross_entropy(logits, self.targets.softmax(1)))
            for logits in (self.head.logits(self.fit.features), self.fit.left_out(self.old, self.targets))
        )
        return effective_dimension(len(self.targets), own, held_out)


def sample_weight(target: Tuning, source: Tuning) -> float:
    """w of one sample of the source beside 1 of the target: above 0, and 1 where the heads decide alike.

    Both are tuned on their own samples alone, and have the same classes. The Fisher information is exact: classes have
    the probabilities that the target's head gives them.
    """
    parameters, theirs = _parameters(target.head), _parameters(source.head)
    direction = {name: theirs[name] - tensor for name, tensor in parameters.items()}
    (distance,) = fisher_products(_logits, parameters, [direction], target.fit.features).diagonal().tolist()
    return source_weight(len(source.targets), distance / target.dimension)


def _parameters(head: HeadTensors) -> Parameters:
    return {"weight": head.weight.double(), "bias": head.bias.double()}


def _logits(parameters: Parameters, features: Tensor) -> Tensor:
    return features @ parameters["weight"].T + parameters["bias"]
