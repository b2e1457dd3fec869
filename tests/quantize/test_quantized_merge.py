"""Merging integer weights: against fractions, against expectations, and what each rounding keeps of an update."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldd.core.quantized import ActivationRange, QuantizedModel, QuantizedTensor
from foldd.quantize.merge import merge_activations, merge_models, merge_tensors
from foldd.quantize.rounding import PAPER_SAMPLES, Blend, Nearest, Noise, Rounding, Stochastic, similarities

ROUNDINGS: list[Rounding] = [Nearest(), Noise(), Noise(samples=5), Noise(everywhere=True), Stochastic()]


def tensor(codes, step=1.0, bits: int = 8) -> QuantizedTensor:
    return QuantizedTensor(np.asarray(codes, np.int8), np.asarray(step, np.float32), bits)


def random_tensors(count: int, *, shape=(6, 5, 3), channels: bool = True, bits: int = 8, seed: int = 0):
    random = np.random.default_rng(seed)
    limit = 2 ** (bits - 1)
    return [
        tensor(
            random.integers(-limit, limit, shape), random.uniform(0.01, 2, shape[0] if channels else ()), bits
        )
        for _ in range(count)
    ]  # fmt: skip


def exact(tensors, weights, place) -> Fraction:
    """Σ λ I s / Σ λ s in fractions of the very numbers given."""
    steps = [Fraction(float(t.step[place[0]] if t.step.ndim else t.step)) for t in tensors]
    parts = [Fraction(w) * step for w, step in zip(weights, steps, strict=True)]
    return sum(p * int(t.codes[place]) for p, t in zip(parts, tensors, strict=True)) / sum(parts)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_against_fractions(data):
    """Every rounding gives one of the two codes around the exact merge; the nearest one is what its name says."""
    count = data.draw(st.integers(1, 5))
    shares = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    weights = [Fraction(share, sum(shares)) for share in shares]
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    channels = data.draw(st.booleans())
    tensors = random_tensors(count, shape=(3, 4), channels=channels, bits=bits, seed=data.draw(st.integers(0, 999)))
    floats = [float(weight) for weight in weights]
    merged = {r.name: merge_tensors(tensors, floats, r, seed=3) for r in (Nearest(), Stochastic())}
    noisy = merge_tensors(tensors, floats, Noise(), seed=3)
    for place in np.ndindex(3, 4):
        value = exact(tensors, weights, place)
        assert merged["nearest"].codes[place] == round(value)  # Python's round takes ties to even, too
        assert merged["stochastic"].codes[place] in (math.floor(value), math.ceil(value))
        if sum(w * int(t.codes[place]) for w, t in zip(weights, tensors, strict=True)) % 1 != Fraction(1, 2):
            assert noisy.codes[place] == round(value)
    steps = sum(w * t.step.astype(np.float64) for w, t in zip(floats, tensors, strict=True))
    assert merged["nearest"].step.shape == ((3,) if channels else ())
    np.testing.assert_allclose(merged["nearest"].step, steps, rtol=1e-7)


def test_steps_of_a_tensor_and_of_a_channel_merge_to_steps_of_a_channel():
    one, two = tensor([[10, 20], [30, 40]], 0.5), tensor([[20, 10], [40, 30]], [0.5, 1.5])
    merged = merge_tensors([one, two], [0.5, 0.5], Nearest())
    assert merged.step.tolist() == [0.5, 1.0]
    assert merged.codes.tolist() == [[15, 15], [round((15 + 60) / 2), round((20 + 45) / 2)]]


@pytest.mark.parametrize("denominator", [2, 6, 10, 4096, 99_998])
def test_ties_are_decided_exactly(denominator):
    """All sums of two codes, against integer arithmetic; floating-point parity misses a part of them."""
    one, two = np.meshgrid(*[np.arange(-128, 128, dtype=np.int8)] * 2)
    for share in {1, denominator // 2 - 1, denominator // 2} - {0}:
        weights = [share / denominator, (denominator - share) / denominator]
        blend = Blend([one, two], [np.asarray(0.1)] * 2, weights)
        numerator = share * one.astype(np.int64) + (denominator - share) * two.astype(np.int64)
        assert (blend.ties() == (2 * numerator % (2 * denominator) == denominator)).all()


def test_the_authors_parity_in_floats_misses_ties():
    """Why codes are kept: their test on dequantized float32 weights finds fewer, on the average over steps."""
    random = np.random.default_rng(0)
    one, two = (random.integers(-128, 128, 4000).astype(np.int8) for _ in range(2))
    found = []
    for s1, s2 in random.uniform(0.001, 0.1, (40, 2)).astype(np.float32):
        sums = one * s1 / s1 + two * s2 / s2
        ties = Blend([one, two], [np.asarray(s1, np.float64), np.asarray(s2, np.float64)], [0.5, 0.5]).ties()
        assert (ties == ((one.astype(int) + two) % 2 == 1)).all()
        found.append(((sums % 2 == 1) & ties).sum() / ties.sum())
    assert 0.85 < np.mean(found) < 0.97


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.125, 0.875)])
def test_stochastic_rounding_has_the_exact_merge_as_its_mean(weights):
    """400 seeds; nearest errs, and by far more than the interval within which the mean was found."""
    tensors = random_tensors(2, shape=(16, 60), seed=1)
    blend = Blend([t.codes for t in tensors], [t.step[:, None].astype(np.float64) for t in tensors], weights)
    value, seeds = blend.exact(), 400
    mean = np.mean([merge_tensors(tensors, weights, Stochastic(), seed=s).codes for s in range(seeds)], axis=0)
    share = value - np.floor(value)
    deviation = np.sqrt(share * (1 - share) / seeds)
    assert (np.abs(mean - value) <= 5 * deviation + 1e-9).all()
    assert abs((mean - value).sum()) <= 4 * np.sqrt((deviation**2).sum())
    nearest = merge_tensors(tensors, weights, Nearest()).codes
    assert (np.abs(nearest - value) > 5 * deviation + 1e-9).mean() > 0.5


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_order_of_the_models_changes_not_one_bit(rounding):
    tensors, weights = random_tensors(4, seed=2), [0.25, 0.25, 0.375, 0.125]
    first = merge_tensors(tensors, weights, rounding, seed=7)
    for order in permutations(range(4)):
        merged = merge_tensors([tensors[i] for i in order], [weights[i] for i in order], rounding, seed=7)
        assert (merged.codes == first.codes).all()
        assert merged.step.tobytes() == first.step.tobytes()


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != Noise(everywhere=True)])
def test_one_model_and_equal_models_are_that_model(rounding):
    (one,) = random_tensors(1, seed=3)
    other = random_tensors(2, seed=4)[1]
    for models, weights in (
        ([one], [1.0]), ([one, other], [1.0, 0.0]), ([one] * 3, [0.1, 0.2, 0.7]), ([one] * 7, [1 / 7] * 7)
    ):  # fmt: skip
        merged = merge_tensors(models, weights, rounding, seed=1)
        assert (merged.codes == one.codes).all()
        np.testing.assert_allclose(merged.step, one.step, rtol=1e-7)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_common_factor_of_the_steps_goes_into_the_step_alone(rounding):
    tensors = random_tensors(3, seed=5)
    scaled = [QuantizedTensor(t.codes, t.step * np.float32(8), t.bits) for t in tensors]
    weights = [0.5, 0.3, 0.2]
    one, other = (merge_tensors(models, weights, rounding, seed=2) for models in (tensors, scaled))
    assert (one.codes == other.codes).all()
    assert (one.step * np.float32(8) == other.step).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_replay_gives_the_same_bits_and_other_seeds_others(rounding):
    tensors = [tensor(np.arange(-60, 60).reshape(8, 15)), tensor(np.arange(-59, 61).reshape(8, 15), 1.01)]
    first, again, other, renamed = (
        merge_tensors(tensors, [0.5, 0.5], rounding, seed=seed, name=name).codes.tobytes()
        for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    )
    assert first == again
    assert (first == other) == (first == renamed) == (rounding == Nearest())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_noise_beyond_the_range_is_clamped(bits):
    top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    ends = tensor(np.repeat([[top], [bottom]], 500, 1), bits=bits)
    merged = merge_tensors([ends], [1.0], Noise(everywhere=True), seed=0).codes
    assert (merged.max(), merged.min()) == (top, bottom)  # unclamped, int8 would turn 128 into −128
    assert set(merged[0]) <= {top, top - 1}


@pytest.mark.parametrize(
    "weights", [[0.5, 0.4], [1.5, -0.5], [0.6, 0.6], [math.nan, 1.0], [1.0], [0.5, 0.25, 0.25], [math.inf, 0.0]]
)
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights"):
        merge_tensors(random_tensors(2), weights, Nearest())


def test_tensors_that_do_not_fit():
    half = [0.5, 0.5]
    for other, words in (
        (tensor([1, 2, 3]), "shapes"), (tensor([1, 2], bits=4), "bits"), (tensor([1, 2], [1.0]), "do not fit"),
        (tensor([1, 2], 0.0), "positive"), (tensor([1, 2], math.nan), "positive"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            merge_tensors([tensor([1, 2]), other], half, Nearest())
    with pytest.raises(ValueError, match="at least one"):
        merge_tensors([], [], Nearest())
    with pytest.raises(ValueError, match="sample"):
        Noise(samples=0)


# --- what is kept


def kept(count: int, rounding: Rounding, old_step: float, spread: float = 1.5) -> float:
    """How much of the way to the `count`-th model one W8 merge of weights (t−1)/t and 1/t goes; 1: all of it.

    200,000 weights; the models differ by a normal number of codes of standard deviation `spread`.
    """
    random = np.random.default_rng(count)
    old = np.rint(random.normal(0, 30, 200_000)).clip(-100, 100)
    change = np.rint(random.normal(0, spread, old.size))
    models = [tensor(old, old_step), tensor(old + change)]
    merged = merge_tensors(models, [(count - 1) / count, 1 / count], rounding, seed=count).codes
    return float(count * ((merged - old) * change).sum() / (change**2).sum())


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        (Nearest(), (0.53, 0.05, 0.00)),
        (Noise(), (0.91, 0.16, 0.005)),
        (Noise(everywhere=True), (0.97, 0.85, 0.81)),
        (Stochastic(), (1.0, 1.0, 1.0)),
    ],
)
def test_what_the_fourth_eighth_and_twelfth_model_leave_of_themselves(rounding, expected):
    """With a step that is 1 % larger in what was merged before, as it happens: ties then all fall to the old model."""
    found = [kept(count, rounding, 1.01) for count in (4, 8, 12)]
    assert found == pytest.approx(expected, abs=0.02)


def test_nearest_decides_ties_for_the_model_with_the_larger_step():
    assert kept(4, Nearest(), 1.0) == pytest.approx(0.91, abs=0.02)
    assert kept(4, Nearest(), 0.99) == pytest.approx(1.29, abs=0.02)
    assert kept(4, Noise(), 0.99) == pytest.approx(0.91, abs=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_best_of_a_hundred_is_no_better_than_one(bits):
    """HDRQ's search among samples; what balances the two models is that ties fall either way at all."""
    random = np.random.default_rng(bits)
    limit = 2 ** (bits - 1)
    base = random.normal(0, limit / 4, (64, 64))
    models = [
        tensor(np.rint((base + random.normal(0, 1, base.shape)) / step).clip(-limit, limit - 1), step, bits)
        for step in (1.03, 0.996)
    ]
    blend = Blend([m.codes for m in models], [m.step.astype(np.float64) for m in models], [0.5, 0.5])

    def cosines(rounding: Rounding) -> np.ndarray:
        return np.sort(similarities(blend, merge_tensors(models, [0.5, 0.5], rounding).codes.astype(np.float64)))

    nearest, one, best = cosines(Nearest()), cosines(Noise()), cosines(Noise(samples=PAPER_SAMPLES))
    assert nearest[1] - nearest[0] > 0.05  # biased to one of them
    assert one[1] - one[0] < 0.005
    assert (best - one).max() < 0.001


