"""UOWQ's merge of N models: Lemma 8, one model for all, and what both leave unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadSetup
from foldd.core.roles import Role
from foldd.fusion.method import head_of
from foldd.fusion.offline.bundles import merge_bundles
from foldd.fusion.offline.uowq import OfflineUowq
from foldd.fusion.state import as_tensor
from foldd.fusion.task_vector import task_vector
from foldd.fusion.uowq import Uowq
from foldd.fusion.uowq_merge import TaskModel, merge_products, shares_for_all, shares_for_target, weighted_merge


def role(_: str) -> Role:
    return Role.MATRIX


def model(base: Base, checkpoint: Checkpoint, samples: float = 100.0) -> TaskModel:
    return TaskModel(task_vector(base, checkpoint), samples, head_of(checkpoint), as_tensor(checkpoint.inputs))


def linear(seed: int, models: int = 3):
    """Vectors [models, 5] with an explicit J [5, 5], counts, and G."""
    random = np.random.RandomState(seed)
    vectors, root = 0.1 * random.randn(models, 5), random.randn(5, 5)
    fisher = root @ root.T
    return vectors, fisher, random.randint(50, 900, models).astype(float), vectors @ fisher @ vectors.T


@pytest.mark.parametrize("target", [0, 1, 2])
def test_equation_47_lemma_8_is_the_least_of_the_measure_over_all_affine_combinations(target):
    """Against a search over the merged model's own shares: the target's bias is none, the others' are as they are."""
    vectors, fisher, counts, products = linear(1)
    shares, weights = shares_for_target(counts, products, 5, target)
    sources = [i for i in range(3) if i != target]
    worth = np.array(weights.weights) * counts[sources]
    expected = counts[target] * vectors[target] + worth @ vectors[sources]
    np.testing.assert_allclose(np.array(shares) @ vectors, expected / (counts[target] + worth.sum()), rtol=1e-12)

    def measure(beta):
        bias = beta @ vectors - vectors[target]
        return 5 * (beta**2 / counts).sum() + bias @ fisher @ bias

    grid = np.linspace(0, 1, 401)
    points = np.array([(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1])
    least = min(measure(point) for point in points)
    assert measure(np.array(shares)) <= least
    assert measure(np.array(shares)) > 0.99 * least


def test_products_of_a_network_do_not_depend_on_the_origin(mlp: Base, make: Any) -> None:
    models = [model(mlp, make(mlp, task, seed)) for seed, task in enumerate("abc")]
    products = merge_products(mlp, models)
    np.testing.assert_allclose(products, products.T, rtol=1e-12)
    counts = [100.0, 300.0, 50.0]
    centre = np.eye(3) - np.full((3, 3), 1 / 3)
    moved = centre.T @ products @ centre
    np.testing.assert_allclose(shares_for_all(counts, products, 20), shares_for_all(counts, moved, 20), rtol=1e-6)
    np.testing.assert_allclose(
        shares_for_target(counts, products, 20, 1)[0], shares_for_target(counts, moved, 20, 1)[0], rtol=1e-6
    )


def test_two_models_merge_as_a_fold_of_two(cnn: Base, make: Any) -> None:
    tasks = [make(cnn, "a", 1, samples=900), make(cnn, "b", 2, samples=60)]
    method = Uowq(dimension=25)
    state, report = method.fold(method.fold(method.init(cnn), tasks[0], seed=0)[0], tasks[1], seed=0)
    models = [model(cnn, task, float(task.samples or 0)) for task in tasks]
    shares = shares_for_all([900, 60], merge_products(cnn, models), 25)
    assert shares == pytest.approx((report.shares["merged"], report.shares["incoming"]), rel=1e-5)
    merged = weighted_merge([m.vector for m in models], shares, cnn.role)
    for name, tensor in state.merged.items():
        np.testing.assert_allclose(merged[name].numpy(), tensor.numpy(), atol=1e-5)


def test_one_model_is_that_model(cnn: Base, make: Any) -> None:
    one = model(cnn, make(cnn, "a", 1))
    products = merge_products(cnn, [one])
    assert shares_for_all([7], products, 5) == (1.0,)
    assert shares_for_target([7], products, 5, 0)[0] == (1.0,)
    merged = weighted_merge([one.vector], (1.0,), cnn.role)
    assert all(torch.equal(merged[name], one.vector[name]) for name in cnn.weights)


def test_identical_models_are_that_model_and_go_by_samples(cnn: Base, make: Any) -> None:
    vector = task_vector(cnn, make(cnn, "x", 5))
    models = [model(cnn, make(cnn, task, seed, vector=vector)) for seed, task in enumerate("abc")]
    shares = shares_for_all([10, 20, 70], merge_products(cnn, models), 5)
    np.testing.assert_allclose(shares, (0.1, 0.2, 0.7), rtol=1e-6)
    merged = weighted_merge([m.vector for m in models], shares, cnn.role)
    assert all(torch.equal(merged[name], vector[name]) for name in cnn.weights)


def test_permuted_models_have_permuted_shares_and_the_same_merge(mlp: Base, make: Any) -> None:
    models = [model(mlp, make(mlp, task, seed)) for seed, task in enumerate("abcd")]
    counts, order = [100.0, 300.0, 50.0, 700.0], [2, 0, 3, 1]
    shares = shares_for_all(counts, merge_products(mlp, models), 10)
    moved = shares_for_all([counts[i] for i in order], merge_products(mlp, [models[i] for i in order]), 10)
    np.testing.assert_allclose(moved, [shares[i] for i in order], rtol=1e-6)
    one = weighted_merge([m.vector for m in models], shares, mlp.role)
    other = weighted_merge([models[i].vector for i in order], moved, mlp.role)
    for name in mlp.weights:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), atol=1e-6)


