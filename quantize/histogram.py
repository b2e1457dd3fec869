"""Histograms of activations, of constant size, and the ranges that follow from them.

Ranges must cover all tasks that were ever folded, and the inputs of all but the last are gone. So each fold adds one
share of weight 1 to a histogram for each place; bins are eighths of an octave of magnitude, so that nothing needs to be
known of the scale and histograms simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldd.core.quantized import ActivationRange

_PER_OCTAVE, _LOWEST, _HIGHEST = 8, -20, 20  # magnitudes 2⁻²⁰ … 2²⁰; beyond them the outermost bins
BINS = _PER_OCTAVE * (_HIGHEST - _LOWEST)
SIZE = 3 + 2 * BINS  # smallest value, largest value, share of zeros, negative bins, positive bins
_INSIDE = 8  # points that stand for a bin: at 8 bits, a bin near the top is many steps wide
_PIECE = 2**16  # values at a time, which stay in the processor's cache
_EXPONENT = 2.4
_SHARES = tuple(i / 50 for i in range(5, 51))
_LOW_SHARES = (1.0, 0.8, 0.6, 0.4)


def observe(values: Tensor) -> Tensor:
    """A histogram of all values: float32 [SIZE], its shares sum to 1."""
    flat = values.detach().flatten().float()
    signed = torch.zeros(2 * BINS + 1, dtype=torch.int64)  # largest negative magnitude … zero … largest positive one
    for piece in torch.split(flat, _PIECE):
        magnitude = piece.abs().nan_to_num_()
        bins = magnitude.clamp_min(2.0**_LOWEST).log2_().sub_(_LOWEST).mul_(_PER_OCTAVE).floor_().clamp_(0, BINS - 1)
        places = bins.add_(1).mul_(magnitude >= 2.0**_LOWEST).copysign_(piece).int()
        signed += torch.bincount(places.add_(BINS), minlength=len(signed))
    counts = torch.zeros(SIZE, dtype=torch.float64)
    counts[2], counts[3 : 3 + BINS], counts[3 + BINS :] = signed[BINS], signed[:BINS].flip(0), signed[BINS + 1 :]
    counts /= len(flat)
    counts[0], counts[1] = flat.min(), flat.max()
    return counts.float()


def combine(left: Tensor, right: Tensor) -> Tensor:
    """Both histograms in one: shares add up, the extremes are the outer ones."""
    both = left + right
    both[0], both[1] = torch.minimum(left[0], right[0]), torch.maximum(left[1], right[1])
    return both


def widest_range(histogram: Tensor, bits: int) -> ActivationRange:
    """The range from the smallest to the largest value seen; zero is always in it, exactly."""
    return _range(min(0.0, float(histogram[0])), max(0.0, float(histogram[1])), bits)


def best_range(histogram: Tensor, bits: int) -> ActivationRange:
    """The range of least Σ share·|x − x̂|^2.4 among shrunken ones."""
    low, high = min(0.0, float(histogram[0])), max(0.0, float(histogram[1]))
    values, shares = _points(histogram)
    total = float(shares.sum())
    best, least = _range(low, high, bits), float("inf")
    if max(-low, high) > 2.0**_HIGHEST or not len(values):
        return best  # off the scale: nothing is known that a narrower range could be chosen by
    for low_share in _LOW_SHARES if low < 0 < high else (1.0,):
        for share in reversed(_SHARES):
            candidate = _range(low * low_share * share, high * share, bits)
            codes = (values / candidate.step).round_().clamp_(-candidate.zero_point, 2**bits - 1 - candidate.zero_point)
            error = float(codes.mul_(candidate.step).sub_(values).abs_().pow_(_EXPONENT).mul_(shares).sum())
            if error < least:
                best, least = candidate, error
            # What is more than rounding is clipping, and only grows from here on.
            if error - total * (candidate.step / 2) ** _EXPONENT >= least:
                break
    return best


def _range(low: float, high: float, bits: int) -> ActivationRange:
    levels = 2**bits - 1
    step = (high - low) / levels
    if not step > 0:
        return ActivationRange(1.0, 0, bits)  # nothing but zeros was seen
    return ActivationRange(step, min(levels, max(0, round(-low / step))), bits)


def _points(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Values that stand for the histogram, and their shares."""
    bins = torch.arange(BINS, dtype=torch.float64).repeat_interleave(_INSIDE)
    offset = ((torch.arange(_INSIDE, dtype=torch.float64) + 0.5) / _INSIDE).repeat(BINS)
    magnitude = torch.exp2((bins + offset) / _PER_OCTAVE + _LOWEST)
    shares = histogram[3:].double().reshape(2, BINS).repeat_interleave(_INSIDE, 1) / _INSIDE
    values = torch.stack([-magnitude, magnitude]).clamp(float(histogram[0]), float(histogram[1]))
    seen = shares > 0
    return values[seen], shares[seen]
