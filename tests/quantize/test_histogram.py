"""Histograms against the raw data that they stand for, and ranges against brute force over it, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foldd.core.quantized import ActivationRange
from foldd.quantize.histogram import BINS, SIZE, best_range, combine, observe, widest_range

KINDS = ["normal", "relu", "shifted", "heavy", "negative", "uniform"]


def sample(kind, n=20_000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": x, "relu": x.relu(), "shifted": (x + 2).abs() - 0.3, "heavy": x**5, "negative": -x.abs(),
        "uniform": x.erf() * 7,
    }[kind]  # fmt: skip


def error_of(values, low, high, bits):
    """Σ|x − x̂|^2.4 of all values, as an activation range of these bounds quantizes them, float64."""
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(values / step), -zero, 2**bits - 1 - zero)
    return (np.abs(values - codes * step) ** 2.4).mean()


def bounds(given: ActivationRange):
    return -given.zero_point * given.step, (2**given.bits - 1 - given.zero_point) * given.step


@pytest.mark.parametrize("kind", KINDS)
def test_shares_sum_to_one_and_are_where_the_values_are(kind):
    values = sample(kind)
    histogram = observe(values.reshape(100, 2, 100))
    assert (histogram.dtype, histogram.shape) == (torch.float32, (SIZE,))
    assert float(histogram[2:].double().sum()) == pytest.approx(1, abs=1e-5)
    assert (histogram[0], histogram[1]) == (values.min(), values.max())
    x = values.double().numpy()
    assert float(histogram[2]) == pytest.approx((np.abs(x) < 2.0**-20).mean(), abs=1e-7)
    negative, positive = histogram[3 : 3 + BINS].numpy(), histogram[3 + BINS :].numpy()
    edges = 2.0 ** (np.arange(BINS + 1) / 8 - 20)
    # A value on an edge may fall to either side of it.
    np.testing.assert_allclose(positive, np.histogram(x, edges)[0] / len(x), atol=1.01 / len(x))
    np.testing.assert_allclose(negative, np.histogram(-x, edges)[0] / len(x), atol=1.01 / len(x))


def test_values_off_the_scale_are_counted_at_its_ends():
    histogram = observe(torch.tensor([1e-30, -1e-30, 0.0, 1e9, -1e9, 1e-30, 0, 0]))
    assert histogram[2] == 6 / 8
    assert histogram[2 + BINS] == histogram[-1] == 1 / 8
    assert (histogram[0], histogram[1]) == (-1e9, 1e9)
    assert best_range(histogram, 8) == widest_range(histogram, 8)


def test_what_is_no_number_counts_as_nothing_and_what_is_endless_as_large():
    histogram = observe(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]))
    assert histogram[2] == histogram[2 + BINS] == histogram[-1] == 1 / 4


@pytest.mark.parametrize("scale", [1e-9, 1e5, 1e8])
def test_off_the_scale_a_range_is_wide_rather_than_wrong(scale):
    values = scale * sample("normal").clamp(-3, 3)
    low, high = bounds(best_range(observe(values), 8))
    assert 0.8 * scale < -low / 3 < 1.01 * scale
    assert 0.8 * scale < high / 3 < 1.01 * scale


def test_combining_is_commutative_associative_and_what_both_were():
    a, b, c = (observe(sample(kind, seed=i)) for i, kind in enumerate(("normal", "heavy", "relu")))
    assert torch.equal(combine(a, b), combine(b, a))
    torch.testing.assert_close(combine(combine(a, b), c), combine(a, combine(b, c)))
    both = observe(torch.cat([sample("normal", seed=0), sample("heavy", seed=1)]))
    joined = combine(a, b)
    assert torch.equal(joined[:2], both[:2])
    torch.testing.assert_close(joined[2:], 2 * both[2:], rtol=1e-5, atol=1e-7)
    assert float(joined[2:].sum()) == pytest.approx(2, abs=1e-5), "each has one share, however many values it saw"


def test_combining_changes_neither():
    a, b = observe(sample("normal")), observe(sample("relu"))
    copies = a.clone(), b.clone()
    combine(a, b)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


def test_the_size_is_constant():
    sizes = {observe(sample(kind, n)).numel() for kind in KINDS for n in (1, 7, 10_000)}
    sizes.add(combine(observe(sample("normal")), observe(sample("heavy"))).numel())
    assert sizes == {SIZE}
    assert SIZE * 4 < 2600


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_range_is_nearly_brute_forces_over_the_values(kind, bits):
    """All pairs of shrunken bounds, on the values themselves; the histogram knows them to an eighth of an octave."""
    values = sample(kind, 4000)
    found = best_range(observe(values), bits)
    x = values.double().numpy()
    low, high = min(0.0, x.min()), max(0.0, x.max())
    shares = np.linspace(0.04, 1, 60)
    pairs = [(low * a * b, high * b) for a in (np.linspace(0.2, 1.4, 9) if low < 0 < high else [1.0]) for b in shares]
    least = min(error_of(x, a, b, bits) for a, b in pairs)
    assert error_of(x, *bounds(found), bits) < 1.15 * least
    assert error_of(x, *bounds(found), bits) <= 1.02 * error_of(x, low, high, bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_shrunken_range_is_better(kind, bits):
    """All of them, on what a histogram knows: each bin is eight values in it. The search need not try all."""
    histogram = observe(sample(kind)).double().numpy()
    found = best_range(torch.from_numpy(histogram).float(), bits)
    magnitude = 2.0 ** ((np.arange(8 * BINS) + 0.5) / 64 - 20)
    values = np.concatenate([-magnitude, magnitude]).clip(histogram[0], histogram[1])
    shares = np.repeat(histogram[3:] / 8, 8)
    values, shares = values[shares > 0], shares[shares > 0]
    low, high = min(0.0, histogram[0]), max(0.0, histogram[1])

    def error(low, high):
        step = (high - low) / (2**bits - 1)
        zero = np.rint(-low / step)
        codes = np.clip(np.rint(values / step), -zero, 2**bits - 1 - zero)
        return (np.abs(values - codes * step) ** 2.4 * shares).sum()

    smaller = np.arange(5, 51) / 50
    least = min(error(low * a * b, high * b) for a in ([1, 0.8, 0.6, 0.4] if low < 0 < high else [1]) for b in smaller)
    assert error(*bounds(found)) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_range_is_never_wider_than_the_widest(kind):
    histogram, values = observe(sample(kind)), sample(kind)
    for bits in (4, 8):
        widest, best = widest_range(histogram, bits), best_range(histogram, bits)
        low, high = bounds(widest)
        assert best.step <= widest.step * (1 + 1e-9)
        assert low <= min(0.0, float(values.min())) + widest.step
        assert high >= max(0.0, float(values.max())) - widest.step
        if kind == "heavy" and bits == 4:
            assert best.step < 0.8 * widest.step, "outliers would cost all the others their resolution"


@pytest.mark.parametrize("choose", [best_range, widest_range])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_is_a_code_exactly(choose, kind, bits):
    found = choose(observe(sample(kind)), bits)
    assert isinstance(found.zero_point, int)
    assert 0 <= found.zero_point <= 2**bits - 1
    assert found.step > 0
    assert found.bits == bits
    expected = {"relu": 0, "negative": 2**bits - 1}.get(kind)
    assert expected is None or found.zero_point == expected


def test_what_never_is_negative_spends_no_code_on_it():
    for values in (sample("normal").abs() + 5, sample("relu")):
        for choose in (best_range, widest_range):
            assert choose(observe(values), 8).zero_point == 0


@pytest.mark.parametrize("choose", [best_range, widest_range])
def test_activations_that_are_all_zero_have_a_range(choose):
    found = choose(observe(torch.zeros(50)), 8)
    assert found == ActivationRange(1.0, 0, 8)


@pytest.mark.parametrize("scale", [2.0**-9, 2.0**5])
@pytest.mark.parametrize("kind", ["normal", "relu", "uniform"])
def test_powers_of_two_change_the_step_and_nothing_else(kind, scale):
    values = sample(kind)
    values = torch.where(values.abs() < 1e-3, 0.0, values)  # what is next to nothing falls off the scale
    for choose in (best_range, widest_range):
        one, other = choose(observe(values), 8), choose(observe(scale * values), 8)
        assert other.zero_point == one.zero_point
        assert other.step == pytest.approx(scale * one.step, rel=1e-12)


def test_a_task_with_small_activations_keeps_its_part_in_the_range():
    """Each task has one share; the wide one, with its outliers, alone would have another range."""
    wide, narrow = observe(sample("normal")), observe(sample("normal", seed=1) * 0.3)
    both = combine(wide, narrow)
    assert best_range(narrow, 4).step < best_range(both, 4).step
    many = both
    for _ in range(200):
        many = combine(many, narrow)
    assert best_range(many, 4).step < best_range(wide, 4).step
