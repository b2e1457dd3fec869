"""Heads tuned with another task's samples: the weight against a brute-force Fisher information, and who borrows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.alignment import Alignment
from foldd.fusion.average import Average
from foldd.fusion.batches import features_of
from foldd.fusion.borrowing import sample_weight
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


def brute_force_weight(target: HeadTensors, source: HeadTensors, features: Tensor, samples: int, pull: float) -> float:
    """(12) with J as a matrix, of gradients of every class's log-probability on every input, and d by unit vectors."""
    theta, other = (torch.cat([h.weight.double().flatten(), h.bias.double()]) for h in (target, source))
    classes, width = target.weight.shape
    information = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for x in features:
        for c in range(classes):
            at = theta.clone().requires_grad_()
            logits = at[: classes * width].view(classes, width) @ x + at[classes * width :]
            log_probability = logits.log_softmax(0)[c]
            (gradient,) = torch.autograd.grad(log_probability, at)
            information += log_probability.detach().exp() * torch.outer(gradient, gradient)
    information /= len(features)
    fit, still = prepare(features, pull), HeadTensors(torch.zeros(1, width), torch.zeros(1))
    freedom = sum(
        float(fit.move(still, torch.eye(len(features), dtype=torch.float64)[:, [i]]).logits(features)[i, 0])
        for i in range(len(features))
    )
    difference = other - theta
    discrepancy = float(difference @ information @ difference) / ((classes - 1) * freedom)
    return 1 / (1 + samples * discrepancy)


@pytest.mark.parametrize("count", [4, 30], ids=["fewer inputs than features", "more"])
@pytest.mark.parametrize("pull", [0.5, 96.0])
def test_the_weight_is_equation_12_with_a_brute_force_fisher_information(count: int, pull: float) -> None:
    features = numbers(count, WIDTH, seed=1) * 2 + 1
    got = sample_weight(head(1), head(2), prepare(features, pull), 40)
    assert 0 < got < 0.5
    assert got == pytest.approx(brute_force_weight(head(1), head(2), features, 40, pull), rel=1e-5)


def test_heads_that_decide_alike_have_weight_one() -> None:
    fit, one = prepare(numbers(9, WIDTH, seed=1), 5.0), head(1)
    assert sample_weight(one, one, fit, 64) == 1.0
    lifted = HeadTensors(one.weight + torch.arange(5.0), one.bias + 7)  # the same number for each class
    assert sample_weight(one, lifted, fit, 64) == pytest.approx(1.0, abs=1e-6)


def test_the_weight_falls_with_distance_and_with_samples() -> None:
    fit, one = prepare(numbers(9, WIDTH, seed=1), 5.0), head(1)
    others = [HeadTensors(one.weight + k * head(2).weight, one.bias) for k in (0.1, 0.3, 1.0)]
    weights = [sample_weight(one, other, fit, 64) for other in others]
    assert 1 > weights[0] > weights[1] > weights[2] > 0
    assert sample_weight(one, others[0], fit, 256) < weights[0]


def test_a_single_class_decides_nothing() -> None:
    assert sample_weight(head(1, 1), head(2, 1), prepare(numbers(9, WIDTH, seed=1), 5.0), 64) == 1.0


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
    for name, other, teacher, came in (
        ("sketch", "photo", own, head_of(two)),
        ("photo", "sketch", old, before.heads["photo"]),
    ):
        said = {task.task: came.logits(seen(teacher, task)) for task in (one, two)}
        mine = urge(said[name], labels[name], UOWQ.labels) if name == "sketch" else said[name]
        weight = brute_force_weight(plain.heads[name], plain.heads[other], now[name], 12, UOWQ.pull)
        assert report.source_weights[name] == pytest.approx(weight, rel=1e-3)
        fit = prepare(torch.cat([now[name], now[other]]), UOWQ.pull, torch.tensor([1.0] * 12 + [weight] * 12).double())
        expected = fit.move(came, torch.cat([mine, urge(said[other], labels[other], UOWQ.labels)]))
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
