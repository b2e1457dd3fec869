"""`lore`, `score` and `dare` as folds: against the joint methods where they agree, and against plain recursions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.dare import Dare
from foldd.fusion.lore import PREFIX, Lore
from foldd.fusion.method import FoldMethod
from foldd.fusion.offline.score import score_merge
from foldd.fusion.score import Score
from foldd.fusion.state import MergeState
from foldd.fusion.task_arithmetic import TaskArithmetic
from foldd.fusion.task_vector import task_vector
from foldd.fusion.tsv_m import ranks_by_count

Tensors = dict[str, Tensor]


def fold_all(method: FoldMethod, base: Base, make: Any, count: int, seed: int = 0) -> tuple[MergeState, list[Tensors]]:
    checkpoints = [make(base, f"t{i}", i) for i in range(count)]
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=seed)
    return state, [task_vector(base, checkpoint) for checkpoint in checkpoints]


def matrices(base: Base) -> list[str]:
    return [name for name in base.weights if base.role(name) in (Role.MATRIX, Role.CONVOLUTION)]


def plain_low_rank(matrix: np.ndarray, share: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * np.maximum(s - s[int(share * len(s))], 0)) @ vt


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("scaling", [1.0, 0.4])
def test_lore_against_a_plain_recursion(
    net: str, share: float, scaling: float, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    state, vectors = fold_all(Lore(share=share, scaling=scaling), base, make, 4)
    for name in matrices(base):
        arrays = [v[name].double().reshape(len(v[name]), -1).numpy() for v in vectors]
        running, parts, left = np.zeros_like(arrays[0]), [], []
        for array in arrays:
            parts.append(plain_low_rank(array - running, share))
            left.append(array - parts[-1])
            running = sum(left) / len(left)
        expected = running + scaling * sum(parts)
        np.testing.assert_allclose(state.merged[name].reshape(expected.shape).numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(state.statistics[PREFIX + name].reshape(expected.shape).numpy(), running, atol=1e-5)
    for name in set(base.weights) - set(matrices(base)):
        if base.role(name) is not Role.STATISTIC:
            mean = torch.stack([v[name] for v in vectors]).mean(0)
            torch.testing.assert_close(state.merged[name], mean)


def test_lore_with_the_mean_of_its_parts_is_plain_averaging(cnn: Base, make: Any) -> None:
    state, _ = fold_all(Lore(share=0.5, scaling=1 / 3), cnn, make, 3)
    average, _ = fold_all(Average(), cnn, make, 3)
    whole, _ = fold_all(Lore(share=0.5), cnn, make, 3)
    for name in cnn.weights:
        torch.testing.assert_close(state.merged[name], average.merged[name], atol=1e-6, rtol=1e-5)
    assert any(float((whole.merged[n] - average.merged[n]).abs().max()) > 1e-3 for n in matrices(cnn))


def test_lore_goes_on_where_another_method_folded(cnn: Base, make: Any) -> None:
    before, vectors = fold_all(Average(), cnn, make, 2)
    after, _ = Lore(share=0.5).fold(before, make(cnn, "new", 9), seed=0)
    new = task_vector(cnn, make(cnn, "new", 9))
    for name in matrices(cnn):
        old = ((vectors[0][name] + vectors[1][name]) / 2).double().reshape(len(new[name]), -1).numpy()
        array = new[name].double().reshape(old.shape).numpy()
        low = plain_low_rank(old, 0.5)
        part = plain_low_rank(array - (old - low), 0.5)
        expected = (2 * (old - low) + array - part) / 3 + low + part
        np.testing.assert_allclose(after.merged[name].reshape(old.shape).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("threshold", ["paper", "code", "diagonal"])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_score_of_two_tasks_is_the_joint_merge(
    threshold: str, net: str, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    state, vectors = fold_all(Score(threshold=threshold), base, make, 2)
    for name in matrices(base):
        pair = [v[name].reshape(len(v[name]), -1) for v in vectors]
        assert torch.equal(state.merged[name].reshape(pair[0].shape), score_merge(pair, threshold))


def test_score_shares_the_basis_by_count(mlp: Base, make: Any) -> None:
    assert [ranks_by_count(8, count) for count in (1, 2, 3, 7, 20)] == [(4, 4), (4, 2), (6, 2), (7, 1), (7, 1)]
    state, vectors = fold_all(Score(), mlp, make, 2)
    after, _ = Score().fold(state, make(mlp, "new", 9), seed=0)
    new = task_vector(mlp, make(mlp, "new", 9))
    for name in matrices(mlp):
        ranks = ranks_by_count(min(new[name].shape), 2)
        expected = score_merge([state.merged[name], new[name]], "paper", ranks, 3)
        assert torch.equal(after.merged[name], expected)
    mean = torch.stack([v["one.bias"] for v in [*vectors, new]]).mean(0)
    torch.testing.assert_close(after.merged["one.bias"], mean)


def test_dare_without_dropping_is_task_arithmetic(cnn: Base, make: Any) -> None:
    one, _ = fold_all(Dare(drop=0.0, scaling=0.4), cnn, make, 4)
    other, _ = fold_all(TaskArithmetic(scaling=0.4), cnn, make, 4)
    for name in cnn.weights:
        torch.testing.assert_close(one.merged[name], other.merged[name])


def test_dare_is_on_average_task_arithmetic_and_depends_on_the_seed(mlp: Base, make: Any) -> None:
    checkpoints = [make(mlp, f"t{i}", i) for i in range(3)]
    runs = []
    for seed in range(150):
        state = Dare(drop=0.5, scaling=0.4).init(mlp)
        for checkpoint in checkpoints:
            state, _ = Dare(drop=0.5, scaling=0.4).fold(state, checkpoint, seed=seed)
        runs.append(state.merged)
    expected = fold_all(TaskArithmetic(scaling=0.4), mlp, make, 3)[0].merged
    for name in mlp.weights:
        stack = torch.stack([merged[name] for merged in runs]).double()
        assert bool(((stack.mean(0) - expected[name]).abs() <= 5 * stack.std(0) / 150**0.5 + 1e-6).all())
    assert not torch.equal(runs[0]["one.weight"], runs[1]["one.weight"])


def test_dare_sums_what_is_left_of_each_task(mlp: Base, make: Any) -> None:
    """Every element is one of the 2³ sums of tasks that dropped it and tasks that kept it, twice as large."""
    state, vectors = fold_all(Dare(drop=0.5, scaling=0.3), mlp, make, 3)
    for name in mlp.weights:
        stack = torch.stack([v[name].reshape(-1) for v in vectors])
        subsets = torch.cartesian_prod(*[torch.tensor([0.0, 0.6])] * 3)
        sums = subsets @ stack
        assert bool(((sums - state.merged[name].reshape(-1)).abs().min(0).values < 1e-6).all())
