"""Real values to integers: how far they move, that they do not move on average, and that integers stay."""

from __future__ import annotations

import numpy as np
import pytest

from foldd.core import rounding
from foldd.core.rounding import channel_steps, random_for, to_integers


@pytest.fixture
def values() -> np.ndarray:
    random = np.random.default_rng(0)
    rows = random.standard_normal((6, 40, 3)) * np.array([1e-8, 1e-3, 1, 1, 50, 0])[:, None, None]
    return rows.astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearest_moves_no_value_by_more_than_half_a_step(values, bits):
    got = to_integers(values, bits)
    limit = 2 ** (bits - 1) - 1
    assert (got.codes.dtype, got.step.dtype, got.step.shape, got.bits) == (np.int8, np.float32, (6,), bits)
    assert np.abs(got.codes[:5]).max((1, 2)).tolist() == [limit] * 5  # nothing finer would do
    error = np.abs(got.values().astype(np.float64) - values)
    assert (error <= got.step[:, None, None] * (0.5 + 1e-6)).all()
    assert error.max((1, 2))[:5] == pytest.approx(got.step[:5] / 2, rel=0.3)
    assert not got.values()[5].any()


def test_steps_are_positive_and_finite_whatever_comes():
    values = np.array([[0, 0], [1e-45, 0], [3e38, -3e38], [-3e38, 1]], np.float32)
    steps = channel_steps(values, 8)
    assert np.isfinite(steps).all()
    assert (steps > 0).all()
    assert steps[3] == np.float32(3e38 / 127)
    assert np.isfinite(to_integers(values, 8).values()).all()


def test_without_bias_the_mean_over_seeds_is_the_value(values):
    seeds = 400
    drawn = np.mean([to_integers(values, 4, random_for(s, "w")).values().astype(np.float64) for s in range(seeds)], 0)
    step = channel_steps(values, 4)[:, None, None].astype(np.float64)
    share = values / step % 1
    deviation = step * np.sqrt(share * (1 - share) / seeds)
    assert (np.abs(drawn - values) <= 5 * deviation + 1e-4 * step).all()
    nearest = to_integers(values, 4).values()
    assert (np.abs(nearest - values)[:5] > 5 * deviation[:5] + 1e-4 * step[:5]).mean() > 0.4


class Always:
    """The random numbers that are least likely to be drawn."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self, shape):
        return np.full(shape, self.number)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
def test_what_was_rounded_is_not_rounded_again(values, number):
    for seed in range(5):
        once = to_integers(values, 8, random_for(seed, "w"))
        again = to_integers(once.values(), 8, Always(number))
        assert (again.codes == once.codes).all()
        np.testing.assert_allclose(again.step[:5], once.step[:5], rtol=1e-6)


def test_pieces_change_nothing(values, monkeypatch):
    whole = to_integers(values, 8, random_for(1, "w"))
    monkeypatch.setattr(rounding, "PIECE", 250)  # two channels
    pieces = to_integers(values, 8, random_for(1, "w"))
    assert (pieces.codes == whole.codes).all()
    assert (pieces.step == whole.step).all()


def test_random_numbers_depend_on_seed_and_name():
    drawn = {(s, n): random_for(s, n).random(4).tobytes() for s in (1, 2) for n in ("a", "b")}
    assert len(set(drawn.values())) == 4
    assert random_for(1, "a").random(4).tobytes() == drawn[1, "a"]
    # Bytes of states depend on these numbers: a library that drew others would break every replay.
    assert random_for(0, "conv.weight").random(2).tolist() == [0.9888305045635496, 0.44815862006873697]
