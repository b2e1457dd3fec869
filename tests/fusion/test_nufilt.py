"""`nufilt` against a float64 transcription: projections as whole matrices, all tensors at once, Adam written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.nufilt import Nufilt
from foldd.fusion.task_vector import task_vector

Tensors = dict[str, Tensor]


def right_vectors(matrix: Tensor, count: int) -> Tensor:
    return torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:count].T


def plain_fold(base: Base, merged: Tensors, vector: Tensors, seed: int, method: Nufilt) -> tuple[Tensors, list[float]]:
    names = [name for name in base.weights if base.role(name) in (Role.MATRIX, Role.CONVOLUTION)]
    generator = torch.Generator().manual_seed(seed)
    tau, old, closed, own, p, ab = {}, {}, {}, {}, {}, []
    for name in names:
        tau[name], old[name] = (side[name].double().flatten(1) for side in (vector, merged))
        inputs = tau[name].shape[1]
        closed[name] = right_vectors(old[name], min(method.rank_previous, inputs // 2))
        own[name] = right_vectors(tau[name], method.rank_new)
        p[name] = torch.eye(inputs, dtype=torch.float64) - closed[name] @ closed[name].T
        rank = min(method.lora_rank, inputs)
        ab.append(0.02 * torch.randn(rank, inputs, generator=generator).double())
        ab.append(torch.zeros(inputs, rank, dtype=torch.float64))
    first, second = ([torch.zeros_like(x) for x in ab] for _ in range(2))
    losses = []

    def filters(parameters: list[Tensor]) -> Tensors:
        return {n: p[n] + parameters[2 * i + 1] @ parameters[2 * i] for i, n in enumerate(names)}

    for step in range(1, method.steps + 1):
        leaves = [x.clone().requires_grad_() for x in ab]
        loss = torch.zeros((), dtype=torch.float64)
        for name, filtered in filters(leaves).items():
            passed = tau[name] @ filtered
            loss = loss + ((tau[name] - old[name] - passed) @ own[name]).square().sum()
            loss = loss + (passed @ closed[name]).square().sum()
        losses.append(float(loss.detach()))
        for i, gradient in enumerate(torch.autograd.grad(loss, leaves)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m, v = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            ab[i] = ab[i] - method.learning_rate * m / (v.sqrt() + 1e-8)
    after = {n: merged[n].double() + vector[n].double() for n in base.weights}
    after |= {n: (old[n] + tau[n] @ f).reshape(vector[n].shape) for n, f in filters(ab).items()}
    return after, losses


@pytest.mark.parametrize("steps", [0, 1, 9])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_against_the_transcription(net: str, steps: int, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    method = Nufilt(rank_previous=2, rank_new=2, lora_rank=3, steps=steps, learning_rate=0.05)
    one, two = make(base, "a", 1, scale=0.5), make(base, "b", 2, scale=0.5)
    state, _ = method.fold(method.init(base), one, seed=0)
    got, report = method.fold(state, two, seed=7)
    expected, losses = plain_fold(base, task_vector(base, one), task_vector(base, two), 7, method)
    for name in base.weights:
        if base.role(name) is not Role.STATISTIC:
            torch.testing.assert_close(got.merged[name].double(), expected[name], rtol=1e-4, atol=1e-5)
    assert report.steps == steps
    if steps:
        assert report.loss_first == pytest.approx(losses[0], rel=1e-4)
        assert report.loss_last == pytest.approx(losses[-1], rel=1e-4)
        assert report.loss_best == pytest.approx(min(losses), rel=1e-4)
    else:
        assert (report.loss_first, report.loss_last, report.loss_best) == (None, None, None)


def test_without_training_the_leading_directions_stay(mlp: Base, make: Any) -> None:
    """What is merged answers its own leading inputs as before; the rest of the task vector arrives whole."""
    method = Nufilt(rank_previous=2, steps=0)
    state, _ = method.fold(method.init(mlp), make(mlp, "a", 1), seed=0)
    two = make(mlp, "b", 2)
    vector = task_vector(mlp, two)
    after, _ = method.fold(state, two, seed=0)
    for name in ("one.weight", "two.weight"):
        old = state.merged[name]
        vectors = torch.linalg.svd(old).Vh
        change = after.merged[name] - old
        assert float((change @ vectors[:2].T).abs().max()) < 1e-5
        torch.testing.assert_close(change @ vectors[2:].T, vector[name] @ vectors[2:].T, rtol=0, atol=1e-5)
    for name in ("position", "one.bias", "norm.weight"):
        assert torch.equal(after.merged[name], state.merged[name] + vector[name])


def test_training_opens_what_the_new_task_needs(cnn: Base, make: Any) -> None:
    method = Nufilt(learning_rate=0.02)  # published ranks: all are capped in so small a network
    state, _ = method.fold(method.init(cnn), make(cnn, "a", 1), seed=0)
    after, report = method.fold(state, make(cnn, "b", 2), seed=0)
    assert report.loss_first is not None
    assert report.loss_last is not None
    assert report.loss_last < 0.7 * report.loss_first
    other, _ = method.fold(state, make(cnn, "b", 2), seed=1)
    assert not torch.equal(after.merged["stem.weight"], other.merged["stem.weight"])  # the seed is A's


def test_a_small_matrix_never_closes_more_than_half_of_its_inputs(cnn: Base, make: Any) -> None:
    method = Nufilt(rank_previous=1000, steps=0)
    state, _ = method.fold(method.init(cnn), make(cnn, "a", 1), seed=0)
    after, _ = method.fold(state, make(cnn, "b", 2), seed=0)
    change = after.merged["last.weight"] - state.merged["last.weight"]  # [5, 4]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
