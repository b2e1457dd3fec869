"""Rounding and steps against numpy in float64, brute force, finite differences and two-sample statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foldd.quantize.steps import (
    best_step,
    code_range,
    fake_quantize,
    largest_step,
    nearest_codes,
    noisy,
    shaped,
)

BITS = [2, 3, 4, 8]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(values, step, low, high):
    """HDRQ's equation 8 in float64."""
    values, step = np.asarray(values, np.float64), np.asarray(step, np.float64)
    return np.clip(np.rint(values / step), low, high) * step


def error_of(weight, step, bits):
    """Σ|w − ŵ|^2.4 of each row for one step, float64."""
    weight = weight.numpy().astype(np.float64).reshape(len(weight), -1)
    return (np.abs(weight - rounded(weight, step, *code_range(bits))) ** 2.4).sum(1)


def test_code_ranges_are_twos_complement():
    assert [code_range(bits) for bits in BITS] == [(-2, 1), (-4, 3), (-8, 7), (-128, 127)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_fake_quantize_is_equation_8(bits, per_channel):
    values, (low, high) = random(6, 5, 3) * 2.0 ** (bits - 3), code_range(bits)
    step = torch.tensor([0.11, 0.23, 0.5, 1.0, 0.07, 0.31]) if per_channel else torch.tensor(0.17)
    actual = fake_quantize(values, shaped(step, values), low, high).numpy()
    expected = rounded(values, shaped(step, values), low, high)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert (actual == (shaped(step, values) * high).numpy()).any(), "nothing was clipped"
    codes = nearest_codes(values, step, bits)
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), np.rint(expected / shaped(step, values).double().numpy()))


def test_halves_go_to_the_even_code():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert fake_quantize(values, torch.tensor(1.0), -8, 7).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_lsqs(per_channel):
    """LSQ: dx̂/dx is 1 inside and 0 outside; dx̂/dΔ is ⌊x/Δ⌉ − x/Δ inside, and the bound outside."""
    values, (low, high) = random(4, 50).requires_grad_(), code_range(3)
    step = (torch.tensor([0.2, 0.3, 0.4, 0.5]) if per_channel else torch.tensor(0.3)).requires_grad_()
    weights = random(4, 50, seed=1)
    (weights * fake_quantize(values, shaped(step, values), low, high)).sum().backward()
    x, s, w = (t.detach().double().numpy() for t in (values, shaped(step, values), weights))
    scaled = x / s
    inside = (scaled > low) & (scaled < high)
    assert 0.1 < inside.mean() < 0.95
    np.testing.assert_allclose(values.grad.numpy(), w * inside, rtol=1e-6)
    to_step = w * np.where(inside, np.rint(scaled) - scaled, np.where(scaled <= low, low, high))
    expected = to_step.sum(1) if per_channel else to_step.sum()
    assert step.grad.shape == step.shape
    np.testing.assert_allclose(step.grad.numpy(), expected, rtol=1e-4)


def test_clipped_values_have_the_true_gradient_of_the_step():
    """Where nothing is rounded across a boundary the function is differentiable in the step: x̂ = code · Δ."""
    values, step, epsilon = torch.tensor([9.0, -9.0, 30.0]), torch.tensor(1.0, requires_grad=True), 1e-3
    fake_quantize(values, step, -4, 3).sum().backward()
    up, down = (fake_quantize(values, torch.tensor(1 + sign * epsilon), -4, 3).sum() for sign in (1, -1))
    assert float(step.grad) == pytest.approx(float(up - down) / (2 * epsilon), rel=1e-3)


def test_a_step_that_is_not_learned_gets_no_gradient():
    values, step = random(10).requires_grad_(), torch.tensor(0.1)
    fake_quantize(values, step, -4, 3).sum().backward()
    assert step.grad is None
    assert values.grad is not None


@pytest.mark.parametrize("per_channel", [True, False])
def test_values_that_stay_are_as_if_they_never_met_a_step(per_channel):
    """As choosing afterwards gives, value and gradients."""
    stays = (random(4, 50, seed=2) > 0.3).float()
    results = []
    for within in (True, False):
        values = random(4, 50).requires_grad_()
        step = (torch.tensor([0.2, 0.3, 0.4, 0.5]) if per_channel else torch.tensor(0.3)).requires_grad_()
        if within:
            mixed = fake_quantize(values, shaped(step, values), *code_range(3), stays)
        else:
            mixed = torch.where(stays > 0, values, fake_quantize(values, shaped(step, values), *code_range(3)))
        (random(4, 50, seed=1) * mixed).sum().backward()
        results.append((mixed, values.grad, step.grad))
    assert 0.2 < float(stays.mean()) < 0.5
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform"])
def test_the_best_step_is_nearly_brute_forces(bits, kind):
    """Over 4,000 steps for each channel; the grid of 41 costs little, the most where errors are small in any case."""
    weight = {"normal": random(5, 300), "heavy": random(5, 300) ** 3, "uniform": random(5, 300).erf()}[kind]
    weight = weight * torch.tensor([1, 0.1, 0.2, 3, 40]).reshape(-1, 1)
    step = best_step(weight, bits, per_channel=True)
    actual = error_of(weight, step.double().numpy().reshape(-1, 1), bits)
    top = largest_step(weight, bits, per_channel=True).double().numpy().reshape(-1, 1)
    least = np.min([error_of(weight, top * share, bits) for share in np.linspace(0.15, 1.2, 4000)], axis=0)
    assert (actual < (1.2 if bits == 8 else 1.08) * least).all()
    assert (actual <= error_of(weight, top, bits) * (1 + 1e-5)).all()


