"""`opcm` against the published recursion with full decompositions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.opcm import Opcm, orthogonal_part
from foldd.fusion.task_vector import norm, task_vector

Arrays = dict[str, np.ndarray]


def full_projection(merged: np.ndarray, vector: np.ndarray, alpha: float) -> np.ndarray:
    """The published projection: all of u and v, k where the cumulative share first exceeds alpha."""
    u, s, vh = np.linalg.svd(merged, full_matrices=True)
    above = np.cumsum(s) / s.sum() > alpha
    k = int(np.argmax(above))  # 0 where none is
    p = u.T @ vector @ vh.T
    np.fill_diagonal(p, 0)
    p[:k, :k] = 0
    return u @ p @ vh


def published(base: Base, vectors: list[Arrays], alpha: float) -> Arrays:
    """The recursion with λ: raw = λ·merged + D', merged = raw·mean(n)/‖raw‖, λ = ‖raw‖/mean(n)."""

    def length(arrays: Arrays) -> float:
        return float(np.sqrt(sum(np.sum(array**2) for array in arrays.values())))

    merged, scale, lengths = vectors[0], 1.0, [length(vectors[0])]
    for vector in vectors[1:]:
        lengths.append(length(vector))
        raw = {}
        for name, new in vector.items():
            if base.role(name) in (Role.MATRIX, Role.CONVOLUTION):
                flat = (len(new), -1)
                new = full_projection(merged[name].reshape(flat), new.reshape(flat), alpha).reshape(new.shape)
            raw[name] = scale * merged[name] + new
        mean = float(np.mean(lengths))
        merged = {name: array * mean / length(raw) for name, array in raw.items()}
        scale = length(raw) / mean
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_against_the_published_recursion(net: str, alpha: float, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoints = [make(base, f"t{i}", i, scale=0.1 * (i + 1)) for i in range(5)]
    weights = [name for name in base.weights if base.role(name) is not Role.STATISTIC]
    vectors = [{n: task_vector(base, c)[n].double().numpy() for n in weights} for c in checkpoints]
    method, state = Opcm(alpha=alpha), Opcm().init(base)
    for count, checkpoint in enumerate(checkpoints, start=1):
        state, report = method.fold(state, checkpoint, seed=0)
        for name, expected in published(base, vectors[:count], alpha).items():
            np.testing.assert_allclose(state.merged[name].numpy(), expected, rtol=1e-5, atol=2e-6)
        mean = np.mean([norm(base, task_vector(base, c)) for c in checkpoints[:count]])
        assert report.merged_norm == pytest.approx(mean, rel=1e-6)  # as far from the base as a task


@pytest.mark.parametrize("shape", [(40, 40), (96, 32), (32, 96), (7, 1), (1, 7)])
def test_projection_against_the_full_decomposition(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(4)
    merged, vector = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    expected = full_projection(merged.double().numpy(), vector.double().numpy(), 0.5)
    error = np.abs(orthogonal_part(merged, vector, 0.5).numpy() - expected).max()
    assert error < 1e-5 * np.abs(vector.numpy()).max()


def test_the_closed_block_holds_nothing_of_the_new_task() -> None:
    g = torch.Generator().manual_seed(5)
    merged, vector = (torch.randn(9, 6, generator=g, dtype=torch.float64) for _ in range(2))
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    closed = int((s.cumsum(0) / s.sum() <= 0.7).sum())
    seen = u.T @ orthogonal_part(merged, vector, 0.7) @ vh.T
    assert 2 <= closed < 6
    assert float(seen[:closed, :closed].abs().max()) < 1e-8
    assert float(seen.diagonal().abs().max()) < 1e-8
    off = seen - torch.diag(seen.diagonal())
    off[:closed, :closed] = 0
    whole = u.T @ vector @ vh.T
    whole.fill_diagonal_(0)
    whole[:closed, :closed] = 0
    torch.testing.assert_close(off, whole)


def test_a_matrix_of_low_rank_clears_only_what_it_has() -> None:
    """Zero directions have arbitrary vectors: rounding noise in them must change nothing."""
    g = torch.Generator().manual_seed(6)
    merged = torch.randn(12, 2, generator=g) @ torch.randn(2, 10, generator=g)
    vector = torch.randn(12, 10, generator=g)
    clean = orthogonal_part(merged, vector, 0.9)
    u, s, vh = np.linalg.svd(merged.double().numpy(), full_matrices=False)
    z = u[:, :2].T @ vector.double().numpy() @ vh[:2].T
    taken = np.diag(np.diag(z))
    closed = int((np.cumsum(s[:2]) / s[:2].sum() <= 0.9).sum())
    taken[:closed, :closed] = z[:closed, :closed]
    np.testing.assert_allclose(clean.numpy(), vector.numpy() - u[:, :2] @ taken @ vh[:2], atol=1e-5)
    noisy = orthogonal_part(merged + 1e-7 * torch.randn(12, 10, generator=g), vector, 0.9)
    torch.testing.assert_close(noisy, clean, rtol=0, atol=1e-5)
    assert torch.equal(orthogonal_part(torch.zeros(12, 10), vector, 0.5), vector)


def test_scaling_all_tasks_scales_the_merge(cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(3)]
    states = []
    for factor in (1.0, 4.0):  # a power of two: exact in floating point
        state = Opcm().init(cnn)
        for i, checkpoint in enumerate(checkpoints):
            vector = {name: factor * tensor for name, tensor in task_vector(cnn, checkpoint).items()}
            state, _ = Opcm().fold(state, make(cnn, f"t{i}", i, vector=vector), seed=0)
        states.append(state)
    for name in ("stem.weight", "bn.weight", "bn.bias", "last.weight"):
        torch.testing.assert_close(4.0 * states[0].merged[name], states[1].merged[name])


def test_it_goes_on_from_another_methods_merge(mlp: Base, make: Any) -> None:
    """A merge of two counts as two tasks of its own norm; without a memory of the norms it must not stumble."""
    state = Average().init(mlp)
    for i in range(2):
        state, _ = Average().fold(state, make(mlp, f"t{i}", i), seed=0)
    third = make(mlp, "t2", 2)
    _, report = Opcm().fold(state, third, seed=0)
    mean = (2 * norm(mlp, state.merged) + norm(mlp, task_vector(mlp, third))) / 3
    assert report.merged_norm == pytest.approx(mean, rel=1e-6)
