"""`otmf-paper` against a plain float64 transcription of equation 4 and algorithm 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.errors import BadCheckpoint
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.task_vector import task_vector

Tensors = dict[str, Tensor]


def plain_divergence(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """The debiased Sinkhorn divergence, differentiated through hundreds of unrolled iterations."""

    def transport(x: Tensor, y: Tensor) -> Tensor:
        cost = torch.stack([torch.stack([((p - q) ** 2).sum() / 2 for q in y]) for p in x])
        f, g = torch.zeros(len(x), dtype=x.dtype), torch.zeros(len(y), dtype=x.dtype)
        for _ in range(400):
            g = -epsilon * (torch.logsumexp((f[:, None] - cost) / epsilon, 0) - math.log(len(x)))
            f = -epsilon * (torch.logsumexp((g[None, :] - cost) / epsilon, 1) - math.log(len(y)))
        return f.mean() + g.mean()

    return transport(x, y) - transport(x, x) / 2 - transport(y, y) / 2


def plain_fold(
    base: Base, pre: Tensors, post: Tensors, inputs: tuple[Tensor, Tensor], seed: int, method: OtmfPaper
) -> Tensors:
    """Algorithm 1 in plain loops: masks in autograd, teachers run again for every batch, Adam written out."""
    masks = [{n: torch.ones_like(w) for n, w in base.weights.items()} for _ in range(2)]
    first = [{n: torch.zeros_like(w) for n, w in base.weights.items()} for _ in range(2)]
    second = [{n: torch.zeros_like(w) for n, w in base.weights.items()} for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)
    queues: list[list[int]] = [[], []]
    best_loss, best = math.inf, masks
    for step in range(method.steps):
        turn = step % 2
        if len(queues[turn]) < method.batch:
            queues[turn] = torch.randperm(len(inputs[turn]), generator=generator).tolist()
        index, queues[turn] = queues[turn][: method.batch], queues[turn][method.batch :]
        x = inputs[turn][index]
        leaves = [{n: m.clone().requires_grad_() for n, m in side.items()} for side in masks]
        student = {
            n: w + method.alpha * leaves[0][n] * pre[n] + (1 - method.alpha) * leaves[1][n] * post[n]
            for n, w in base.weights.items()
        }
        teacher = {n: w + (pre, post)[turn][n] for n, w in base.weights.items()}
        loss = plain_divergence(base.features(student, x), base.features(teacher, x), method.blur**2)
        if float(loss.detach()) < best_loss:
            best_loss, best = float(loss.detach()), [dict(side) for side in masks]
        gradients = torch.autograd.grad(loss, list(leaves[turn].values()))
        count = step // 2 + 1
        for (n, mask), g in zip(list(masks[turn].items()), gradients, strict=True):
            first[turn][n] = 0.9 * first[turn][n] + 0.1 * g
            second[turn][n] = 0.999 * second[turn][n] + 0.001 * g * g
            m, v = first[turn][n] / (1 - 0.9**count), second[turn][n] / (1 - 0.999**count)
            masks[turn][n] = mask - method.learning_rate * m / (v.sqrt() + 1e-8)
    return {n: method.alpha * best[0][n] * pre[n] + (1 - method.alpha) * best[1][n] * post[n] for n in base.weights}


@pytest.mark.parametrize("steps", [1, 7])
def test_against_the_plain_transcription(mlp: Base, make: Any, steps: int) -> None:
    base = replace(mlp, weights={n: w.double() for n, w in mlp.weights.items()})
    one, two = make(base, "a", 1, inputs=8, scale=0.5), make(base, "b", 2, inputs=6, scale=0.5)
    method = OtmfPaper(steps=steps, batch=3, blur=0.8, learning_rate=0.05)
    state, _ = method.fold(method.init(base), one, seed=0)
    got, report = method.fold(state, two, seed=9)
    pre, post = (({n: v.double() for n, v in task_vector(base, c).items()}) for c in (one, two))
    inputs = (torch.from_numpy(one.inputs).double(), torch.from_numpy(two.inputs).double())
    expected = plain_fold(base, pre, post, inputs, 9, method)
    assert report.steps == steps
    for name in base.weights:
        torch.testing.assert_close(got.merged[name].double(), expected[name], rtol=1e-4, atol=1e-6)


def test_masks_move_as_published(mlp: Base, make: Any) -> None:
    """At the published blur a solver that underflows has no gradient, and its masks stay at one."""
    method = OtmfPaper(steps=20, batch=8)
    one, two = make(mlp, "a", 1, inputs=16), make(mlp, "b", 2, inputs=16)
    state, _ = method.fold(method.init(mlp), one, seed=0)
    after, report = method.fold(state, two, seed=0)
    pre, post = task_vector(mlp, one), task_vector(mlp, two)
    for name in ("one.weight", "two.weight", "position"):
        start = 0.8 * pre[name] + 0.2 * post[name]
        assert float((after.merged[name] - start).abs().max()) > 1e-4
    assert report.loss_first is not None
    assert report.loss_best is not None
    assert 0 < report.loss_best < report.loss_first


def test_another_seed_takes_other_batches(mlp: Base, make: Any) -> None:
    method = OtmfPaper(steps=4, batch=4)
    state, _ = method.fold(method.init(mlp), make(mlp, "a", 1), seed=0)
    two = make(mlp, "b", 2)
    one, other = (method.fold(state, two, seed=seed)[1].loss_first for seed in (0, 1))
    assert one != other


def test_without_incoming_inputs_it_says_so(mlp: Base, make: Any) -> None:
    method = OtmfPaper(steps=2, batch=4)
    state, _ = method.fold(method.init(mlp), make(mlp, "a", 1, inputs=0), seed=0)  # the first needs none
    with pytest.raises(BadCheckpoint) as caught:
        method.fold(state, make(mlp, "b", 2, inputs=0), seed=0)
    assert caught.value.code == "no-calibration"


def test_without_previous_inputs_the_incoming_ones_stand_in(mlp: Base, make: Any) -> None:
    method = OtmfPaper(steps=4, batch=4)
    one, two = make(mlp, "a", 1), make(mlp, "b", 2)
    state, _ = method.fold(method.init(mlp), one, seed=0)
    got, report = method.fold(replace(state, calibration=None), two, seed=0)
    same, _ = method.fold(replace(state, calibration=torch.from_numpy(two.inputs)), two, seed=0)
    assert "stand in" in report.warnings[0]
    assert all(torch.equal(got.merged[name], same.merged[name]) for name in mlp.weights)


@pytest.mark.filterwarnings("ignore:overflow")
def test_features_that_overflow_are_a_bad_checkpoint(cnn: Base, make: Any) -> None:
    method = OtmfPaper(steps=2, batch=4)
    state, _ = method.fold(method.init(cnn), make(cnn, "a", 1), seed=0)
    vector = {name: torch.full_like(weight, 1e30) for name, weight in cnn.weights.items()}
    with pytest.raises(BadCheckpoint) as caught:
        method.fold(state, make(cnn, "b", 2, vector=vector), seed=0)
    assert caught.value.code == "features-not-finite"
