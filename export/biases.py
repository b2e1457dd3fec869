"""Biases of integer layers: int32, in steps of the products that they are added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from foldd.core.quantized import QuantizedTensor

_LARGEST = 2**31 - 1


def product_step(activation: float, weight: QuantizedTensor) -> np.ndarray:
    """The step of input · weight, float32, of the weight's step's shape."""
    return np.asarray(np.float32(activation) * weight.step.astype(np.float32), np.float32)


def bias_codes(bias: np.ndarray, step: np.ndarray) -> np.ndarray | None:
    """bias/step rounded, int32; none where a code does not fit."""
    with np.errstate(divide="ignore", over="ignore"):
        codes = np.rint(bias.astype(np.float64) / step)
    return codes.astype(np.int32) if np.abs(codes).max(initial=0.0) <= _LARGEST else None


def with_room(weight: QuantizedTensor, biases: Sequence[tuple[float, np.ndarray]]) -> QuantizedTensor:
    """The same weight, in which channels of nothing but zeros have steps large enough for their biases.

    A dead channel comes with a step near zero, and its bias, which is all that it gives, would need more than 32 bits.

    Args:
        biases: of each layer with this weight, its input's step and its bias [channels].
    """
    if not weight.step.ndim or not biases:
        return weight
    dead = ~weight.codes.reshape(len(weight.codes), -1).any(1)
    # A little more than needed: the product of steps is rounded to float32.
    needed = np.max([np.abs(bias.astype(np.float64)) / (step * _LARGEST) * 1.001 for step, bias in biases], 0)
    return replace(weight, step=np.where(dead, np.maximum(weight.step, needed), weight.step).astype(np.float32))
