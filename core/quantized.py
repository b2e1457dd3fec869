"""A quantized network as plain arrays: what quantizing hands to the export, and what quantized files hold.

A weight is `codes · step`, symmetric, one step for the tensor or one for each output channel (the first axis). An
activation is `(code − zero_point) · step` with codes 0 … 2^bits − 1, one step for the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in integers.

    Attributes:
        codes: int8, of the weight's shape, each in −2^(bits−1) … 2^(bits−1) − 1.
        step: float32, [] for the tensor or [channels] along the first axis; positive.
        bits: 2 … 8.
    """

    codes: np.ndarray
    step: np.ndarray
    bits: int

    def values(self) -> np.ndarray:
        """`codes · step`, float32."""
        return np.asarray(self.codes * self.broad_step(), np.float32)

    def broad_step(self) -> np.ndarray:
        """The step, broadcastable against the codes."""
        return self.step.reshape(-1, *[1] * (self.codes.ndim - 1)) if self.step.ndim else self.step


@dataclass(frozen=True)
class ActivationRange:
    """How one activation is quantized: real values from −zero_point·step to (2^bits − 1 − zero_point)·step."""

    step: float
    zero_point: int
    bits: int


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A network with its BatchNorms folded, by the names of the skeleton's initializers.

    Attributes:
        weights: those of linear layers and convolutions that are quantized.
        floats: every other tensor, float32, biases included.
        activations: by place, named after the weight of a layer: `<weight>:input` is what the layer takes,
            `<weight>:output` what a convolution gives (behind the ReLU where one is all that takes it), `<weight>:sum`
            what the addition behind it gives (behind its ReLU likewise). Empty: only weights are quantized.
        report: what quantizing did, as plain JSON values.
    """

    weights: Mapping[str, QuantizedTensor]
    floats: Mapping[str, np.ndarray]
    activations: Mapping[str, ActivationRange]
    report: Mapping[str, Any] = field(default_factory=dict)
