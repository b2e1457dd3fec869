"""Other ways to quantize, on foldd's own frame: the same steps, places, blocks and images, another rounding.

AdaRound (Nagel et al., 2020) learns for each weight whether it is rounded up or down; QDrop (Wei et al., 2022) does so
a block at a time and drops the quantization of activations at random while it learns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foldd.core.quantized import QuantizedTensor
from foldd.quantize.descent import Descent
from foldd.quantize.hdrq import Hdrq, as_published
from foldd.quantize.latent import Rounding
from foldd.quantize.steps import code_range, largest_step, shaped

_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid
_WEIGHT = 0.01  # of the term that drives it to 0 or 1
_WARM = 0.2  # share of the iterations before that term counts
_BETA = (20.0, 2.0)  # its exponent, from first to last


class AdaRound:
    """w → (⌊w/Δ⌋ + h(v))·Δ with h(v) = clamp(1.2·σ(v) − 0.1, 0, 1); the step stays."""

    def __init__(self, weight: Tensor, step: Tensor, bits: int, rate: float) -> None:
        self._step, self._bits, self._rate = step, bits, rate
        scaled = weight / shaped(step, weight)
        self._floor = scaled.floor()
        rest = (scaled - self._floor).clamp(1e-4, 1 - 1e-4)
        self._v = (-torch.log((_HIGH - _LOW) / (rest - _LOW) - 1)).requires_grad_()

    def parameters(self, descent: Descent) -> list[dict[str, Any]]:
        return [{"params": [self._v], "lr": self._rate}]

    def _up(self) -> Tensor:
        return (torch.sigmoid(self._v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self, progress: float, *, real: bool, generator: torch.Generator) -> Tensor:
        codes = (self._floor + self._up()).clamp(*code_range(self._bits))
        return codes * shaped(self._step, codes)

    def penalty(self, progress: float) -> Tensor | float:
        if progress < _WARM:
            return 0.0
        beta = _BETA[0] + (_BETA[1] - _BETA[0]) * (progress - _WARM) / (1 - _WARM)
        return _WEIGHT * (1 - (2 * self._up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def result(self) -> QuantizedTensor:
        codes = (self._floor + (self._up() >= 0.5)).clamp(*code_range(self._bits)).to(torch.int8)
        return QuantizedTensor(codes.numpy(), self._step.numpy(), self._bits)


@dataclass(frozen=True)
class QDrop(Hdrq):
    """QDrop-style: HDRQ's frame with AdaRound's rounding, no noise, no pull.

    Attributes:
        flip_rate: Adam's rate for v; 1e-3 as published needs 20,000 iterations to get anywhere.
    """

    flip_rate: float = 1e-3

    def rounding(self, weight: Tensor, step: Tensor, bits: int, base: Tensor | None) -> Rounding:
        return AdaRound(weight, step, bits, self.flip_rate)


@dataclass(frozen=True)
class MinMax(Hdrq):
    """The largest magnitude is the range, and weights go to the nearest."""

    def step(self, weight: Tensor, bits: int) -> Tensor:
        return largest_step(weight, bits, per_channel=self.per_channel)


def quantizers(weight_bits: int, activation_bits: int | None, iterations: int) -> dict[str, Hdrq]:
    """The table: name → what quantizes.

    `shipped` is what foldd's artifacts are made by, `hdrq` HDRQ with a step for each channel and rates in steps, as
    the rivals beside it, `hdrq-paper` with the paper's settings, `qdrop-tensor` its rival; all others are rivals.
    `adaround+…` are on the way from AdaRound to QDrop, with one thing of the three, and `hdrq-layers` is HDRQ learned
    as AdaRound is.
    """
    bits = (weight_bits, activation_bits)
    descent = Descent(iterations)
    # Few iterations need a larger rate; this one was the best of 0.003, 0.01, 0.03, 0.1 on validation images.
    flip_rate = 1e-3 if iterations > 5000 else 0.03
    plain = replace(descent, drop=0.0, range_rate=0.0)
    adaround = QDrop(*bits, descent=plain, layer_by_layer=True, flip_rate=flip_rate)
    return {
        "minmax": MinMax(*bits, descent=None),
        "mse": Hdrq(*bits, descent=None),
        "adaround": adaround,
        "adaround+blocks": replace(adaround, layer_by_layer=False),
        "adaround+ranges": replace(adaround, descent=replace(descent, drop=0.0)),
        "adaround+drop": replace(adaround, descent=replace(descent, range_rate=0.0)),
        "qdrop": QDrop(*bits, descent=descent, flip_rate=flip_rate),
        "qdrop-tensor": QDrop(*bits, descent=descent, flip_rate=flip_rate, per_channel=False),
        "hdrq": Hdrq(*bits, descent=descent),
        "hdrq-layers": Hdrq(*bits, descent=plain, layer_by_layer=True),
        "hdrq-paper": as_published(*bits, iterations),
        "shipped": Hdrq(*bits, descent=descent, noise=False, pull=0.0),
    }