def test_a_better_sample_is_taken():
    """On six weights a hundred samples do hold better ones."""
    models = [tensor([0, 3, 10, -7, 5, 1]), tensor([1, 6, 17, -8, 0, 10])]
    blend = Blend([m.codes for m in models], [np.asarray(1.0)] * 2, [0.5, 0.5])

    def worst(samples: int, seed: int) -> float:
        codes = merge_tensors(models, [0.5, 0.5], Noise(everywhere=True, samples=samples), seed=seed).codes
        return float(similarities(blend, codes.astype(np.float64)).min())

    gains = [worst(100, seed) - worst(1, seed) for seed in range(20)]
    assert min(gains) >= 0
    assert np.mean(gains) > 0.005


# --- whole models


def test_activations():
    merged = merge_activations([ActivationRange(0.1, 10, 8), ActivationRange(0.3, 20, 8)], [0.5, 0.5])
    assert (merged.step, merged.zero_point, merged.bits) == (pytest.approx(0.2), 18, 8)  # (1 + 6) / 2 below zero
    assert merge_activations([ActivationRange(0.1, 3, 4)], [1.0]) == ActivationRange(0.1, 3, 4)
    unsigned = [ActivationRange(0.2, 0, 8), ActivationRange(0.4, 0, 8)]
    assert merge_activations(unsigned, [0.25, 0.75]).zero_point == 0
    with pytest.raises(ValueError, match="bits"):
        merge_activations([ActivationRange(0.1, 3, 4), ActivationRange(0.1, 3, 8)], [0.5, 0.5])


