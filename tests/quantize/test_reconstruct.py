"""Reconstruction of one stretch: schedule, mixture, loss and what is learned."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured import inputs, known

from foldd.base.blocks import find_blocks
from foldd.core.quantized import ActivationRange
from foldd.quantize.calibrate import choose_ranges, observe_network
from foldd.quantize.descent import Descent
from foldd.quantize.hdrq import as_published
from foldd.quantize.latent import Latent
from foldd.quantize.places import find_places
from foldd.quantize.reconstruct import Ranges, Stretch, reconstruct
from foldd.quantize.steps import best_step, fake_quantize, nearest_codes, shaped


@cache
def residual():
    network, weights = known("residual")
    return network, weights, find_blocks(network)[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ranges_of(network, weights):
    return choose_ranges(network, observe_network(network, weights, inputs(64)), 8)


class Recorder:
    """A weight that is learned as it is, and what it was asked."""

    def __init__(self, weight):
        self.value, self.asked = weight.clone().requires_grad_(), []

    def parameters(self, descent):
        return [{"params": [self.value], "lr": descent.rate}]

    def weight(self, progress, *, real, generator):
        self.asked.append((progress, real))
        return self.value

    def penalty(self, progress):
        return 0.0


def learn(descent, *, ranges=None, seed=0, quantized=None, plain=None, targets=None, roundings=None, n=8):
    """Reconstructs the second block of `residual`; gives the losses, the roundings and the ranges."""
    network, weights, block = residual()
    made = Ranges(find_places(network), ranges or {})
    x = inputs(n, shape=(8, 4, 4)).relu()
    quantized, plain = (x if given is None else given for given in (quantized, plain))
    if targets is None:
        with torch.no_grad():
            targets = Stretch(network, block.entry, block.nodes, Ranges((), {})).run(x, weights)
    if roundings is None:
        roundings = {layer.weight: Recorder(weights[layer.weight]) for layer in block.layers}
    stretch, seen = Stretch(network, block.entry, block.nodes, made), []
    losses = reconstruct(
        stretch, block.layers, roundings, weights, quantized, plain, targets, descent, generator(seed), seen.append
    )
    return losses, roundings, made, seen


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    descent = Descent(1000, warmup=0.2)
    factors = [descent.factor(i) for i in range(1000)]
    assert factors[:200] == pytest.approx([(i + 1) / 200 for i in range(200)])
    assert factors[200:] == pytest.approx([(1 + math.cos(math.pi * i / 800)) / 2 for i in range(800)])
    assert Descent(1).factor(0) == 1


def test_published_settings_are_16500_iterations_of_noise_and_3500_of_rounding():
    how = as_published(4, 8)
    descent = how.descent
    assert (how.noise, how.pull, how.per_channel, how.weight_bits, how.activation_bits) == (True, 0.05, False, 4, 8)
    assert (descent.iterations, descent.rate, descent.in_steps, descent.drop) == (20_000, 1e-3, False, 0.5)
    assert descent.iterations - round(descent.iterations * descent.real) == 16_500
    _, roundings, _, _ = learn(Descent(400, real=descent.real), n=1)
    for rounding in roundings.values():
        assert [real for _, real in rounding.asked] == [False] * 330 + [True] * 70
        assert [progress for progress, _ in rounding.asked] == [i / 400 for i in range(400)]


def test_progress_is_told_after_each_iteration():
    *_, seen = learn(Descent(5))
    assert seen == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_loss_is_the_squared_error_summed_over_channels():
    """Of one input, so that nothing is drawn; in float64."""
    _, w, _ = residual()
    x, targets = inputs(1, shape=(8, 4, 4)), torch.randn(1, 12, generator=generator(3))
    wide = {n: t.double() for n, t in w.items()}
    left = F.conv2d(x.double(), wide["conv.weight"], wide["conv.bias"], 1, 1)
    output = F.relu(left + F.conv2d(x.double(), wide["shortcut.weight"])).mean((2, 3))
    expected = float((output - targets).square().sum(1).mean())
    (first, last), _, _, _ = learn(Descent(30), quantized=x, plain=x, targets=targets)
    assert first == pytest.approx(expected, rel=1e-5)
    assert last < 0.9 * first


def test_channels_of_an_image_are_its_second_axis():
    network, w, _ = residual()
    (stem,) = find_blocks(network)[0].layers
    stretch = Stretch(network, network.entry, find_blocks(network)[0].nodes, Ranges((), {}))
    x, targets = inputs(1), torch.zeros(1, 8, 4, 4)
    with torch.no_grad():
        output = stretch.run(x, w)
    recorder = Recorder(w[stem.weight])
    first, _ = reconstruct(
        stretch, (stem,), {stem.weight: recorder}, w, x, x, targets, Descent(1), generator(), lambda _: None
    )
    assert first == pytest.approx(float(output.double().square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(("drop", "used"), [(0.0, "quantized"), (1.0, "plain")])
def test_dropping_chooses_between_the_quantized_and_the_float_input(drop, used):
    """At either end the other one has no part, not in a single bit; in between both have."""
    other = "plain" if used == "quantized" else "quantized"
    x = inputs(8, shape=(8, 4, 4)).relu()

    def learned(drop, **given):
        _, roundings, _, _ = learn(Descent(4, drop=drop), **given)
        return torch.cat([r.value.detach().flatten() for r in roundings.values()])

    assert torch.equal(learned(drop), learned(drop, **{other: x + 1}))
    assert not torch.equal(learned(drop), learned(drop, **{used: x + 1}))
    for changed in (used, other):
        assert not torch.equal(learned(0.5), learned(0.5, **{changed: x + 1}))


def test_ranges_are_learned_but_for_what_is_always_dropped():
    """Steps move, zero points and bits do not, and neither do ranges of other blocks."""
    network, w, _ = residual()
    given = ranges_of(network, w)
    *_, kept, _ = learn(Descent(5, drop=1.0), ranges=given)
    for key, r in kept.result().items():
        assert r.step == pytest.approx(given[key].step, rel=1e-6)
    *_, moved, _ = learn(Descent(5, drop=0.0, range_rate=1e-2), ranges=given)
    inside = {"conv.weight:output", "shortcut.weight:output", "conv.weight:sum"}
    for key, r in moved.result().items():
        assert (r.zero_point, r.bits) == (given[key].zero_point, given[key].bits)
        assert r.step > 0
        assert (abs(math.log(r.step / given[key].step)) > 1e-3) == (key in inside)


def test_a_stretch_quantizes_where_it_should():
    """Against the same arithmetic by hand, with coarse ranges so that it shows."""
    network, w, block = residual()
    given = {
        "conv.weight:output": ActivationRange(0.3, 100, 8), "shortcut.weight:output": ActivationRange(0.2, 8, 4),
        "conv.weight:sum": ActivationRange(0.5, 0, 3),
    }  # fmt: skip

    def rounded(x, key):
        r = given[key]
        return torch.fake_quantize_per_tensor_affine(x, r.step, r.zero_point, 0, 2**r.bits - 1)

    x = inputs(4, shape=(8, 4, 4))
    left = rounded(F.conv2d(x, w["conv.weight"], w["conv.bias"], 1, 1), "conv.weight:output")
    right = rounded(F.conv2d(x, w["shortcut.weight"]), "shortcut.weight:output")
    expected = rounded(F.relu(left + right), "conv.weight:sum").mean((2, 3))
    with torch.no_grad():
        actual = Stretch(network, block.entry, block.nodes, Ranges(find_places(network), given)).run(x, w)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("noise", [True, False])
def test_the_same_seed_learns_the_same_bits(noise):
    network, w, block = residual()

    def codes(seed):
        roundings = {
            layer.weight: Latent(
                w[layer.weight], best_step(w[layer.weight], 3, per_channel=True), 3, base=None, noise=noise, pull=0
            )
            for layer in block.layers
        }
        learn(Descent(20), roundings=roundings, seed=seed, ranges=ranges_of(network, w))
        results = [rounding.result() for rounding in roundings.values()]
        return b"".join(r.codes.tobytes() + r.step.tobytes() for r in results)

    assert codes(1) == codes(1)
    assert codes(1) != codes(2)


def latent(bits=4, **changes):
    weight = torch.randn(6, 20, generator=generator(1))
    settings = {"base": None, "noise": True, "pull": 0.0} | changes
    return weight, Latent(weight, best_step(weight, bits, per_channel=True), bits, **settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_that_learns_nothing_is_rounded_to_the_nearest(bits):
    weight, rounding = latent(bits)
    step = best_step(weight, bits, per_channel=True)
    result = rounding.result()
    assert result.bits == bits
    assert np.array_equal(result.codes, nearest_codes(weight, step, bits).numpy())
    assert result.step == pytest.approx(step.numpy(), rel=1e-6)
    real = rounding.weight(0.9, real=True, generator=generator())
    expected = fake_quantize(weight, shaped(step, weight), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.testing.assert_close(real, expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(result.values(), expected.detach().numpy(), rtol=1e-5)


def test_noise_comes_first_and_only_where_it_is_asked_for():
    weight, rounding = latent()
    one, other = (rounding.weight(0, real=False, generator=generator(seed)) for seed in (1, 2))
    assert not torch.equal(one, other)
    codes = (one / best_step(weight, 4, per_channel=True).reshape(-1, 1)).detach()
    assert ((codes - codes.round()).abs() > 0.01).double().mean() > 0.5
    for changes, real in (({}, True), ({"noise": False}, False)):
        _, rounding = latent(**changes)
        one, other = (rounding.weight(0, real=real, generator=generator(seed)) for seed in (1, 2))
        assert torch.equal(one, other)


def test_the_pull_is_the_distance_and_its_gradient_of_constant_strength():
    """λ‖W − W⁰‖, not squared: its gradient has the norm λ wherever W is."""
    base = torch.randn(6, 20, generator=generator(2))
    weight, rounding = latent(base=base, pull=0.3)
    penalty = rounding.penalty(0.5)
    assert float(penalty.detach()) == pytest.approx(0.3 * np.linalg.norm((weight - base).double().numpy()), rel=1e-6)
    penalty.backward()
    (parameter,) = rounding.parameters(Descent(10))[0]["params"]
    assert float(parameter.grad.norm()) == pytest.approx(0.3, rel=1e-5)
    assert latent(base=None, pull=0.3)[1].penalty(0) == 0
    assert latent(base=base, pull=0.0)[1].penalty(0) == 0


def test_a_weight_that_is_its_base_is_pulled_nowhere():
    """The norm has no gradient at 0: it may not become NaN."""
    weight, _ = latent()
    rounding = Latent(weight, best_step(weight, 4, per_channel=True), 4, base=weight, noise=True, pull=1.0)
    rounding.penalty(0.0).backward()
    (parameter,) = rounding.parameters(Descent(10))[0]["params"]
    assert torch.equal(parameter.grad, torch.zeros_like(weight))


def test_rates_are_in_steps_or_absolute():
    weight, rounding = latent()
    step = float(best_step(weight, 4, per_channel=True).mean())
    weights, steps = rounding.parameters(Descent(10, rate=0.02, step_rate=3e-3))
    assert weights["lr"] == pytest.approx(0.02 * step, rel=1e-5)
    assert steps["lr"] == 3e-3
    assert rounding.parameters(Descent(10, rate=1e-3, in_steps=False))[0]["lr"] == 1e-3
