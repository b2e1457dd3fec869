"""`uowq` behind the fold contract: its α against an explicit Fisher matrix, and what it does at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.state import MergeState, as_tensor, pack, unpack
from foldd.fusion.task_vector import task_vector
from foldd.fusion.uowq import UNKNOWN_SAMPLES, Uowq, count_parameters

both = pytest.mark.parametrize("net", ["mlp", "cnn"])


def run(method: Any, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def bits(state: MergeState) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in pack(state)[0].items()}


def explicit(base: Base, vector: dict[str, Tensor], checkpoint: Checkpoint, direction: dict[str, Tensor]) -> float:
    """directionᵀ·J·direction in float64 from the Jacobian of the logits: J as a d × d matrix of its own."""
    names = [name for name in base.weights if base.role(name) is not Role.STATISTIC]
    inputs = as_tensor(checkpoint.inputs).double()
    head_weight, head_bias = torch.from_numpy(checkpoint.head.weight), torch.from_numpy(checkpoint.head.bias)
    weights = {name: (weight + vector[name]).double() for name, weight in base.weights.items()}
    sizes = [weights[name].numel() for name in names]

    def logits(flat: Tensor) -> Tensor:
        parts = {n: part.view(weights[n].shape) for n, part in zip(names, flat.split(sizes), strict=True)}
        return base.features(weights | parts, inputs) @ head_weight.double().T + head_bias.double()

    flat = torch.cat([weights[name].flatten() for name in names])
    jacobian = torch.autograd.functional.jacobian(logits, flat)  # [n, classes, d]
    p = logits(flat).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("ncd,nce,nef->df", jacobian, middle, jacobian) / len(inputs)
    along = torch.cat([direction[name].double().flatten() for name in names])
    return float(along @ fisher @ along)


@both
def test_alpha_of_a_fold_against_an_explicit_fisher_matrix(net: str, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    method = Uowq(dimension=40.0)
    tasks = [make(base, t, i, samples=n) for i, (t, n) in enumerate([("a", 300), ("b", 50), ("c", 700)])]
    state = run(method, base, *tasks[:2])
    after, report = method.fold(state, tasks[2], seed=0)
    new = task_vector(base, tasks[2])
    difference = {name: new[name] - state.merged[name] for name in base.weights}
    # The previous task's Fisher matrix is the merged network's, under the previous task's own head.
    delta = (explicit(base, state.merged, tasks[1], difference) + explicit(base, new, tasks[2], difference)) / 2 / 40
    alpha = (1 / 700 + delta * 2 / 3) / (1 / 700 + 1 / 350 + delta)
    assert report.shares["merged"] == pytest.approx(alpha, rel=1e-4)
    assert report.shares["incoming"] == pytest.approx(1 - alpha, rel=1e-4)
    assert report.warnings == ()
    for name in base.weights:
        if base.role(name) is not Role.STATISTIC:
            expected = alpha * state.merged[name].double() + (1 - alpha) * new[name].double()
            np.testing.assert_allclose(after.merged[name].numpy(), expected.numpy(), atol=2e-5)


def test_the_published_dimension_is_the_number_of_trained_parameters(cnn: Base, make: Any) -> None:
    assert count_parameters(cnn) == 4 * 27 + 4 + 4 + 20  # no statistics
    tasks = [make(cnn, t, i, samples=n) for i, (t, n) in enumerate([("a", 300), ("b", 50)])]
    assert bits(run(Uowq(), cnn, *tasks)) == bits(run(Uowq(dimension=136), cnn, *tasks))
    assert bits(run(Uowq(), cnn, *tasks)) != bits(run(Uowq(dimension=13), cnn, *tasks))


@both
@pytest.mark.parametrize("samples", [None, 400])
def test_equal_counts_give_the_plain_average(
    net: str, samples: int | None, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    tasks = [make(base, f"t{i}", i, samples=samples) for i in range(4)]
    ours, plain = run(Uowq(dimension=3), base, *tasks), run(Average(), base, *tasks)
    for name in base.weights:
        np.testing.assert_allclose(ours.merged[name].numpy(), plain.merged[name].numpy(), atol=2e-6)


def test_statistics_are_the_moments_of_the_weighted_mixture(cnn: Base, make: Any) -> None:
    tasks = [make(cnn, t, i, samples=n, is_delta=False) for i, (t, n) in enumerate([("a", 900), ("b", 50)])]
    state, report = Uowq().fold(run(Uowq(), cnn, tasks[0]), tasks[1], seed=0)
    weights = report.shares["merged"], report.shares["incoming"]
    means, variances = (
        [c.parameters[f"bn.running_{kind}"].float32().astype(np.float64) for c in tasks] for kind in ("mean", "var")
    )
    mean = np.average(means, axis=0, weights=weights)
    variance = np.average(variances, axis=0, weights=weights) + np.average((means - mean) ** 2, axis=0, weights=weights)
    found = {name: (cnn.weights[name] + state.merged[name]).numpy() for name in cnn.weights}
    np.testing.assert_allclose(found["bn.running_mean"], mean, atol=1e-6)
    np.testing.assert_allclose(found["bn.running_var"], variance, atol=1e-6)


@both
def test_the_first_fold_takes_the_model_as_it_is(net: str, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoint = make(base, "a", 3, inputs=0, samples=10)
    state, report = Uowq().fold(Uowq().init(base), checkpoint, seed=0)
    vector = task_vector(base, checkpoint)
    assert all(torch.equal(state.merged[name], vector[name]) for name in base.weights)
    assert (dict(report.shares), report.warnings) == ({}, ())


def test_identical_models_fold_to_that_model(cnn: Base, make: Any) -> None:
    vector = task_vector(cnn, make(cnn, "x", 7))
    state = run(Uowq(), cnn, *(make(cnn, t, 8, vector=vector, samples=100 * (i + 1)) for i, t in enumerate("abc")))
    assert all(torch.equal(state.merged[name], vector[name]) for name in cnn.weights)


def test_a_missing_count_is_the_mean_of_the_known_and_is_told(mlp: Base, make: Any) -> None:
    known = [make(mlp, "a", 1, samples=200), make(mlp, "b", 2, samples=600)]
    state = run(Uowq(), mlp, *known)
    after, report = Uowq().fold(state, make(mlp, "c", 3), seed=0)
    assert "c does not tell its count of samples (foldd.samples): 400 are assumed." in report.warnings
    assert after.statistics["uowq"].tolist() == [1200, 3]
    first, report = Uowq().fold(Uowq().init(mlp), make(mlp, "c", 3), seed=0)
    assert f"{UNKNOWN_SAMPLES:.0f} are assumed" in report.warnings[0]
    assert first.statistics["uowq"].tolist() == [UNKNOWN_SAMPLES, 1]


def test_tasks_of_another_method_count_as_the_known_ones(mlp: Base, make: Any) -> None:
    state = run(Average(), mlp, make(mlp, "a", 1, samples=200), make(mlp, "b", 2, samples=600))
    after, report = Uowq().fold(state, make(mlp, "c", 3, samples=50), seed=0)
    assert "2 tasks were folded by another method: 50 samples each are assumed." in report.warnings
    assert after.statistics["uowq"].tolist() == [150, 3]


def test_inputs_that_the_previous_task_did_not_leave(mlp: Base, make: Any) -> None:
    state = run(Uowq(), mlp, make(mlp, "a", 1, inputs=0, samples=200))
    incoming = make(mlp, "b", 2, samples=900)
    _, report = Uowq(dimension=9).fold(state, incoming, seed=0)
    assert any("a left no calibration inputs" in warning for warning in report.warnings)
    new = task_vector(mlp, incoming)
    delta = explicit(mlp, new, incoming, {name: new[name] - state.merged[name] for name in mlp.weights}) / 9
    assert report.shares["merged"] == pytest.approx((1 / 900 + delta / 2) / (1 / 900 + 1 / 200 + delta), rel=1e-4)


def test_what_cannot_be_folded(mlp: Base, make: Any) -> None:
    state = run(Uowq(), mlp, make(mlp, "a", 1))
    with pytest.raises(BadCheckpoint) as caught:
        Uowq().fold(state, make(mlp, "b", 2, inputs=0), seed=0)
    assert caught.value.code == "no-calibration"
    with pytest.raises(BadCheckpoint) as caught:
        Uowq().fold(state, make(mlp, "b", 2, scale=1e38), seed=0)
    assert caught.value.code == "features-not-finite"


@both
def test_replay_through_a_file_gives_the_same_bits_whatever_the_seed(
    net: str, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    tasks = [make(base, f"t{i}", i, samples=100 + 300 * i) for i in range(4)]
    through = Uowq().init(base)
    for seed, checkpoint in enumerate(tasks):
        through = unpack(base, *pack(Uowq().fold(through, checkpoint, seed=seed)[0]))
    assert bits(run(Uowq(), base, *tasks)) == bits(through)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_low_rank_vectors_are_finite_and_deterministic(
    dtype: torch.dtype, cnn: Base, make: Any
) -> None:
    def checkpoint(task: str, seed: int) -> Checkpoint:
        g = torch.Generator().manual_seed(seed)
        vector = {name: torch.zeros_like(weight) for name, weight in cnn.weights.items()}
        vector["last.weight"] = torch.randn(5, 1, generator=g) @ torch.randn(1, 4, generator=g)  # rank 1, as of LoRA
        rounded = {name: value.to(dtype).float() for name, value in vector.items()}
        return make(cnn, task, seed, vector=rounded, samples=100 * seed)

    tasks = [checkpoint("a", 1), checkpoint("b", 2), checkpoint("c", 3)]
    state = run(Uowq(dimension=5), cnn, *tasks)
    assert all(bool(tensor.isfinite().all()) for tensor in state.merged.values())
    assert bits(state) == bits(run(Uowq(dimension=5), cnn, *tasks))


def test_the_fold_uses_the_formula_of_two_targets_and_not_of_one(mlp: Base, make: Any) -> None:
    """As an incoming target with the merge as its source, a distant task would take almost all."""
    tasks = [make(mlp, t, i, samples=1000, scale=3.0) for i, t in enumerate("abc")]
    _, report = Uowq(dimension=0.001).fold(run(Uowq(), mlp, *tasks[:2]), tasks[2], seed=0)
    assert report.shares["merged"] == pytest.approx(2 / 3, abs=1e-3)
