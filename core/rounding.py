"""From real values to integers: steps, rounding to the nearest or without bias, and the random numbers for it.

Rounding without bias is `⌊x + u⌋` with u uniform in [0, 1): its expectation is x, so that what is far smaller than a
step survives in the mean over many weights and many roundings, where rounding to the nearest loses it each time.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from foldd.core.quantized import QuantizedTensor
from foldd.core.roles import Role

PIECE = 1 << 18  # elements that are in float64 at a time, a few times over: 10 MB
# Of a step. codes · step in float32, divided by a step that is itself computed anew, misses a code of 127 by 127 · 2⁻²³
# at most; what is so near to an integer is that integer, or a vector that nothing changed would wander with each fold.
NEARLY = 2.0**-15
# Norms, biases and statistics are few, and their values are not alike within a tensor.
_WEIGHTS = {Role.MATRIX, Role.CONVOLUTION, Role.EMBEDDING}


def is_worth_codes(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one that is kept or sent in integers: weights, unless a channel is a single number."""
    return role in _WEIGHTS and len(shape) > 1 and math.prod(shape[1:]) > 1


def random_for(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one tensor: they depend on seed and name alone, never on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def largest_code(bits: int) -> int:
    """2^(bits−1) − 1."""
    return int(2 ** (bits - 1) - 1)


def channel_steps(values: np.ndarray, bits: int) -> np.ndarray:
    """The finest steps that clip nothing: largest absolute value over largest code, for each channel (first axis).

    Args:
        values: [channels, …], finite.

    Returns:
        float32 [channels], positive also where a channel is all zero.
    """
    channels = len(values)
    steps = np.empty(channels, np.float32)
    for first, last in _pieces(values):
        rows = values[first:last].reshape(last - first, -1)
        largest = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0)).astype(np.float64)
        steps[first:last] = largest / largest_code(bits)
    return np.maximum(steps, np.finfo(np.float32).tiny)


def to_integers(values: np.ndarray, bits: int, random: np.random.Generator | None = None) -> QuantizedTensor:
    """Codes with one step a channel, symmetric: −2^(bits−1) + 1 … 2^(bits−1) − 1.

    Args:
        values: float32 [channels, …], finite; read in pieces.
        random: to round without bias; None rounds to the nearest, then no value moves by more than half its step.
    """
    limit = largest_code(bits)
    step = channel_steps(values, bits)
    codes = np.empty(values.shape, np.int8)
    for first, last in _pieces(values):
        exact = values[first:last].reshape(last - first, -1).astype(np.float64)
        exact /= step[first:last, None].astype(np.float64)
        nearest = np.rint(exact)
        if random is not None:
            chosen = np.floor(exact + random.random(exact.shape))
            nearest = np.where(np.abs(exact - nearest) < NEARLY, nearest, chosen)
        codes[first:last] = np.clip(nearest, -limit, limit).reshape(codes[first:last].shape)
    return QuantizedTensor(codes, step, bits)


def _pieces(values: np.ndarray) -> list[tuple[int, int]]:
    """Runs of channels of about `PIECE` elements."""
    channels = len(values)
    run = max(1, PIECE * channels // max(1, values.size))
    return [(first, min(first + run, channels)) for first in range(0, channels, run)]