def weights_of(kind):
    """64 channels, in pieces of a few; `wide`: each is a piece of its own and more."""
    weight, size = random(64, 2100, seed=5), torch.logspace(-3, 1, 64).reshape(-1, 1)
    outlier = torch.where(torch.arange(64).reshape(-1, 1) == 9, 500 * weight, weight)
    return {
        "normal": size * weight, "heavy": size * weight**5, "outlier": outlier, "constant": size.expand(64, 2100),
        "dead": torch.where(size > 0.1, weight, 0.0), "wide": random(2, 100_000, seed=6) ** 3,
    }[kind]  # fmt: skip


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier", "constant", "dead", "wide"])
def test_no_share_of_the_largest_step_is_better(kind, bits, per_channel):
    """All 41 of them, in float64; the search need not try all, and sums in float32 and in pieces."""
    weight = weights_of(kind)
    step = best_step(weight, bits, per_channel=per_channel)
    rows = weight if per_channel else weight.reshape(1, -1)
    top = largest_step(weight, bits, per_channel=per_channel).double().reshape(-1, 1).numpy()
    least = np.min([error_of(rows, top * share, bits) for share in np.arange(10, 51) / 50], axis=0)
    slack = rows.shape[1] * (1e-6 * rows.abs().amax(1).double().numpy()) ** 2.4  # float32 rounds the step itself
    held = step.double().reshape(-1, 1).numpy() > step.max().item() / 1000  # others have the smallest step there may be
    actual = error_of(rows, step.double().reshape(-1, 1).numpy(), bits)
    assert held.sum() >= (1 if not per_channel or kind == "wide" else 30)
    assert (actual <= 1.0001 * least + slack)[held.reshape(-1)].all()


def test_few_bits_clip_and_the_largest_step_holds_everything():
    weight = random(3, 1000)
    shares = best_step(weight, 3, per_channel=True) / largest_step(weight, 3, per_channel=True)
    assert (shares < 0.9).all()
    for bits in BITS:
        top = largest_step(weight, bits, per_channel=True)
        assert torch.allclose(top * code_range(bits)[1], weight.abs().amax(1))


@pytest.mark.parametrize("bits", BITS)
def test_one_channel_and_one_tensor_are_the_same(bits):
    weight = random(1, 4, 3, 3)
    for choose in (best_step, largest_step):
        channel, tensor = (choose(weight, bits, per_channel=flag) for flag in (True, False))
        assert (channel.shape, tensor.shape) == ((1,), ())
        assert channel.item() == tensor.item()


def test_a_channels_step_is_its_own():
    weight = random(4, 30) * torch.tensor([1, 2, 3, 4.0]).reshape(-1, 1)
    step = best_step(weight, 4, per_channel=True)
    for i in range(4):
        assert step[i] == best_step(weight[i : i + 1], 4, per_channel=False)
    assert best_step(weight, 4, per_channel=False) > step.min()


@pytest.mark.parametrize("per_channel", [True, False])
def test_steps_scale_with_the_weight(per_channel):
    weight = random(4, 30)
    one = best_step(weight, 4, per_channel=per_channel)
    for factor in (2.0**-12, 0.5, 2.0**9):
        assert torch.equal(best_step(factor * weight, 4, per_channel=per_channel), factor * one)
        assert torch.equal(nearest_codes(factor * weight, factor * one, 4), nearest_codes(weight, one, 4))


@pytest.mark.parametrize("choose", [best_step, largest_step])
def test_a_dead_channel_has_a_step_that_is_not_out_of_proportion(choose):
    """Its bias is counted in its steps: they may not be next to nothing."""
    weight = random(3, 40)
    weight[1] = 0
    step = choose(weight, 4, per_channel=True)
    assert step[1] == step.max() / 1024
    assert (nearest_codes(weight, step, 4)[1] == 0).all()
    others = choose(weight[[0, 2]], 4, per_channel=True)
    assert torch.equal(step[[0, 2]], others)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_of_zeros_is_quantized_to_zeros(per_channel):
    """As a convolution has whose BatchNorm's scale is 0; the step is learned as a logarithm, and must come back."""
    weight = torch.zeros(16, 9)
    step = best_step(weight, 4, per_channel=per_channel)
    again = step.log().exp()
    assert (step >= 2.0**-24).all(), "products with the step of an activation are to be no denormal numbers"
    assert again.numpy() == pytest.approx(step.numpy(), rel=1e-5)
    values = fake_quantize(weight, shaped(again, weight), *code_range(4))
    assert torch.equal(values, weight)
    assert (nearest_codes(weight, again, 4) == 0).all()


