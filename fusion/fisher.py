"""Inner products of directions in parameter space under a network's Fisher information: ΘᵀJΘ, never J.

J is a mean of outer products of per-sample gradients g of log p(class | input), so ΘᵀJΘ needs only Θᵀg: one number for
each sample and direction. And as log p depends on the parameters through the logits alone, Θᵀg is a product of what
the logits do along Θ, one forward-mode derivative for each direction, with the softmax's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foldd.core.errors import BadSetup
from foldd.fusion.batches import FORWARD_BATCH
from foldd.fusion.transfer_weights import Matrix

Parameters = Mapping[str, Tensor]
Logits = Callable[[Parameters, Tensor], Tensor]  # (parameters, inputs [n, …]) → logits [n, classes]


def fisher_products(
    logits: Logits,
    parameters: Parameters,
    directions: Sequence[Parameters],
    inputs: Tensor,
    labels: Tensor | None = None,
) -> Matrix:
    """ΘᵀJΘ, [K, K] in float64, symmetric and positive semi-definite.

    With labels J is the empirical Fisher information (arXiv 2601.10779, algorithm 1, line 9). Without, the classes have
    the probabilities that the network itself gives them, and the expectation over them is exact: nothing is drawn.

    Args:
        parameters: where J is taken; floating-point tensors.
        directions: K columns of Θ, each with the names of `parameters`.
        inputs: [n, …].
        labels: [n], integers.

    Raises:
        BadSetup: `no-forward-derivative` where torch cannot differentiate an operation of the network so.
    """
    total = np.zeros((len(directions), len(directions)))
    for start in range(0, len(inputs), FORWARD_BATCH):
        piece = slice(start, start + FORWARD_BATCH)
        values, slopes = _slopes(logits, parameters, directions, inputs[piece])
        probabilities = values.double().softmax(1)  # [n, classes]
        # ∂ log p(c)/∂Θ = slope of logit c, less the mean slope.
        scores = slopes - (probabilities * slopes).sum(2, keepdim=True)  # [K, n, classes]
        if labels is not None:
            own = scores[:, torch.arange(len(values)), labels[piece].long()]
            part = own @ own.T
        else:
            weighted = (scores * probabilities.sqrt()).flatten(1)
            part = weighted @ weighted.T
        total += part.numpy()
    return total / len(inputs)


def _slopes(
    logits: Logits, parameters: Parameters, directions: Sequence[Parameters], inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [n, classes], and their derivatives along each direction, [K, n, classes] in float64."""
    point = {name: tensor.detach() for name, tensor in parameters.items()}
    slopes = []
    for direction in directions:
        along = {name: direction[name].detach().to(tensor.dtype) for name, tensor in point.items()}
        try:
            # The fused attention kernels have no forward-mode derivative; the plain one has.
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                value, slope = torch.func.jvp(lambda at: logits(at, inputs), (point,), (along,))  # type: ignore[misc]
        except NotImplementedError as error:
            raise BadSetup(
                "no-forward-derivative",
                f"An operation of the network has no forward-mode derivative: {str(error).splitlines()[0][:200]}",
                why="torch does not implement it for every operation.",
                remedy="Take a method without Fisher information, such as `otmf` or `average`.",
            ) from error
        slopes.append(slope.double())
    return value, torch.stack(slopes)
