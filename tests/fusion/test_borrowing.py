"""Heads tuned with another task's samples: the weight against a brute-force Fisher information, and who borrows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.alignment import Alignment
from foldd.fusion.average import Average
from foldd.fusion.batches import features_of
from foldd.fusion.borrowing import Tuning, sample_weight
from foldd.fusion.heads import prepare, urge
from foldd.fusion.method import FoldReport, head_of
from foldd.fusion.state import HeadTensors, MergeState, as_tensor, merged_weights, pack, unpack
from foldd.fusion.task_vector import applied, task_vector

TUNED, UOWQ = Alignment("tuned"), Alignment("tuned", weighting="uowq")
NAMES = ("cat", "dog", "owl")
CLASSES, WIDTH = 3, 5


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(seed: int, classes: int = CLASSES) -> HeadTensors:
    return HeadTensors(numbers(classes, WIDTH, seed=seed).float(), numbers(classes, seed=seed + 50).float())


def step(alignment: Alignment, state: MergeState, checkpoint: Checkpoint) -> tuple[MergeState, FoldReport]:
    after, report = Average().fold(state, checkpoint, seed=0)
    return alignment.after_fold(state, checkpoint, after, report)


def run(alignment: Alignment, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = Average().init(base)
    for checkpoint in checkpoints:
        state, _ = step(alignment, state, checkpoint)
    return state


def same(one: HeadTensors, other: HeadTensors) -> bool:
    return torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


@pytest.fixture
def domain(cnn: Base, make: Any) -> Any:
    """domain(task, seed) → a checkpoint with labels, of the classes cat, dog and owl."""

    def build(task: str, seed: int, classes: tuple[str, ...] | None = NAMES, inputs: int = 12) -> Checkpoint:
        checkpoint = make(cnn, task, seed, inputs=inputs)
        labels = np.random.default_rng(seed).integers(0, CLASSES, inputs)
        return replace(checkpoint, labels=labels, classes=classes)

    return build


# --- the weight


def tuning(seed: int, classes: int = CLASSES, count: int = 9, pull: float = 5.0, noise: float = 1.0) -> Tuning:
    """A head, and what it is to say of random features: far from what it says."""
    features, old = numbers(count, WIDTH, seed=seed + 10) * 2 + 1, head(seed, classes)
    return Tuning(old, prepare(features, pull), old.logits(features) + noise * numbers(count, classes, seed=seed + 20))


def fisher_matrix(at: HeadTensors, features: Tensor) -> Tensor:
    """Of gradients of every class's log-probability on every input, [parameters, parameters]."""
    theta, (classes, width) = flat(at), at.weight.shape
    information = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for x in features:
        for c in range(classes):
            leaf = theta.clone().requires_grad_()
            logits = leaf[: classes * width].view(classes, width) @ x + leaf[classes * width :]
            log_probability = logits.log_softmax(0)[c]
            (gradient,) = torch.autograd.grad(log_probability, leaf)
            information += log_probability.detach().exp() * torch.outer(gradient, gradient)
    return information / len(features)


def flat(of: HeadTensors) -> Tensor:
    return torch.cat([of.weight.double().flatten(), of.bias.double()])


def brute_force_weight(target: Tuning, source: Tuning, dimension: float) -> float:
    """(12), with J as a matrix."""
    difference = flat(source.head) - flat(target.head)
    distance = float(difference @ fisher_matrix(target.head, target.fit.features) @ difference)
    return 1 / (1 + len(source.targets) * distance / dimension)


@pytest.mark.parametrize("count", [4, 30], ids=["fewer inputs than features", "more"])
@pytest.mark.parametrize("pull", [0.5, 96.0])
def test_the_weight_is_equation_12_with_a_brute_force_fisher_information(count: int, pull: float) -> None:
    one, two = tuning(1, count=count, pull=pull), tuning(2, count=11)
    got = sample_weight(one, two)
    assert 0 < got < 0.9
    assert got == pytest.approx(brute_force_weight(one, two, one.dimension), rel=1e-6)


def test_the_dimension_is_what_samples_cost_that_are_left_out() -> None:
    """By the letter: each input in turn out of the sums, and the loss on it; the features' mean and energy stay."""
    one = tuning(1, count=30, pull=0.5, noise=4.0)
    features, targets = one.fit.features, one.targets
    mean = features.mean(0)
    energy = (features - mean).square().mean()
    design = torch.cat([features - mean, torch.ones(30, 1)], 1)
    penalty = 0.5 * torch.diag(torch.cat([energy.expand(WIDTH), torch.tensor([1 / WIDTH])]))
    missed = targets - one.old.logits(features)
    losses = []
    for i in range(30):
        for kept in (range(30), [j for j in range(30) if j != i]):
            rows = design[list(kept)]
            change = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ missed[list(kept)])
            said = one.old.logits(features[i]) + design[i] @ change
            losses.append(float(F.cross_entropy(said, targets[i].softmax(0))))
    expected = sum(losses[1::2]) - sum(losses[0::2])
    assert expected > 2
    assert one.dimension == pytest.approx(expected, rel=1e-4)