def noise_of(values, step, low, high, seed=0):
    drawn = noisy(values, step, low, high, torch.Generator().manual_seed(seed))
    return ((drawn - values) / step).double().numpy()


def largest_gap(left, right):
    """Kolmogorov and Smirnov's statistic of two samples."""
    points = np.concatenate([left, right])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (left, right)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize("kind", ["uniform errors", "errors of one sign", "few errors"])
def test_noise_is_drawn_from_the_rounding_errors(kind):
    """As ŵ would differ from w; a quarter of the critical value's square root law leaves no doubt at 20,000 samples."""
    base = torch.arange(-6, 6).repeat_interleave(1700).float()
    offset = {
        "uniform errors": torch.rand(len(base), generator=torch.Generator().manual_seed(3)) - 0.5,
        "errors of one sign": torch.rand(len(base), generator=torch.Generator().manual_seed(3)) * 0.4,
        "few errors": torch.tensor([0.1, -0.2, 0.3, 0.45]).repeat(len(base) // 4),
    }[kind]
    step = torch.tensor(0.05)
    values = (base + offset) * step
    errors = (rounded(values, step, -8, 7) - values.double().numpy()) / float(step)
    noise = noise_of(values, step, -8, 7)
    critical = 1.95 * np.sqrt(2 / len(base))  # at 0.1 %
    assert largest_gap(np.round(noise, 4), np.round(errors, 4)) < critical
    assert largest_gap(np.round(-noise, 4), np.round(errors, 4)) > critical or kind == "uniform errors"
    assert abs(noise.mean() - errors.mean()) < 5 * errors.std() / np.sqrt(len(base))
    assert np.corrcoef(noise, errors)[0, 1] < 0.05, "not each value's own error"


def test_noise_has_mean_zero_and_the_variance_of_rounding():
    """U[−½, ½] in steps: mean 0, variance 1/12 (HDRQ, below equation 8)."""
    values, step = random(100_000), torch.tensor(0.04)
    noise = noise_of(values, step, -128, 127)
    assert abs(noise.mean()) < 5 / np.sqrt(12 * len(noise))
    assert noise.var() == pytest.approx(1 / 12, rel=0.02)
    assert np.abs(noise).max() <= 0.5 + 1e-3


def test_what_lies_outside_is_clipped_and_gets_no_noise():
    values, step = torch.tensor([-3.0, -2.0, 0.1, 1.4, 1.5, 5.0]), torch.tensor(0.5)
    seen = set()
    for seed in range(60):
        drawn = noisy(values, step, -4, 3, torch.Generator().manual_seed(seed))
        assert drawn[[0, 1, 4, 5]].tolist() == [-2.0, -2.0, 1.5, 1.5]
        seen.add(round(float(drawn[2]), 4))
    assert {0.0, 0.1, 0.2} == seen, "its own error, none, and that of 1.4"


def test_what_is_clipped_lends_its_error_to_nobody():
    """The noise is U[−½, ½] in steps however much is clipped: a clipped value's error may be many steps."""
    values, step = random(50_000), torch.tensor(0.2)
    inside = (values / step).abs() < 3
    assert inside.double().mean() < 0.6
    noise = noise_of(values, step, -4, 3)[inside.numpy()]
    assert np.abs(noise).max() <= 0.5 + 1e-4
    assert noise.var() == pytest.approx(1 / 12, rel=0.03)


def test_noise_is_seeded():
    values, step = random(1000), torch.tensor(0.3)
    one, again, other = (noisy(values, step, -8, 7, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_gradients_under_noise():
    """For drawn noise n: w + n·Δ inside, code · Δ outside; both are linear, so differences are exact."""
    values, step = random(200).requires_grad_(), torch.tensor(0.4, requires_grad=True)
    noisy(values, step, -4, 3, torch.Generator().manual_seed(0)).sum().backward()
    inside = (values / step > -4) & (values / step < 3)
    assert 0.5 < inside.double().mean() < 0.98
    assert torch.equal(values.grad, inside.float())
    noise = noise_of(values.detach(), step.detach(), -4, 3)
    bound = np.clip((values / step).detach().numpy(), -4, 3)
    expected = np.where(inside.numpy(), noise, bound).sum()
    assert float(step.grad) == pytest.approx(expected, rel=1e-4)


def test_noise_of_channels_has_each_channels_step():
    values = random(2, 20_000) * torch.tensor([[1.0], [100.0]])
    step = torch.tensor([0.05, 5.0])
    drawn = noisy(values, shaped(step, values), -128, 127, torch.Generator().manual_seed(0))
    spread = (drawn - values).std(1) / step
    assert spread.numpy() == pytest.approx(np.full(2, np.sqrt(1 / 12)), rel=0.05)
