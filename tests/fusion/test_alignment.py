"""Heads after a fold: which are moved, by what they are moved, and that nothing else is."""

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
from foldd.core.errors import BadCheckpoint
from foldd.fusion.alignment import Alignment
from foldd.fusion.average import Average
from foldd.fusion.heads import prepare
from foldd.fusion.method import FoldReport, head_of
from foldd.fusion.otmf import Otmf
from foldd.fusion.state import HeadTensors, MergeState, as_tensor, merged_weights, pack, unpack
from foldd.fusion.task_vector import task_vector

ALIGNED, TUNED, FROZEN = Alignment(), Alignment("tuned"), Alignment("frozen")


@pytest.fixture(params=[Average(), Otmf()], ids=lambda method: str(method.name))
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def step(method: Any, alignment: Alignment, state: MergeState, checkpoint: Checkpoint) -> tuple[MergeState, FoldReport]:
    after, report = method.fold(state, checkpoint, seed=0)
    return alignment.after_fold(state, checkpoint, after, report)


def run(method: Any, alignment: Alignment, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = step(method, alignment, state, checkpoint)
    return state


def same(one: HeadTensors, other: HeadTensors) -> bool:
    return torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def labelled(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    assert checkpoint.inputs is not None
    classes = len(checkpoint.head.bias)
    return replace(checkpoint, labels=np.random.default_rng(seed).integers(0, classes, len(checkpoint.inputs)))


def inputs_of(checkpoint: Checkpoint) -> Tensor:
    assert checkpoint.inputs is not None
    return as_tensor(checkpoint.inputs)


def own_features(base: Base, checkpoint: Checkpoint) -> Tensor:
    vector = task_vector(base, checkpoint)
    return base.features({name: weight + vector[name] for name, weight in base.weights.items()}, inputs_of(checkpoint))


def features(state: MergeState, inputs: Tensor) -> Tensor:
    return state.base.features(merged_weights(state), inputs)


def test_frozen_heads_and_their_report_are_the_folds_own(method: Any, cnn: Base, make: Any) -> None:
    state, last = run(method, FROZEN, cnn, make(cnn, "a", 1)), make(cnn, "b", 2)
    after, report = method.fold(state, last, seed=0)
    assert FROZEN.after_fold(state, last, after, report) == (after, report)
    assert report.heads == {}
    assert same(after.heads["b"], head_of(last))


def test_only_heads_change(method: Any, cnn: Base, make: Any) -> None:
    tasks = [make(cnn, "a", 1), make(cnn, "b", 2)]
    state = run(method, ALIGNED, cnn, *tasks)
    plain = run(method, FROZEN, cnn, *tasks)
    assert not same(state.heads["b"], plain.heads["b"])
    one, two = (pack(replace(s, heads={})) for s in (state, plain))
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(np.array_equal(one[0][name], two[0][name]) for name in one[0])


def test_the_states_around_the_fold_stay_as_they_were(method: Any, cnn: Base, make: Any) -> None:
    before = run(method, ALIGNED, cnn, make(cnn, "a", 1))
    kept = {name: array.copy() for name, array in pack(before)[0].items()}
    last = make(cnn, "b", 2)
    after, report = method.fold(before, last, seed=0)
    heads = dict(after.heads)
    ALIGNED.after_fold(before, last, after, report)
    assert all(np.array_equal(array, kept[name]) for name, array in pack(before)[0].items())
    assert all(after.heads[task] is head for task, head in heads.items())
    assert same(after.heads["b"], head_of(last))


def test_the_first_fold_moves_nothing_without_labels(method: Any, cnn: Base, make: Any) -> None:
    """The merge is the task's own model, so there is nothing to follow, to the last bit."""
    first = make(cnn, "a", 1)
    state, report = step(method, ALIGNED, method.init(cnn), first)
    assert same(state.heads["a"], head_of(first))
    assert report.heads == {"a": 0.0}
    assert report.warnings == ()


def test_a_fold_that_moves_no_features_moves_no_head(method: Any, mlp: Base, make: Any) -> None:
    still = {name: torch.zeros_like(weight) for name, weight in mlp.weights.items()}
    tasks = [make(mlp, name, seed, vector=still) for seed, name in enumerate("abc")]
    state = run(method, ALIGNED, mlp, *tasks)
    for task in tasks:
        # The closed form of `otmf` leaves rounding.
        torch.testing.assert_close(state.heads[task.task].weight, head_of(task).weight, rtol=1e-4, atol=1e-4)
    if method.name == "average":
        assert all(same(state.heads[task.task], head_of(task)) for task in tasks)


def test_the_incoming_head_says_more_of_what_its_own_model_says(method: Any, cnn: Base, make: Any) -> None:
    state, task = run(method, ALIGNED, cnn, make(cnn, "a", 1)), make(cnn, "b", 2)
    after, _ = step(method, replace(ALIGNED, pull=1.0), state, task)
    wanted, now = head_of(task).logits(own_features(cnn, task)), features(after, inputs_of(task))
    errors = [float((head.logits(now) - wanted).square().sum()) for head in (head_of(task), after.heads["b"])]
    assert errors[1] < 0.5 * errors[0]
    expected = prepare(now, 1.0).move(head_of(task), wanted)
    torch.testing.assert_close(after.heads["b"].weight, expected.weight, rtol=1e-4, atol=1e-4)


def test_the_previous_head_goes_on_saying_what_it_said_on_its_own_inputs(method: Any, cnn: Base, make: Any) -> None:
    previous = make(cnn, "b", 2)
    before = run(method, ALIGNED, cnn, make(cnn, "a", 1), previous)
    after, report = step(method, ALIGNED, before, make(cnn, "c", 3))
    was, now = (features(state, inputs_of(previous)) for state in (before, after))
    expected = prepare(now, ALIGNED.pull).move(before.heads["b"], before.heads["b"].logits(was))
    torch.testing.assert_close(after.heads["b"].weight, expected.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.heads["b"].bias, expected.bias, rtol=1e-4, atol=1e-4)
    assert list(report.heads) == ["c", "b", "a"]


def test_older_heads_get_a_share_of_what_both_sets_of_inputs_show(method: Any, cnn: Base, make: Any) -> None:
    tasks = [make(cnn, "a", 1), make(cnn, "b", 2)]
    before, last = run(method, ALIGNED, cnn, *tasks), make(cnn, "c", 3)
    none, some, all_of_it = (
        step(method, replace(ALIGNED, drift=share), before, last)[0].heads["a"] for share in (0.0, 0.2, 1.0)
    )
    old = before.heads["a"]
    assert same(none, old)
    torch.testing.assert_close(some.weight - old.weight, 0.2 * (all_of_it.weight - old.weight), rtol=1e-3, atol=1e-5)
    after = step(method, FROZEN, before, last)[0]
    both = torch.cat([inputs_of(last), inputs_of(tasks[1])])
    was, now = (features(state, both) for state in (before, after))
    expected = prepare(now, ALIGNED.pull).move(old, old.logits(was))
    torch.testing.assert_close(all_of_it.weight, expected.weight, rtol=1e-4, atol=1e-4)
    assert not same(all_of_it, old)


def test_an_endless_pull_is_frozen_heads(method: Any, cnn: Base, make: Any) -> None:
    tasks = [labelled(make(cnn, name, seed)) for seed, name in enumerate("abc")]
    state = run(method, Alignment("tuned", pull=1e20), cnn, *tasks)
    assert all(same(state.heads[task.task], head_of(task)) for task in tasks)


def test_replay_through_a_file_gives_the_same_bits(method: Any, cnn: Base, make: Any, tmp_path: Path) -> None:
    state = run(method, TUNED, cnn, *(labelled(make(cnn, name, seed)) for seed, name in enumerate("abc")))
    tensors, metadata = pack(state)
    save_file(tensors, tmp_path / "s.safetensors")
    last = labelled(make(cnn, "d", 9))
    here, again = (
        step(method, TUNED, s, last) for s in (state, unpack(cnn, load_file(tmp_path / "s.safetensors"), metadata))
    )
    assert list(here[0].heads) == ["a", "b", "c", "d"]
    assert all(same(here[0].heads[task], again[0].heads[task]) for task in here[0].heads)
    assert here[1] == again[1]


def test_nothing_more_is_kept_in_the_state(method: Any, cnn: Base, make: Any) -> None:
    sizes = []
    for alignment in (FROZEN, ALIGNED, TUNED):
        state = run(method, alignment, cnn, *(labelled(make(cnn, name, seed)) for seed, name in enumerate("abc")))
        sizes.append({name: array.shape for name, array in pack(state)[0].items()})
    assert sizes[0] == sizes[1] == sizes[2]


# --- labels


def test_labels_bring_the_head_nearer_to_them(method: Any, cnn: Base, make: Any) -> None:
    state, task = run(method, ALIGNED, cnn, make(cnn, "a", 1)), labelled(make(cnn, "b", 2))
    losses = []
    for alignment in (ALIGNED, TUNED, replace(TUNED, labels=0.6)):
        after, report = step(method, alignment, state, task)
        assert report.warnings == ()
        logits = after.heads["b"].logits(features(after, inputs_of(task)))
        losses.append(float(F.cross_entropy(logits, torch.from_numpy(task.labels))))
    assert losses[0] > losses[1] > losses[2]


def test_tuning_looks_at_the_incoming_labels_alone(method: Any, cnn: Base, make: Any) -> None:
    before = run(method, ALIGNED, cnn, make(cnn, "a", 1), make(cnn, "b", 2))
    one, other = (step(method, TUNED, before, labelled(make(cnn, "c", 3), seed))[0] for seed in (1, 2))
    assert not same(one.heads["c"], other.heads["c"])
    assert all(same(one.heads[task], other.heads[task]) for task in "ab")


def test_without_labels_tuning_is_alignment_and_says_so(method: Any, cnn: Base, make: Any) -> None:
    before, task = run(method, ALIGNED, cnn, make(cnn, "a", 1)), make(cnn, "b", 2)
    tuned, report = step(method, TUNED, before, task)
    aligned, quiet = step(method, ALIGNED, before, task)
    assert all(same(tuned.heads[name], aligned.heads[name]) for name in "ab")
    assert report.warnings == ("b brings no labels: its head is aligned, and not tuned.",)
    assert quiet.warnings == ()


# --- odd journeys


def test_without_inputs_the_head_stays_and_the_others_still_follow(cnn: Base, make: Any) -> None:
    method, last = Average(), make(cnn, "c", 3, inputs=0)
    before = run(method, ALIGNED, cnn, make(cnn, "a", 1), make(cnn, "b", 2))
    after, report = step(method, ALIGNED, before, last)
    assert same(after.heads["c"], head_of(last))
    assert not same(after.heads["b"], before.heads["b"])
    assert list(report.heads) == ["b", "a"]
    assert report.warnings == ("c brings no calibration inputs: its head stays as it came.",)
    # What it left is nothing: the next fold has the next task's inputs alone, and "c" is an older head by then.
    again, report = step(method, ALIGNED, after, make(cnn, "d", 4))
    assert list(report.heads) == ["d", "a", "b", "c"]
    assert not same(again.heads["c"], after.heads["c"])


def test_no_inputs_at_all_move_nothing(cnn: Base, make: Any) -> None:
    tasks = [make(cnn, name, seed, inputs=0) for seed, name in enumerate("ab")]
    state, report = step(Average(), TUNED, run(Average(), TUNED, cnn, tasks[0]), tasks[1])
    assert all(same(state.heads[task.task], head_of(task)) for task in tasks)
    assert report.heads == {}


def test_a_task_that_comes_again_is_the_incoming_one(method: Any, cnn: Base, make: Any) -> None:
    before, again = run(method, ALIGNED, cnn, make(cnn, "b", 1), make(cnn, "a", 2)), make(cnn, "a", 3)
    after, report = step(method, ALIGNED, before, again)
    assert list(report.heads) == ["a", "b"]
    now = features(after, inputs_of(again))
    expected = prepare(now, ALIGNED.pull).move(head_of(again), head_of(again).logits(own_features(cnn, again)))
    torch.testing.assert_close(after.heads["a"].weight, expected.weight, rtol=1e-4, atol=1e-4)


def test_features_that_overflow_are_the_checkpoints_fault(cnn: Base, make: Any) -> None:
    before = run(Average(), ALIGNED, cnn, make(cnn, "a", 1))
    huge = make(cnn, "b", 2, scale=3e38)
    after, report = Average().fold(before, make(cnn, "b", 3), seed=0)
    with pytest.raises(BadCheckpoint) as caught:
        ALIGNED.after_fold(before, huge, after, report)
    assert caught.value.code == "features-not-finite"


def test_the_report_is_plain_json_with_what_moved(method: Any, cnn: Base, make: Any) -> None:
    before = run(method, ALIGNED, cnn, make(cnn, "a", 1))
    _, report = step(method, ALIGNED, before, make(cnn, "b", 2))
    told = json.loads(json.dumps(report.as_dict()))["heads"]
    assert told == dict(report.heads)
    assert told.keys() == {"a", "b"}
    assert all(0 < value < 10 for value in told.values())
