"""Moving a head after features that moved: ridge regression of its logits, shrunk to the head, in closed form.

A head W·f + b was made for features that a fold has changed. On inputs at hand it is known what it should say (its
teacher's logits) and what it says now. Head and teacher being linear in the features, the ridge from new features to
old ones, shrunk to the identity, and the ridge from new features to old logits, shrunk to the head, give the same
head; the second needs no matrix of the features' size. With a few dozen inputs for hundreds of directions all is in
the shrinking: the inputs' mean shift is taken back almost whole, other directions as far as inputs speak for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.fusion.state import HeadTensors

_FLOOR = 1e-12  # of the features' energy: a single input, or inputs that all give the same features


@dataclass(frozen=True, eq=False)
class Fit:
    """Features at hand, made ready to move any number of heads; all float64.

    Attributes:
        features: as they are now, [n, width].
        mean: of the features, [width].
        directions: [n, width]: how the weights of a class move for each input whose logit is one too low.
        shift: part of the mean shift of the logits that is taken back.
        weights: how much each input counts, [n]; None where all count 1.
    """

    features: Tensor
    mean: Tensor
    directions: Tensor
    shift: float
    weights: Tensor | None = None

    def move(self, head: HeadTensors, targets: Tensor, share: float = 1.0) -> HeadTensors:
        """The head that says `targets` [n, classes] on the features, as far as the pull to `head` allows.

        It minimises Σ w·‖(W + D)·f + b + e − t‖² + pull·(g·‖D‖² + ‖b + e + D·f̄ − b‖²/width) over D and e, with w an
        input's weight, f̄ the mean of the features and g the mean energy of one: the mean shift is a feature that has
        the energy of all the others.

        Args:
            targets: what the head should say, in logits.
            share: how much of the change is made; 0 is the head as it was.
        """
        weight, bias = head.weight.double(), head.bias.double()
        missed = targets.double() - (self.features @ weight.T + bias)
        shift = _mean(missed, self.weights)
        change = share * ((missed - shift).T @ self.directions)
        lift = share * self.shift * shift - change @ self.mean
        return HeadTensors((weight + change).float(), (bias + lift).float())

    def left_out(self, head: HeadTensors, targets: Tensor) -> Tensor:
        """What `move`'s head would say of each input, were it made without that one: [n, classes], in closed form.

        An input's own part in what is said of it is its leverage h, and what is missed without it is 1/(1 − h) of what
        is missed with it (Allen 1974). Mean and energy of the features stay those of all inputs.
        """
        said = self.move(head, targets).logits(self.features)
        share = 1 / len(said) if self.weights is None else self.weights / self.weights.sum()
        leverage = self.shift * share + ((self.features - self.mean) * self.directions).sum(1)
        return targets - (targets - said) / (1 - leverage).clamp_min(_FLOOR)[:, None]


def prepare(features: Tensor, pull: float, weights: Tensor | None = None) -> Fit:
    """Prepares features [n, width] for moving heads.

    Solved among inputs and not among features, n × n: with hundreds of inputs at most, its cost does not depend on
    the network.

    Args:
        pull: how many inputs the old head's word counts as; above 0.
        weights: how much each input counts, [n], from 0 on and not all 0; all 1 where None. An input of weight 0 is
            as if it were not there, one of weight 2 as if it were there twice.
    """
    features = features.double()
    count, width = features.shape
    mean = _mean(features, weights)
    centred = features - mean
    if weights is None:
        total, rows = float(count), centred
    else:
        total, rows = float(weights.sum()), centred * weights.sqrt()[:, None]
    products = rows @ rows.T
    energy = float(products.diagonal().sum()) / total / width  # of one feature, in the mean
    products.diagonal().add_(pull * max(energy, _FLOOR))
    directions = torch.linalg.solve(products, rows)
    if weights is not None:
        directions *= weights.sqrt()[:, None]
    return Fit(features, mean, directions, 1 / (1 + pull / (total * width)), weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(0) if weights is None else weights @ values / weights.sum()


def urge(logits: Tensor, labels: Tensor, step: float) -> Tensor:
    """Logits [n, classes], moved to what labels [n] say: a step down the cross-entropy's gradient; float64.

    Where the teacher is right and sure nothing changes, and however wrong it is, no logit moves by more than the step.

    Args:
        step: in units of the logits' spread over classes.
    """
    logits = logits.double()
    truth = F.one_hot(labels, logits.shape[1]).double()
    return logits + step * spread(logits) * (truth - logits.softmax(1))


def spread(logits: Tensor) -> float:
    """Root mean square of logits [n, classes] about each input's mean: what they have to tell classes apart with."""
    return float((logits.double() - logits.double().mean(1, keepdim=True)).square().mean().sqrt())


def moved(old: HeadTensors, new: HeadTensors, features: Tensor) -> float:
    """How far a head moved: the spread of its logits' change on features [n, width], as a share of their spread."""
    before, after = (head.logits(features.double()) for head in (old, new))
    scale = spread(before)
    return spread(after - before) / scale if scale else 0.0
