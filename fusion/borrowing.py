"""How much another task's samples count in tuning a head: same classes, another domain (UOWQ, arXiv 2601.10779).

Equation (12), w = 1/(1 + N·t), with heads as the parameters. The family is softmax regression on the features after
the fold. Adding a constant to all classes changes nothing, so a head has (classes − 1)·(width + 1) parameters; but a
ridge on few inputs uses fewer: `Fit.freedom` of them a class. That is d.
"""

from __future__ import annotations

from torch import Tensor

from foldd.fusion.fisher import Parameters, fisher_products
from foldd.fusion.heads import Fit
from foldd.fusion.state import HeadTensors
from foldd.fusion.transfer_weights import source_weight


def sample_weight(target: HeadTensors, source: HeadTensors, fit: Fit, samples: int) -> float:
    """w of one sample of the source beside 1 of the target: above 0, and 1 where the heads decide alike.

    The Fisher information is the target's, on its own inputs; classes have the probabilities that its head gives them.

    Args:
        target, source: both heads, each tuned on its own samples alone; of the same classes.
        fit: that of the target.
        samples: N of the source.
    """
    parameters = _parameters(target)
    theirs = _parameters(source)
    direction = {name: theirs[name] - tensor for name, tensor in parameters.items()}
    (distance,) = fisher_products(_logits, parameters, [direction], fit.features).diagonal().tolist()
    dimension = max(1, len(target.bias) - 1) * fit.freedom
    return source_weight(samples, distance / dimension)


def _parameters(head: HeadTensors) -> Parameters:
    return {"weight": head.weight.double(), "bias": head.bias.double()}


def _logits(parameters: Parameters, features: Tensor) -> Tensor:
    return features @ parameters["weight"].T + parameters["bias"]