def model(seed: int, names=("one.weight", "two.weight")) -> QuantizedModel:
    random = np.random.default_rng(seed)
    return QuantizedModel(
        weights={
            name: tensor(random.integers(-128, 128, (4, 6)), random.uniform(0.1, 1, 4)) for name in names
        },
        floats={"one.bias": random.normal(size=4).astype(np.float32)},
        activations={"one.weight:input": ActivationRange(float(random.uniform(0.1, 1)), 7, 8)},
    )  # fmt: skip


def test_models_merge_tensor_by_tensor():
    models, weights = [model(1), model(2), model(3)], [0.5, 0.25, 0.25]
    merged = merge_models(models, weights, Stochastic(), seed=5)
    for name in ("one.weight", "two.weight"):
        alone = merge_tensors([m.weights[name] for m in models], weights, Stochastic(), seed=5, name=name)
        assert (merged.weights[name].codes == alone.codes).all()
    mean = sum(w * m.floats["one.bias"].astype(np.float64) for w, m in zip(weights, models, strict=True))
    np.testing.assert_allclose(merged.floats["one.bias"], mean, rtol=1e-6)
    assert merged.floats["one.bias"].dtype == np.float32
    assert merged.activations == {
        "one.weight:input": merge_activations([m.activations["one.weight:input"] for m in models], weights)
    }
    assert merged.report["rounding"] == "stochastic"


