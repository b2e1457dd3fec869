"""A weight on its way to integers: the latent real weight and its step, both learned."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from foldd.core.quantized import QuantizedTensor
from foldd.quantize.descent import Descent
from foldd.quantize.steps import code_range, fake_quantize, nearest_codes, noisy, shaped


class Rounding(Protocol):
    """How a weight is rounded while its block is reconstructed."""

    def parameters(self, descent: Descent) -> list[dict[str, Any]]:
        """What is learned, as Adam's parameter groups with their rates."""
        ...

    def weight(self, progress: float, *, real: bool, generator: torch.Generator) -> Tensor:
        """The weight that stands for the quantized one in this step; `real`: exactly what will be."""
        ...

    def penalty(self, progress: float) -> Tensor | float:
        """What is added to the loss."""
        ...

    def result(self) -> QuantizedTensor:
        """The integers."""
        ...


class Latent:
    """HDRQ's rounding: noise first (equation 9), then the nearest integer with a straight-through estimator.

    The step is learned as its logarithm, so that one learning rate fits every layer and it stays positive.
    """

    def __init__(
        self, weight: Tensor, step: Tensor, bits: int, *, base: Tensor | None, noise: bool, pull: float
    ) -> None:
        """Takes a float32 weight [channels, …] and its step [] or [channels].

        Args:
            base: θ⁰'s weight, for the distance regularisation.
            noise: equation 9 until rounding gets real; otherwise real from the start.
            pull: λ of the distance ‖W − W⁰‖ (equation 10).
        """
        self._latent = weight.clone().requires_grad_()
        self._log_step = step.log().requires_grad_()
        self._bits, self._base, self._noise, self._pull = bits, base, noise, pull

    def parameters(self, descent: Descent) -> list[dict[str, Any]]:
        rate = descent.rate * float(self._log_step.detach().exp().mean()) if descent.in_steps else descent.rate
        return [{"params": [self._latent], "lr": rate}, {"params": [self._log_step], "lr": descent.step_rate}]

    def weight(self, progress: float, *, real: bool, generator: torch.Generator) -> Tensor:
        step = shaped(self._log_step.exp(), self._latent)
        low, high = code_range(self._bits)
        if real or not self._noise:
            return fake_quantize(self._latent, step, low, high)
        return noisy(self._latent, step, low, high, generator)

    def penalty(self, progress: float) -> Tensor | float:
        if self._base is None or not self._pull:
            return 0.0
        # Not squared: a pull of constant strength, as in the authors' code.
        distance: Tensor = torch.linalg.vector_norm(self._latent - self._base)
        return self._pull * distance

    @torch.no_grad()
    def result(self) -> QuantizedTensor:
        step = self._log_step.exp()
        return QuantizedTensor(nearest_codes(self._latent, step, self._bits).numpy(), step.numpy().copy(), self._bits)
