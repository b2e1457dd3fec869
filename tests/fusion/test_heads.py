"""Moving a head, against whole linear solves in float64, and what its settings promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.fusion.heads import moved, prepare, spread, urge
from foldd.fusion.state import HeadTensors

CLASSES, WIDTH = 4, 9


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def head() -> HeadTensors:
    return HeadTensors(numbers(CLASSES, WIDTH, seed=1).float(), numbers(CLASSES, seed=2).float())


@pytest.fixture(params=[6, 40], ids=["fewer inputs than features", "more"])
def now(request: pytest.FixtureRequest) -> Tensor:
    return numbers(request.param, WIDTH, seed=3) * 2 + 5


@pytest.fixture
def was(now: Tensor) -> Tensor:
    """What the head was made for: its features in the new network, turned and shifted."""
    return now @ (torch.eye(WIDTH) + 0.3 * numbers(WIDTH, WIDTH, seed=4)) + numbers(WIDTH, seed=5)


@pytest.mark.parametrize("pull", [0.5, 20.0])
def test_it_is_the_whole_least_squares_problem(head: HeadTensors, now: Tensor, was: Tensor, pull: float) -> None:
    """Rows for the inputs, for the pull on every weight, and for the pull on the mean shift, solved at once."""
    targets = head.logits(was)
    mean = now.mean(0)
    energy = (now - mean).square().mean()
    inputs = torch.cat([now - mean, torch.ones(len(now), 1)], 1)
    pulls = torch.diag(torch.cat([(pull * energy).sqrt().expand(WIDTH), torch.tensor([(pull / WIDTH) ** 0.5])]))
    missed = torch.cat([targets - head.logits(now), torch.zeros(WIDTH + 1, CLASSES)])
    change = torch.linalg.lstsq(torch.cat([inputs, pulls]), missed).solution.T
    got = prepare(now, pull).move(head, targets)
    torch.testing.assert_close(got.weight.double() - head.weight, change[:, :-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got.bias.double() - head.bias, change[:, -1] - change[:, :-1] @ mean, rtol=1e-4, atol=1e-5
    )


def test_it_is_the_ridge_from_new_features_to_old_ones(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    pull = 7.0
    centred, shift = now - now.mean(0), was - now
    gram = centred.T @ centred
    gram.diagonal().add_(pull * gram.diagonal().mean() / len(now))
    turn = torch.eye(WIDTH) + torch.linalg.solve(gram, centred.T @ (shift - shift.mean(0))).T
    got = prepare(now, pull).move(head, head.logits(was))
    torch.testing.assert_close(got.weight.double(), head.weight.double() @ turn, rtol=1e-4, atol=1e-5)


def test_where_nothing_moved_the_head_stays_bit_for_bit(head: HeadTensors, now: Tensor) -> None:
    got = prepare(now, 1.0).move(head, head.logits(now))
    assert torch.equal(got.weight, head.weight)
    assert torch.equal(got.bias, head.bias)


def test_an_endless_pull_leaves_the_head_bit_for_bit(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    got = prepare(now, 1e20).move(head, head.logits(was))
    assert torch.equal(got.weight, head.weight)
    assert torch.equal(got.bias, head.bias)


def test_without_pull_the_targets_are_met(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    """An affine map of the features is a head, so it can be met on any number of inputs."""
    targets = head.logits(was)
    got = prepare(now, 1e-9).move(head, targets)
    torch.testing.assert_close(got.logits(now), targets, rtol=1e-4, atol=1e-4)


def test_more_pull_moves_less(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    distances = [moved(head, prepare(now, pull).move(head, head.logits(was)), now) for pull in (1.0, 10.0, 100.0, 1e4)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1] > 0


def test_the_mean_shift_is_taken_back_almost_whole(head: HeadTensors, now: Tensor) -> None:
    """It is known from all inputs together, and a pull that all but stops the weights hardly touches it."""
    got = prepare(now, 3.0).move(head, head.logits(now + numbers(WIDTH, seed=8)))
    torch.testing.assert_close(got.weight, head.weight, rtol=0, atol=1e-6)
    part = (got.bias - head.bias).double() / (head.weight.double() @ numbers(WIDTH, seed=8))
    expected = 1 / (1 + 3 / (len(now) * WIDTH))
    torch.testing.assert_close(part, torch.full_like(part, expected), rtol=1e-4, atol=0)
    assert float(part[0]) > 0.9


def test_the_order_of_inputs_does_not_matter(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    order = torch.randperm(len(now), generator=torch.Generator().manual_seed(0))
    one = prepare(now, 5.0).move(head, head.logits(was))
    other = prepare(now[order], 5.0).move(head, head.logits(was[order]))
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-6, atol=1e-5)


def test_a_share_is_that_part_of_the_way(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    fit, targets = prepare(now, 5.0), head.logits(was)
    whole, fifth, nothing = (fit.move(head, targets, share) for share in (1.0, 0.2, 0.0))
    for name in ("weight", "bias"):
        old, far, near, none = (getattr(h, name) for h in (head, whole, fifth, nothing))
        assert torch.equal(none, old)
        torch.testing.assert_close(near - old, 0.2 * (far - old), rtol=1e-3, atol=1e-5)
        assert float((far - old).abs().max()) > 1e-2


@pytest.mark.parametrize("count", [1, 5])
def test_inputs_that_are_all_alike_move_the_bias_only(head: HeadTensors, count: int) -> None:
    now = numbers(1, WIDTH, seed=6).expand(count, WIDTH)
    got = prepare(now, 2.0).move(head, head.logits(now) + 1)
    torch.testing.assert_close(got.weight, head.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        got.bias - head.bias, torch.full((CLASSES,), 1 / (1 + 2 / (count * WIDTH))), rtol=1e-5, atol=1e-6
    )


def test_what_one_head_is_moved_by_does_not_depend_on_others(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    fit = prepare(now, 5.0)
    both = HeadTensors(torch.cat([head.weight, -head.weight]), torch.cat([head.bias, head.bias]))
    one, two = fit.move(head, head.logits(was)), fit.move(both, both.logits(was))
    torch.testing.assert_close(two.weight[:CLASSES], one.weight, rtol=1e-6, atol=1e-6)


# --- weights


def weighted(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("pull", [0.5, 20.0])
def test_weights_are_those_of_the_whole_least_squares_problem(
    head: HeadTensors, now: Tensor, was: Tensor, pull: float
) -> None:
    weights, targets = torch.linspace(0.1, 1.9, len(now), dtype=torch.float64), head.logits(was)
    total = weights.sum()
    mean = (weights[:, None] * now).sum(0) / total
    energy = (weights[:, None] * (now - mean).square()).sum() / total / WIDTH
    inputs = weights.sqrt()[:, None] * torch.cat([now - mean, torch.ones(len(now), 1)], 1)
    pulls = torch.diag(torch.cat([(pull * energy).sqrt().expand(WIDTH), torch.tensor([(pull / WIDTH) ** 0.5])]))
    missed = torch.cat([weights.sqrt()[:, None] * (targets - head.logits(now)), torch.zeros(WIDTH + 1, CLASSES)])
    change = torch.linalg.lstsq(torch.cat([inputs, pulls]), missed).solution.T
    got = prepare(now, pull, weights).move(head, targets)
    torch.testing.assert_close(got.weight.double() - head.weight, change[:, :-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got.bias.double() - head.bias, change[:, -1] - change[:, :-1] @ mean, rtol=1e-4, atol=1e-5
    )


def test_weights_of_one_are_no_weights(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    plain, alike = prepare(now, 5.0), prepare(now, 5.0, torch.ones(len(now), dtype=torch.float64))
    torch.testing.assert_close(alike.directions, plain.directions, rtol=1e-12, atol=1e-15)
    assert alike.shift == plain.shift
    one, two = (fit.move(head, head.logits(was)) for fit in (plain, alike))
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two.bias, one.bias, rtol=1e-6, atol=1e-6)


def test_weight_zero_is_absence_and_weight_two_is_presence_twice(head: HeadTensors, now: Tensor, was: Tensor) -> None:
    targets, more, said = head.logits(was), numbers(3, WIDTH, seed=20), numbers(3, CLASSES, seed=21)
    for repeats in (0, 2):
        weights = weighted(*[1] * len(now), *[repeats] * 3)
        got = prepare(torch.cat([now, more]), 5.0, weights)
        expected = prepare(torch.cat([now, *[more] * repeats]), 5.0)
        one = got.move(head, torch.cat([targets, said]))
        two = expected.move(head, torch.cat([targets, *[said] * repeats]))
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.bias, two.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weigh", [False, True])
def test_left_out_is_the_problem_solved_anew_without_each_input(
    head: HeadTensors, now: Tensor, was: Tensor, weigh: bool
) -> None:
    pull, targets = 3.0, head.logits(was)
    weights = torch.linspace(0.1, 1.9, len(now), dtype=torch.float64) if weigh else None
    counts = torch.ones(len(now), dtype=torch.float64) if weights is None else weights
    mean = counts @ now / counts.sum()
    energy = (counts[:, None] * (now - mean).square()).sum() / counts.sum() / WIDTH
    design = torch.cat([now - mean, torch.ones(len(now), 1)], 1)
    pulls = torch.diag(torch.cat([(pull * energy).sqrt().expand(WIDTH), torch.tensor([(pull / WIDTH) ** 0.5])]))
    missed = targets - head.logits(now)
    got = prepare(now, pull, weights).left_out(head, targets)
    for i in range(len(now)):
        kept = counts.clone()
        kept[i] = 0
        rows = torch.cat([kept.sqrt()[:, None] * design, pulls])
        wanted = torch.cat([kept.sqrt()[:, None] * missed, torch.zeros(WIDTH + 1, CLASSES)])
        change = torch.linalg.lstsq(rows, wanted).solution
        torch.testing.assert_close(got[i], head.logits(now[i]) + design[i] @ change, rtol=1e-4, atol=1e-4)


# --- labels


def test_labels_urge_along_the_gradient() -> None:
    logits, labels = numbers(7, CLASSES, seed=1).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    F.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    step = urge(logits.detach(), labels, 0.3) - logits.detach()
    torch.testing.assert_close(step, -0.3 * spread(logits.detach()) * logits.grad)


def test_a_sure_teacher_that_is_right_is_left_alone_and_no_step_is_larger_than_told() -> None:
    logits = torch.tensor([[60.0, 0, 0], [60.0, 0, 0]])
    right, wrong = urge(logits, torch.tensor([0, 2]), 0.1) - logits
    assert float(right.abs().max()) < 1e-12
    torch.testing.assert_close(wrong, 0.1 * spread(logits) * torch.tensor([-1.0, 0, 1]).double())


def test_no_step_is_no_change() -> None:
    logits = numbers(5, CLASSES, seed=2)
    assert torch.equal(urge(logits, torch.zeros(5, dtype=torch.int64), 0.0), logits)


# --- how far


def test_spread_is_about_the_inputs_own_means() -> None:
    assert spread(torch.tensor([[1.0, 3.0], [101.0, 103.0]])) == pytest.approx(1)
    assert spread(torch.ones(4, 3)) == 0


def test_moved_counts_what_decisions_can_see(head: HeadTensors, now: Tensor) -> None:
    assert moved(head, head, now) == 0
    assert moved(head, HeadTensors(head.weight, head.bias + 7), now) == pytest.approx(0, abs=1e-6)
    assert moved(head, HeadTensors(3 * head.weight, 3 * head.bias), now) == pytest.approx(2, rel=1e-5)
    flat = HeadTensors(torch.zeros(CLASSES, WIDTH), torch.zeros(CLASSES))
    assert moved(flat, head, now) == 0