def test_the_dimension_is_at_least_one() -> None:
    one = tuning(1)
    assert Tuning(one.old, one.fit, one.old.logits(one.fit.features)).dimension == 1.0


def test_heads_that_decide_alike_have_weight_one() -> None:
    one = tuning(1)
    assert sample_weight(one, one) == 1.0
    lifted = Tuning(
        HeadTensors(one.old.weight + torch.arange(5.0), one.old.bias + 7),  # the same number for each class
        one.fit,
        one.targets + one.fit.features @ torch.arange(5.0).double()[:, None] + 7,
    )
    assert sample_weight(one, lifted) == pytest.approx(1.0, abs=1e-6)


def test_the_weight_falls_with_distance_and_with_samples() -> None:
    one, other = tuning(1), head(2)
    near = [
        Tuning(HeadTensors(one.old.weight + k * other.weight, one.old.bias), one.fit, one.targets)
        for k in (0.1, 0.3, 1)
    ]
    weights = [sample_weight(one, source) for source in near]
    assert 1 > weights[0] > weights[1] > weights[2] > 0
    few, many = (
        Tuning(near[2].head, prepare(numbers(n, WIDTH, seed=3), 1e20), torch.zeros(n, CLASSES)) for n in (9, 90)
    )
    assert 1 / sample_weight(one, many) - 1 == pytest.approx(10 * (1 / sample_weight(one, few) - 1))


def test_a_single_class_decides_nothing() -> None:
    assert sample_weight(tuning(1, 1), tuning(2, 1)) == 1.0


# --- a fold


def test_both_heads_are_moved_by_both_tasks_samples_each_by_its_own_teacher(cnn: Base, domain: Any) -> None:
    """Written out once more, from features on."""
    one, two = domain("photo", 1), domain("sketch", 2)
    before = run(UOWQ, cnn, one)
    after, report = step(UOWQ, before, two)
    plain, _ = step(TUNED, before, two)

    def seen(weights: Any, task: Checkpoint) -> Tensor:
        return features_of(cnn, weights, as_tensor(task.inputs)).double()

    own, old, new = applied(cnn, task_vector(cnn, two)), merged_weights(before), merged_weights(after)
    now = {task.task: seen(new, task) for task in (one, two)}
    labels = {task.task: torch.from_numpy(task.labels) for task in (one, two)}
    mine, lent = {}, {}
    for name, other, teacher, came in (
        ("sketch", "photo", own, head_of(two)),
        ("photo", "sketch", old, before.heads["photo"]),
    ):
        said = {task.task: came.logits(seen(teacher, task)) for task in (one, two)}
        targets = urge(said[name], labels[name], UOWQ.labels) if name == "sketch" else said[name]
        mine[name] = Tuning(came, prepare(now[name], UOWQ.pull), targets)
        lent[name] = urge(said[other], labels[other], UOWQ.labels)
    for name, other in (("sketch", "photo"), ("photo", "sketch")):
        assert same(mine[name].head, plain.heads[name])
        weight = brute_force_weight(mine[name], mine[other], mine[name].dimension)
        assert report.source_weights[name] == pytest.approx(weight, rel=1e-3)
        counts = torch.tensor([1.0] * 12 + [weight] * 12, dtype=torch.float64)
        fit = prepare(torch.cat([now[name], now[other]]), UOWQ.pull, counts)
        expected = fit.move(mine[name].old, torch.cat([mine[name].targets, lent[name]]))
        torch.testing.assert_close(after.heads[name].weight, expected.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after.heads[name].bias, expected.bias, rtol=1e-3, atol=1e-4)
        assert not same(after.heads[name], plain.heads[name])


def test_older_heads_and_the_merge_do_not_know_of_it(cnn: Base, domain: Any) -> None:
    tasks = [domain("photo", 1), domain("sketch", 2), domain("art", 3)]
    before = run(UOWQ, cnn, *tasks[:2])
    (one, report), (two, plain) = (step(alignment, before, tasks[2]) for alignment in (UOWQ, TUNED))
    assert list(report.source_weights) == ["art", "sketch"]
    assert plain.source_weights == {}
    assert same(one.heads["photo"], two.heads["photo"])
    assert all(torch.equal(one.merged[name], two.merged[name]) for name in cnn.weights)
    assert list(report.heads) == list(plain.heads) == ["art", "sketch", "photo"]