def test_neither_the_models_order_nor_their_tensors_matters():
    models, weights = [model(1), model(2), model(3)], [0.5, 0.25, 0.25]
    one = merge_models(models, weights, Noise(), seed=5)
    turned = merge_models(models[::-1], weights[::-1], Noise(), seed=5)
    alone = merge_models([model(s, ("one.weight",)) for s in (1, 2, 3)], weights, Noise(), seed=5)
    # A mean of numbers that cancel shows the order in which they are summed.
    biases = [{"one.bias": np.full(4, value, np.float32)} for value in (1e20, 1, -1e20)]
    cancelling = [replace(m, floats=floats) for m, floats in zip(models, biases, strict=True)]
    means = {
        merge_models([cancelling[i] for i in order], [1 / 3] * 3, Nearest()).floats["one.bias"].tobytes()
        for order in permutations((0, 1, 2))
    }
    assert len(means) == 1
    assert (one.weights["one.weight"].codes == turned.weights["one.weight"].codes).all()
    assert one.floats["one.bias"].tobytes() == turned.floats["one.bias"].tobytes()
    assert (one.weights["one.weight"].codes == alone.weights["one.weight"].codes).all()


def test_models_that_differ_are_named():
    with pytest.raises(ValueError, match=r"weights: two\.weight"):
        merge_models([model(1), model(2, ("one.weight",))], [0.5, 0.5], Nearest())
    other = model(2)
    broken = QuantizedModel(other.weights, {"one.bias": np.ones(3, np.float32)}, other.activations)
    with pytest.raises(ValueError, match=r"one\.bias"):
        merge_models([model(1), broken], [0.5, 0.5], Nearest())
