"""Merging of quantized weights: from integers and steps alone to integers and steps (HDRQ, section 4.3).

    I = round(Σ λᵢ Iᵢ sᵢ / Σ λᵢ sᵢ),   s = Σ λᵢ sᵢ

for any number of models, steps for a tensor or for a channel, and weights that sum to one. Models are put into an order
of their own first: the order in which they come changes not one bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from foldd.core.quantized import ActivationRange, QuantizedModel, QuantizedTensor
from foldd.core.rounding import random_for
from foldd.quantize.rounding import Blend, Rounding

TOLERANCE = 1e-9  # of the sum of the weights


def merge_tensors(
    tensors: Sequence[QuantizedTensor], weights: Sequence[float], rounding: Rounding, *, seed: int = 0, name: str = ""
) -> QuantizedTensor:
    """One tensor out of one of each model.

    Args:
        tensors: of one shape and of one number of bits; steps [] or [channels] each.
        weights: λ, not negative, of sum 1; a model of weight 0 has no part in it.
        seed, name: the random numbers depend on these two alone.

    Returns:
        Codes within the bits' range; one step a channel where any of the models has that. One model is itself again.

    Raises:
        ValueError: weights that are none, tensors that do not fit together.
    """
    _check(tensors, weights)
    # The bytes break ties of equal weights, so that a permutation of the models draws the same numbers.
    parts = sorted(
        ((w, t) for w, t in zip(weights, tensors, strict=True) if w > 0),
        key=lambda part: (part[0], part[1].step.tobytes(), part[1].codes.tobytes()),
    )
    blend = Blend(
        [t.codes for _, t in parts], [t.broad_step().astype(np.float64) for _, t in parts], [w for w, _ in parts]
    )
    bits = tensors[0].bits
    codes = np.clip(rounding.round(blend, random_for(seed, name)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    per_channel = any(t.step.ndim for _, t in parts)
    step = blend.step.astype(np.float32)
    return QuantizedTensor(codes.astype(np.int8), step.reshape(-1) if per_channel else step.reshape(()), bits)


def merge_activations(ranges: Sequence[ActivationRange], weights: Sequence[float]) -> ActivationRange:
    """The weighted mean of steps; the zero point is merged as a weight is, so that 0 stays a code.

    Raises:
        ValueError: weights that are none, ranges of different bits.
    """
    _check_weights(weights, len(ranges))
    bits = {r.bits for r in ranges}
    if len(bits) > 1:
        raise ValueError(f"Activations of {sorted(bits)} bits cannot be merged.")
    step = math.fsum(w * r.step for w, r in zip(weights, ranges, strict=True))
    lowest = math.fsum(w * r.step * r.zero_point for w, r in zip(weights, ranges, strict=True))
    zero_point = min(max(round(lowest / step), 0), 2 ** ranges[0].bits - 1)
    return ActivationRange(step, zero_point, ranges[0].bits)


def merge_models(
    models: Sequence[QuantizedModel], weights: Sequence[float], rounding: Rounding, *, seed: int = 0
) -> QuantizedModel:
    """One quantized network out of several: weights in integers, floats (biases, norms) averaged, activation ranges.

    Each tensor draws numbers of its own, by seed and name: which others there are does not matter.

    Raises:
        ValueError: weights that are none, models whose tensors differ in names, shapes or bits.
    """
    _check_weights(weights, len(models))
    for kind in ("weights", "floats", "activations"):
        names = [set(getattr(model, kind)) for model in models]
        if differing := sorted(set().union(*names) - set.intersection(*names)):
            raise ValueError(f"Not all models have the same {kind}: {', '.join(differing[:3])}.")
    first = models[0]
    # `asdict` only takes dataclasses, which protocols cannot say that they are.
    options = asdict(rounding)  # type: ignore[call-overload]
    return QuantizedModel(
        weights={
            name: merge_tensors([m.weights[name] for m in models], weights, rounding, seed=seed, name=name)
            for name in first.weights
        },
        floats={name: _mean(name, [m.floats for m in models], weights) for name in first.floats},
        activations={
            name: merge_activations([m.activations[name] for m in models], weights) for name in first.activations
        },
        report={"merged": len(models), "weights": list(weights), "rounding": rounding.name, **options},
    )


def _mean(name: str, models: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> np.ndarray:
    """Weighted mean of one float tensor, summed in float64 in an order that does not depend on the models'."""
    arrays = [model[name] for model in models]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"{name} has other shapes in other models: {[list(array.shape) for array in arrays]}.")
    terms = np.stack([weight * array.astype(np.float64) for weight, array in zip(weights, arrays, strict=True)])
    return np.asarray(np.sort(terms, axis=0).sum(0), np.float32)


def _check(tensors: Sequence[QuantizedTensor], weights: Sequence[float]) -> None:
    _check_weights(weights, len(tensors))
    shapes = {tensor.codes.shape for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"Tensors of shapes {sorted(shapes)} cannot be merged.")
    bits = {tensor.bits for tensor in tensors}
    if len(bits) > 1:
        raise ValueError(f"Tensors of {sorted(bits)} bits cannot be merged.")
    for tensor in tensors:
        if tensor.step.shape not in ((), tensor.codes.shape[:1]):
            raise ValueError(f"Steps of shape {tensor.step.shape} do not fit codes of shape {tensor.codes.shape}.")
        if not (np.isfinite(tensor.step) & (tensor.step > 0)).all():
            raise ValueError("Steps must be finite and positive.")


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count or not count:
        raise ValueError(f"{count} models need as many weights, at least one; there are {len(weights)}.")
    # Written so that NaN fails.
    if not all(weight >= 0 for weight in weights) or not abs(math.fsum(weights) - 1) <= TOLERANCE:
        raise ValueError(f"Merge weights must not be negative and sum to 1, they are {list(weights)}.")