def change(checkpoint: Checkpoint, what: str) -> Checkpoint:
    return {
        "other names": replace(checkpoint, classes=("cat", "dog", "cow")),
        "another order": replace(checkpoint, classes=("dog", "cat", "owl")),
        "no names": replace(checkpoint, classes=None),
        "no labels": replace(checkpoint, labels=None),
        "no inputs": replace(checkpoint, labels=None, inputs=None),
    }[what]


@pytest.mark.parametrize("which", [0, 1], ids=["previous", "incoming"])
@pytest.mark.parametrize("what", ["other names", "another order", "no names", "no labels", "no inputs"])
def test_where_nothing_can_be_borrowed_nothing_changes(cnn: Base, domain: Any, what: str, which: int) -> None:
    tasks = [domain("photo", 1), domain("sketch", 2)]
    tasks[which] = change(tasks[which], what)
    (one, report), (two, plain) = (step(a, run(a, cnn, tasks[0]), tasks[1]) for a in (UOWQ, TUNED))
    assert all(same(one.heads[task], two.heads[task]) for task in two.heads)
    assert report == plain


def test_only_the_previous_task_lends(cnn: Base, domain: Any) -> None:
    tasks = [domain("photo", 1), domain("digits", 2, ("1", "2", "3")), domain("sketch", 3)]
    assert step(UOWQ, run(UOWQ, cnn, *tasks[:2]), tasks[2])[1].source_weights == {}


def test_a_task_does_not_borrow_from_itself(cnn: Base, domain: Any) -> None:
    state = run(UOWQ, cnn, domain("photo", 1))
    assert step(UOWQ, state, domain("photo", 2))[1].source_weights == {}


def test_no_more_than_256_inputs_count(cnn: Base, domain: Any) -> None:
    many = domain("photo", 1, inputs=300)
    few = replace(many, inputs=many.inputs[:256], labels=many.labels[:256])
    states = [run(UOWQ, cnn, task) for task in (few, many)]
    assert [len(state.labels) for state in states] == [256, 300]  # they number the inputs that are kept
    one, two = (step(UOWQ, state, domain("sketch", 2))[1] for state in states)
    assert one.source_weights == two.source_weights


# --- the state


def test_labels_and_names_are_kept_only_where_they_can_be_used(cnn: Base, domain: Any) -> None:
    task = domain("photo", 1)
    for alignment in (TUNED, Alignment(), Alignment("frozen")):
        state = run(alignment, cnn, task)
        assert (state.labels, state.classes) == (None, None)
        assert "calibration/labels" not in pack(state)[0]
        assert "classes" not in pack(state)[1]
    state = run(UOWQ, cnn, task)
    np.testing.assert_array_equal(state.labels, task.labels)
    assert state.classes == NAMES
    for unusable in ("no names", "no labels"):
        state, _ = step(UOWQ, run(UOWQ, cnn, task), change(domain("sketch", 2), unusable))
        assert (state.labels, state.classes) == (None, None)  # not those of the task before


def test_replay_through_a_file_gives_the_same_bits(cnn: Base, domain: Any, tmp_path: Path) -> None:
    state, last = run(UOWQ, cnn, domain("photo", 1), domain("sketch", 2)), domain("art", 3)
    tensors, metadata = pack(state)
    save_file(tensors, tmp_path / "s.safetensors", metadata)
    read = unpack(cnn, load_file(tmp_path / "s.safetensors"), metadata)
    assert read.classes == NAMES
    (one, report), (two, again) = step(UOWQ, state, last), step(UOWQ, read, last)
    assert report == again
    assert report.source_weights.keys() == {"art", "sketch"}
    assert all(same(one.heads[task], two.heads[task]) for task in one.heads)


def test_a_state_from_before_labels_were_kept_borrows_nothing_once(cnn: Base, domain: Any) -> None:
    tensors, metadata = pack(run(TUNED, cnn, domain("photo", 1)))
    old = unpack(cnn, tensors, metadata)
    state, report = step(UOWQ, old, domain("sketch", 2))
    assert report.source_weights == {}
    assert step(UOWQ, state, domain("art", 3))[1].source_weights.keys() == {"art", "sketch"}


def test_the_report_is_plain_json(cnn: Base, domain: Any) -> None:
    _, report = step(UOWQ, run(UOWQ, cnn, domain("photo", 1)), domain("sketch", 2))
    told = json.loads(json.dumps(report.as_dict()))["source_weights"]
    assert told == dict(report.source_weights)
    assert all(0 < weight < 1 for weight in told.values())
