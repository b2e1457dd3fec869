"""Settings of a reconstruction, and its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Descent:
    """Settings of a reconstruction.

    Attributes:
        iterations: a block.
        batch: inputs an iteration.
        rate: Adam's largest learning rate for weights; with `in_steps`, in steps of each weight, so that one rate fits
            all bits and layers.
        step_rate, range_rate: that for the logarithms of the steps of weights and of activations.
        warmup: share of the iterations in which the rate rises; then it falls as a cosine.
        real: share of the iterations, the last ones, with real rounding.
        drop: probability with which an element stays float: of the block's input, and of each activation inside.
    """

    iterations: int
    batch: int = 32
    rate: float = 0.02
    in_steps: bool = True
    step_rate: float = 1e-3
    range_rate: float = 1e-3
    warmup: float = 0.2
    real: float = 0.175
    drop: float = 0.5

    def factor(self, iteration: int) -> float:
        """Of the learning rate: a linear rise, then a cosine to 0."""
        rise = max(1, round(self.warmup * self.iterations))
        if iteration < rise:
            return (iteration + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (iteration - rise) / max(1, self.iterations - rise)))
