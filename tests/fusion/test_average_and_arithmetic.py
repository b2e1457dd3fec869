"""The data-free methods against their formulas, and what every method shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.method import FoldMethod
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.state import MergeState
from foldd.fusion.task_arithmetic import TaskArithmetic
from foldd.fusion.task_vector import task_vector

METHODS: list[FoldMethod] = [Average(), TaskArithmetic(), OtmfPaper(steps=4, batch=4), Otmf()]
ids = [method.name for method in METHODS]


def run(method: FoldMethod, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def absolute(checkpoint: Checkpoint, name: str, base: Base) -> np.ndarray:
    """A checkpoint's weights in float64, without foldd's own reading of them."""
    value = checkpoint.parameters[name].float32().astype(np.float64)
    return value + base.weights[name].double().numpy() if checkpoint.is_delta else value


@pytest.mark.parametrize("is_delta", [True, False])
def test_average_is_the_mean_of_all_models(cnn: Base, make: Any, is_delta: bool) -> None:
    checkpoints = [make(cnn, f"t{i}", i, is_delta=is_delta) for i in range(4)]
    state = run(Average(), cnn, *checkpoints)
    for name, weight in cnn.weights.items():
        if cnn.role(name) is not Role.STATISTIC:
            expected = np.mean([absolute(c, name, cnn) for c in checkpoints], axis=0)
            np.testing.assert_allclose((weight + state.merged[name]).numpy(), expected, atol=1e-6)


def test_task_arithmetic_is_the_published_sum_from_the_second_task_on(mlp: Base, make: Any) -> None:
    checkpoints = [make(mlp, f"t{i}", i) for i in range(4)]
    for count in (2, 3, 4):
        state = run(TaskArithmetic(scaling=0.3), mlp, *checkpoints[:count])
        for name, weight in mlp.weights.items():
            base = weight.double().numpy()
            total = sum(absolute(c, name, mlp) - base for c in checkpoints[:count])
            np.testing.assert_allclose((weight + state.merged[name]).numpy(), base + 0.3 * total, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_identical_models_average_to_that_model(name: str, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(name)
    vector = task_vector(base, make(base, "a", 7))
    state = run(Average(), base, *(make(base, task, 8, vector=vector) for task in "abcde"))
    for tensor, expected in zip(state.merged.values(), vector.values(), strict=True):
        assert torch.equal(tensor, expected)  # to the last bit


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("is_delta", [True, False])
def test_first_fold_takes_the_model_as_it_is(method: FoldMethod, cnn: Base, make: Any, is_delta: bool) -> None:
    checkpoint = make(cnn, "a", 3, is_delta=is_delta)
    state, report = method.fold(method.init(cnn), checkpoint, seed=0)
    for name, weight in cnn.weights.items():
        np.testing.assert_allclose((weight + state.merged[name]).numpy(), absolute(checkpoint, name, cnn), atol=1e-6)
    assert (report.count, report.steps, report.loss_first) == (1, 0, None)
    assert report.task_vector_norm == report.merged_norm > 0


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_fold_registers_the_head_and_hands_on_its_inputs(method: FoldMethod, mlp: Base, make: Any) -> None:
    one, two = make(mlp, "b", 1), make(mlp, "a", 2)
    start = run(method, mlp, one)
    before = {name: tensor.clone() for name, tensor in start.merged.items()}
    seen: list[float] = []
    state, report = method.fold(start, two, seed=0, progress=seen.append)
    assert list(state.heads) == ["a", "b"]
    np.testing.assert_array_equal(state.heads["a"].weight.numpy(), two.head.weight)
    np.testing.assert_array_equal(state.heads["b"].bias.numpy(), one.head.bias)
    assert state.calibration is not None
    np.testing.assert_array_equal(state.calibration.numpy(), two.inputs)
    assert (state.previous, state.count, start.count, report.count) == ("a", 2, 1, 2)
    assert all(torch.equal(start.merged[name], before[name]) for name in before)  # the old state is untouched
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    vectors = [np.concatenate([task_vector(mlp, c)[n].numpy().ravel() for n in mlp.weights]) for c in (one, two)]
    assert report.cosine == pytest.approx(
        vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]), abs=1e-5
    )


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_known_task_is_folded_again_and_gets_its_new_head(method: FoldMethod, mlp: Base, make: Any) -> None:
    state = run(method, mlp, make(mlp, "a", 1), make(mlp, "b", 2))
    again = make(mlp, "a", 3)
    new, report = method.fold(state, again, seed=0)
    assert list(new.heads) == ["a", "b"]
    np.testing.assert_array_equal(new.heads["a"].weight.numpy(), again.head.weight)
    assert (new.count, report.refolded) == (3, True)
    assert "folded before" in report.warnings[-1]
    assert any(not torch.equal(new.merged[name], state.merged[name]) for name in mlp.weights)


def test_a_checkpoint_that_is_the_base_is_folded_with_a_warning(mlp: Base, make: Any) -> None:
    method = Average()
    state, _ = method.fold(method.init(mlp), make(mlp, "a", 1), seed=0)
    unchanged = {name: torch.zeros_like(weight) for name, weight in mlp.weights.items()}
    state, report = method.fold(state, make(mlp, "b", 2, is_delta=False, vector=unchanged), seed=0)
    assert report.task_vector_norm == 0
    assert "the base itself" in report.warnings[-1]


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_only_one_task_folded_again_and_again(method: FoldMethod, mlp: Base, make: Any) -> None:
    state = run(method, mlp, make(mlp, "a", 1), make(mlp, "a", 2))
    assert list(state.heads) == ["a"]
    assert all(bool(tensor.isfinite().all()) for tensor in state.merged.values())


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_replay_gives_the_same_bits(method: FoldMethod, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(3)]
    one, two = run(method, cnn, *checkpoints), run(method, cnn, *checkpoints)
    for name in cnn.weights:
        assert torch.equal(one.merged[name], two.merged[name])


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_first_task_changes_nothing_in_the_base(method: FoldMethod, cnn: Base, make: Any) -> None:
    before = {name: weight.clone() for name, weight in cnn.weights.items()}
    run(method, cnn, make(cnn, "a", 0), make(cnn, "b", 1))
    assert all(torch.equal(weight, before[name]) for name, weight in cnn.weights.items())
    assert not any(weight.requires_grad for weight in cnn.weights.values())


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_statistics_merge_as_moments_under_every_method(method: FoldMethod, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(3)]
    state = run(method, cnn, *checkpoints)
    means = [absolute(c, "bn.running_mean", cnn) for c in checkpoints]
    variances = [absolute(c, "bn.running_var", cnn) for c in checkpoints]

    def got(name: str) -> Tensor:
        return cnn.weights[name] + state.merged[name]

    np.testing.assert_allclose(got("bn.running_mean").numpy(), np.mean(means, 0), atol=1e-6)
    total = np.mean(variances, 0) + np.var(means, 0)
    np.testing.assert_allclose(got("bn.running_var").numpy(), total, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_reports_are_json(method: FoldMethod, mlp: Base, make: Any) -> None:
    import json

    _, report = method.fold(run(method, mlp, make(mlp, "a", 1)), make(mlp, "b", 2), seed=0)
    read = json.loads(json.dumps(report.as_dict()))
    assert (read["method"], read["task"], read["warnings"]) == (method.name, "b", [])
    assert (read["loss_best"] is None) == (not report.steps)
