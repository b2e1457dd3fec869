"""Steps and rounding: quantization as a differentiable function of values and step.

`fake_quantize` is clamp(⌊x/Δ⌉, low, high)·Δ (HDRQ, equation 8). Its gradients are those of LSQ (Esser et al., 2020):
straight through to x inside the range; to the step the rounding error inside and the bound outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EXPONENT = 2.4  # of the error that a step is chosen by: MSE would clip too little, as BRECQ and its heirs found
_SHARES = tuple(i / 50 for i in range(10, 51))  # of the largest magnitude, tried as the range
_PIECE = 2**16  # weights at a time, which stay in the processor's cache: several times as fast
_FLOOR = 1 / 1024  # of the layer's largest step: a dead channel's would be 0, and its bias in steps endless
_NOTHING = 2.0**-16  # the step of a weight of zeros: no scale is known, and its bias must fit too


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a symmetric signed weight."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def shaped(step: Tensor, like: Tensor) -> Tensor:
    """A step [] or [channels] so that it multiplies a weight [channels, …]."""
    return step.reshape(-1, *[1] * (like.dim() - 1)) if step.dim() else step


def largest_step(weight: Tensor, bits: int, *, per_channel: bool) -> Tensor:
    """The step whose range holds the largest magnitude: [channels] or []."""
    magnitude = weight.abs().flatten(1).amax(1) if per_channel else weight.abs().amax()
    step = magnitude / code_range(bits)[1]
    if not step.any():
        return torch.full_like(step, _NOTHING)
    return step.clamp_min(float(step.max()) * _FLOOR)


def best_step(weight: Tensor, bits: int, *, per_channel: bool) -> Tensor:
    """The step of least Σ|w − ŵ|^2.4 among shares of the largest one: [channels] or []."""
    top = largest_step(weight, bits, per_channel=per_channel)
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    together = max(1, _PIECE // rows.shape[1])
    parts = zip(torch.split(rows, together), torch.split(top.reshape(-1), together), strict=True)
    best = torch.cat([_best_of_rows(part, largest, bits) for part, largest in parts])
    return best.clamp_min(float(best.max()) * _FLOOR).reshape(top.shape)


def _best_of_rows(rows: Tensor, top: Tensor, bits: int) -> Tensor:
    """The best step of each row, the smallest where several are: [rows].

    From the largest share down, errors up to half a step are rounding, all others clipping, which only grows from there
    on: where that alone is as large as the least error so far, nothing better can follow.
    """
    best, least = top, torch.full_like(top, float("inf"))
    for share in reversed(_SHARES):
        step = top * share
        total = _error(rows, step, bits)
        better = total <= least
        best, least = torch.where(better, step, best), torch.where(better, total, least)
        if (total - rows.shape[1] * (step / 2).pow(_EXPONENT) >= least).all():
            break
    return best


def _error(rows: Tensor, step: Tensor, bits: int) -> Tensor:
    """Σ|w − ŵ|^2.4 of each row: [rows]."""
    low, high = code_range(bits)
    step, total = step.reshape(-1, 1), torch.zeros_like(step)
    for piece in torch.split(rows, _PIECE, 1):
        rounded = (piece / step).round_().clamp_(low, high).mul_(step)
        total += rounded.sub_(piece).abs_().pow_(_EXPONENT).sum(1)
    return total


def nearest_codes(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """⌊w/Δ⌉ in the range of the bits: int8, of the weight's shape."""
    return (weight / shaped(step, weight)).round_().clamp_(*code_range(bits)).to(torch.int8)


def fake_quantize(values: Tensor, step: Tensor, low: int, high: int, stays: Tensor | None = None) -> Tensor:
    """clamp(⌊x/Δ⌉, low, high)·Δ with LSQ's gradients; the step broadcasts against the values.

    Args:
        stays: of the values' shape and type, 1 where a value stays as it is and 0 elsewhere; None: nowhere.
    """
    result: Tensor = _FakeQuantize.apply(values, step, low, high, stays)  # type: ignore[no-untyped-call]
    return result


def noisy(values: Tensor, step: Tensor, low: int, high: int, generator: torch.Generator) -> Tensor:
    """w + ε in place of the quantized ŵ, ε drawn from the errors ŵ − w of the whole tensor, in steps (equation 9).

    What lies outside the range is clipped to it, as quantizing would. Its error would be many steps; drawn for others
    it would be no rounding noise, so the error that it lends is that of a range without end.
    """
    with torch.no_grad():
        scaled = values / step
        inside = (scaled > low) & (scaled < high)
        errors = (scaled.round() - scaled).flatten()
        noise = errors[torch.randint(len(errors), errors.shape, generator=generator)].reshape(values.shape)
        bound = scaled.clamp(low, high)
    return torch.where(inside, values + noise * step, bound * step)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, stays: Tensor | None) -> Tensor:
        scaled = values / step
        codes = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, codes, stays)
        ctx.bounds, ctx.step_shape = (low, high), step.shape
        # lerp() is exact at 0 and 1, and several times as fast as where().
        return codes * step if stays is None else (codes * step).lerp_(values, stays)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        scaled, codes, stays = ctx.saved_tensors
        low, high = ctx.bounds
        inside = scaled.clamp(low, high).eq_(scaled)  # 0 or 1; a bool would be made a float anew by each product
        to_values = to_step = None
        if ctx.needs_input_grad[1]:
            error = torch.addcmul(codes, scaled, inside, value=-1).mul_(gradient)
            if stays is not None:
                error.addcmul_(error, stays, value=-1)
            to_step = error.sum_to_size(ctx.step_shape)
        if ctx.needs_input_grad[0]:
            passes = inside if stays is None else torch.maximum(inside, stays, out=inside)
            to_values = passes.mul_(gradient)
        return to_values, to_step, None, None, None
