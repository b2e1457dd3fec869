"""How a merge of integer weights is rounded: to the nearest, with sampled noise (HDRQ), or without bias.

All three get the exact merge, which lies between two codes, and choose one. Where a new model's weight is 1/t, most of
what it changes is a fraction of a code, and what rounding makes of that is all that the merge learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

# Two sums that differ by less are the same number, computed in another order. Codes are at most 128, so that float64
# errs by less than 1e-11, and a sum of integers with weights of common denominator D is at least 1/2D off a tie that it
# is not: ties are decided exactly for every D up to 2²⁸.
SAME = 1e-9
PAPER_SAMPLES = 100  # in HDRQ's own code; one does as well, see `Noise`


@dataclass(frozen=True, eq=False)
class Blend:
    """Integer weights of several models that shall become one.

    Attributes:
        codes: of each model, int8 of one shape.
        steps: of each model, float64, broadcastable against the codes.
        weights: λ, positive, of sum 1.
    """

    codes: Sequence[np.ndarray]
    steps: Sequence[np.ndarray]
    weights: Sequence[float]

    @property
    def step(self) -> np.ndarray:
        """Σ λᵢ sᵢ, float64."""
        return np.asarray(sum(weight * step for weight, step in zip(self.weights, self.steps, strict=True)))

    def exact(self) -> np.ndarray:
        """Σ λᵢ Iᵢ sᵢ / Σ λᵢ sᵢ: the merge in units of its step, float64; integers and ties to the last bit."""
        total = np.zeros(self.codes[0].shape)
        for weight, code, step in zip(self.weights, self.codes, self.steps, strict=True):
            total += weight * step * code
        return settled(total / self.step)

    def ties(self) -> np.ndarray:
        """Where Σ λᵢ Iᵢ falls in the middle between two codes, bool.

        Steps do not enter, as in HDRQ's own code: those of models that were fine-tuned from one base differ by a
        little, and all ties would then be decided for the model with the larger step: an error of half a code, the
        same way everywhere. That code divides floats, (I·s)/s, and misses 7 to 11 % of the ties; integers miss none.
        """
        total = np.zeros(self.codes[0].shape)
        for weight, code in zip(self.weights, self.codes, strict=True):
            total += weight * code
        return np.asarray(settled(total) % 1 == 0.5)


class Rounding(Protocol):
    """A frozen strategy that chooses integers for a blend."""

    name: ClassVar[str]

    def round(self, blend: Blend, random: np.random.Generator) -> np.ndarray:
        """Integers as float64, not clamped. The same blend and random numbers give the same integers."""
        ...


@dataclass(frozen=True)
class Nearest:
    """Equation 11 of HDRQ: to the nearest code, ties to the even one."""

    name: ClassVar[str] = "nearest"

    def round(self, blend: Blend, random: np.random.Generator) -> np.ndarray:
        """Draws nothing."""
        return np.asarray(np.rint(blend.exact()))


@dataclass(frozen=True)
class Stochastic:
    """Ours: ⌊exact + u⌋ with u uniform in [0, 1). Its expectation is the exact merge, whatever the weights."""

    name: ClassVar[str] = "stochastic"

    def round(self, blend: Blend, random: np.random.Generator) -> np.ndarray:
        """Draws one number a weight."""
        exact = blend.exact()
        return np.asarray(np.floor(exact + random.random(exact.shape)))


@dataclass(frozen=True)
class Noise:
    """Equation 12 of HDRQ: each model is moved by noise U[−sᵢ/2, sᵢ/2] before the merge, so that ties fall either way.

    Attributes:
        everywhere: noise on all weights, as the equation says; else on ties alone, as HDRQ's own code has it.
        samples: how many merges are drawn. The next replaces the best so far only if, seen from every model, its
            direction is closer to the exact merge's. Of a hundred samples of a 64 × 64 tensor 0 to 3 were, and the
            cosines of 0.90 rose by less than 0.0005.
    """

    name: ClassVar[str] = "noise"
    everywhere: bool = False
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"At least one sample must be drawn, not {self.samples}.")

    def round(self, blend: Blend, random: np.random.Generator) -> np.ndarray:
        """Draws `samples` numbers a weight and model."""
        exact = blend.exact()
        place = np.ones(exact.shape, np.bool_) if self.everywhere else blend.ties()
        best, similarity = exact, None
        for _ in range(self.samples):
            sample: np.ndarray = np.rint(exact + place * _noise(blend, random))
            if self.samples == 1:
                return sample
            found = similarities(blend, sample)
            if similarity is None or (found > similarity).all():
                best, similarity = sample, found
        return best


def settled(values: np.ndarray) -> np.ndarray:
    """Values with those that lie within `SAME` of a multiple of ½ put onto it."""
    halves: np.ndarray = np.rint(2 * values) / 2
    return np.where(np.abs(values - halves) < SAME, halves, values)


def similarities(blend: Blend, merged: np.ndarray) -> np.ndarray:
    """For each model the cosine between the way to the merge and the way to the exact merge, over a whole tensor.

    HDRQ's code takes absolute values: a merge in the opposite direction would count as good. [models]; 0 where a model
    is the merge.
    """
    target, reached = blend.exact() * blend.step, merged * blend.step
    cosines = []
    for code, step in zip(blend.codes, blend.steps, strict=True):
        own = code * step
        one, other = reached - own, target - own
        # Not by BLAS, which sums in another order with other threads.
        scale = float(np.sqrt(np.sum(one * one) * np.sum(other * other)))
        cosines.append(float(np.sum(one * other)) / scale if scale else 0.0)
    return np.asarray(cosines)


def _noise(blend: Blend, random: np.random.Generator) -> np.ndarray:
    """Σ λᵢ εᵢ / Σ λᵢ sᵢ with εᵢ uniform in [−sᵢ/2, sᵢ/2]."""
    total = np.zeros(blend.codes[0].shape)
    for weight, step in zip(blend.weights, blend.steps, strict=True):
        total += weight * step * (random.random(total.shape) - 0.5)
    return np.asarray(total / blend.step)