def test_scaled_vectors_have_a_scaled_merge() -> None:
    g = torch.Generator().manual_seed(0)
    vectors = [{"w": torch.randn(3, 4, generator=g)} for _ in range(3)]
    scaled = [{"w": 4 * vector["w"]} for vector in vectors]  # a power of two changes no rounding
    shares = (0.5, 0.2, 0.3)
    assert torch.equal(weighted_merge(scaled, shares, role)["w"], 4 * weighted_merge(vectors, shares, role)["w"])


def test_statistics_are_the_moments_of_the_mixture(cnn: Base, make: Any) -> None:
    models = [model(cnn, make(cnn, task, seed)) for seed, task in enumerate("abc")]
    shares = (0.6, 0.1, 0.3)
    merged = weighted_merge([m.vector for m in models], shares, cnn.role)

    def absolute(vector: Any, name: str) -> np.ndarray:
        return (vector[name].double() + cnn.weights[name].double()).numpy()

    means = [absolute(m.vector, "bn.running_mean") for m in models]
    squares = [absolute(m.vector, "bn.running_var") + mean**2 for m, mean in zip(models, means, strict=True)]
    mean = np.average(means, axis=0, weights=shares)
    np.testing.assert_allclose(absolute(merged, "bn.running_mean"), mean, atol=1e-6)
    variance = np.average(squares, axis=0, weights=shares) - mean**2
    np.testing.assert_allclose(absolute(merged, "bn.running_var"), variance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_low_rank_vectors_are_finite_and_deterministic(
    dtype: torch.dtype, cnn: Base, make: Any
) -> None:
    def low_rank(seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        vector = {name: torch.zeros_like(weight) for name, weight in cnn.weights.items()}
        vector["last.weight"] = torch.randn(5, 1, generator=g) @ torch.randn(1, 4, generator=g)
        return {name: value.to(dtype) for name, value in vector.items()}

    checkpoints = [make(cnn, task, seed) for seed, task in enumerate("abc")]
    models = [
        TaskModel(low_rank(i), 100.0 * (i + 1), head_of(c), as_tensor(c.inputs)) for i, c in enumerate(checkpoints)
    ]
    merges = []
    for _ in range(2):
        shares = shares_for_all([m.samples for m in models], merge_products(cnn, models), 5)
        merges.append(weighted_merge([m.vector for m in models], shares, cnn.role))
    assert all(bool(value.isfinite().all()) and value.dtype == dtype for value in merges[0].values())
    assert all(torch.equal(value, merges[1][name]) for name, value in merges[0].items())


@pytest.mark.parametrize("target", [0, 2])
def test_the_offline_method_is_these_functions(target: int, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, task, seed, samples=60 * seed + 30) for seed, task in enumerate("abc")]
    counts = [30.0, 90.0, 150.0]
    products = merge_products(cnn, [model(cnn, checkpoint) for checkpoint in checkpoints])
    shares = shares_for_all(counts, products, 9)
    if target:
        shares, _ = shares_for_target(counts, products, 9, target - 1)
    merged = merge_bundles(OfflineUowq(dimension=9, target=target), cnn, checkpoints)
    expected = weighted_merge([task_vector(cnn, checkpoint) for checkpoint in checkpoints], shares, cnn.role)
    for name in cnn.weights:
        if cnn.role(name) is not Role.STATISTIC:
            np.testing.assert_allclose(merged[name].numpy(), expected[name].numpy(), atol=1e-5)


def test_the_offline_method_wants_counts_and_a_target_that_is_there(cnn: Base, make: Any) -> None:
    told, silent = make(cnn, "a", 1, samples=5), make(cnn, "b", 2)
    for method, checkpoints, code in [
        (OfflineUowq(), [told, silent], "no-samples"), (OfflineUowq(target=3), [told, told], "bad-option"),
        (OfflineUowq(samples="5"), [told, silent], "bad-option"),
        (OfflineUowq(samples="5,0"), [told, silent], "bad-option"),
    ]:  # fmt: skip
        with pytest.raises(BadSetup) as caught:
            merge_bundles(method, cnn, checkpoints)
        assert caught.value.code == code


def test_counts_may_be_given_beside_the_bundles(cnn: Base, make: Any) -> None:
    told = [make(cnn, "a", 1, samples=300), make(cnn, "b", 2, samples=50)]
    silent = [make(cnn, "a", 1), make(cnn, "b", 2)]
    one, other = merge_bundles(OfflineUowq(), cnn, told), merge_bundles(OfflineUowq(samples="300,50"), cnn, silent)
    assert all(torch.equal(one[name], other[name]) for name in one)
