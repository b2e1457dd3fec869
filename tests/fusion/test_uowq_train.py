"""Algorithms 1 and 2: their example, their schedule of weights, and what training gains by them."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import foldd.fusion.uowq_train as room
from foldd.fusion.transfer_weights import transfer_weights
from foldd.fusion.uowq_train import Samples, Source, TransferTraining, source_weights, train_target, train_tasks

CLASSES, WIDTH = 3, 4


def logits(parameters: Any, x: Tensor) -> Tensor:
    return x @ parameters["w"].T + parameters["b"]


def start() -> dict[str, Tensor]:
    return {"w": torch.zeros(CLASSES, WIDTH), "b": torch.zeros(CLASSES)}


def truth(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": scale * torch.randn(CLASSES, WIDTH, generator=g), "b": torch.zeros(CLASSES)}


def draw(parameters: dict[str, Tensor], count: int, seed: int) -> Samples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=g)
    return Samples(x, torch.multinomial(logits(parameters, x).softmax(1), 1, generator=g)[:, 0])


def loss(parameters: dict[str, Tensor], samples: Samples) -> float:
    return float(F.cross_entropy(logits(parameters, samples.inputs), samples.labels))


def domains() -> tuple[dict[str, Tensor], list[Source]]:
    """A target's true parameters, and sources: one like it, one unlike."""
    target, other = truth(1), truth(2)
    near = {name: value + 0.1 for name, value in target.items()}
    return target, [Source(draw(near, 600, 3), near), Source(draw(other, 600, 4), other)]


def test_the_example_of_the_documentation() -> None:
    failed, tried = doctest.testmod(room)
    assert (failed, tried > 8) == (0, True)


def test_source_weights_against_an_explicit_empirical_fisher_matrix() -> None:
    target, sources = domains()
    samples, at = draw(target, 30, 5), truth(6, 0.3)
    rows = []
    for x, y in zip(samples.inputs, samples.labels, strict=True):
        p = logits(at, x).softmax(0)
        residual = F.one_hot(y, CLASSES).float() - p  # ∂ log p(y)/∂ logits
        rows.append(torch.cat([torch.outer(residual, x).flatten(), residual]).double().numpy())
    fisher = np.mean([np.outer(row, row) for row in rows], 0)
    theta = np.stack(
        [torch.cat([(s.parameters[n] - at[n]).flatten() for n in ("w", "b")]).double().numpy() for s in sources], 1
    )
    for dimension, used in ((0.0, CLASSES * WIDTH + CLASSES), (4.0, 4.0)):
        expected = transfer_weights([600, 600], theta.T @ fisher @ theta, used)
        found = source_weights(logits, at, samples, sources, dimension)
        np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4)


def test_the_first_epoch_sees_the_target_alone() -> None:
    target, sources = domains()
    samples = draw(target, 40, 5)
    one = TransferTraining(epochs=1, learning_rate=0.05)
    with_sources = train_target(logits, start(), samples, sources, one, seed=0)
    alone = train_target(logits, start(), samples, [], one, seed=0)
    assert with_sources.weights == ()
    assert all(torch.equal(alone.parameters[name], value) for name, value in with_sources.parameters.items())


def test_static_weights_are_the_first_dynamic_ones() -> None:
    target, sources = domains()
    samples = draw(target, 40, 5)
    found = {
        dynamic: train_target(
            logits, start(), samples, sources, TransferTraining(epochs=4, learning_rate=0.05, dynamic=dynamic), seed=0
        )
        for dynamic in (True, False)
    }
    assert (len(found[True].weights), len(found[False].weights)) == (3, 1)
    assert found[True].weights[0] == found[False].weights[0] != found[True].weights[1]


def test_equation_5_is_the_loss_that_training_descends() -> None:
    """With fixed weights, at convergence, against Newton-free full-batch descent of the weighted likelihood."""
    target, sources = domains()
    samples, fixed = draw(target, 60, 5), (0.7, 0.2)
    training = TransferTraining(epochs=300, batch=10_000, learning_rate=0.05)
    found = train_target(logits, start(), samples, sources, training, seed=0, fixed=fixed)
    leaves = {name: value.requires_grad_() for name, value in start().items()}
    parts = [(samples, 1.0), *((s.samples, w) for s, w in zip(sources, fixed, strict=True))]
    optimiser = torch.optim.LBFGS(leaves.values(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        total = sum(w * F.cross_entropy(logits(leaves, s.inputs), s.labels, reduction="sum") for s, w in parts) / 1000
        assert isinstance(total, Tensor)
        total.backward()
        return total

    optimiser.step(objective)
    with torch.no_grad():
        for part in (samples, sources[0].samples, sources[1].samples):
            ours, best = (logits(p, part.inputs).log_softmax(1) for p in (found.parameters, leaves))
            assert float((ours - best).abs().max()) < 0.02
    assert found.weights == ()


def test_weighted_sources_beat_the_target_alone_and_all_sources_alike() -> None:
    """Held-out loss, mean of 5 draws of 40 target samples; a like source and an unlike one."""
    target, sources = domains()
    held_out = draw(target, 20_000, 9)
    training = TransferTraining(epochs=30, learning_rate=0.02)
    losses: dict[str, list[float]] = {"alone": [], "alike": [], "uowq": []}
    for seed in range(5):
        samples = draw(target, 40, 50 + seed)
        for name, used, fixed in (("alone", [], None), ("alike", sources, (1.0, 1.0)), ("uowq", sources, None)):
            found = train_target(logits, start(), samples, used, training, seed=seed, fixed=fixed)
            losses[name].append(loss(found.parameters, held_out))
            if name == "uowq":
                like, unlike = found.weights[-1].weights
                assert like > unlike
    mean = {name: float(np.mean(values)) for name, values in losses.items()}
    assert mean["uowq"] < mean["alone"] - 0.02
    assert mean["uowq"] < mean["alike"] - 0.02


def test_algorithm_2_gives_a_model_for_each_task_and_the_weights_between_them() -> None:
    one, other = truth(1), truth(2)
    near = {name: value + 0.1 for name, value in one.items()}
    tasks = [draw(p, n, 20 + i) for i, (p, n) in enumerate([(one, 80), (near, 600), (other, 600)])]
    found = train_tasks(logits, start(), tasks, TransferTraining(epochs=20, learning_rate=0.05), seed=0)
    assert len(found.parameters) == len(found.weights) == 3
    assert all(len(weights.weights) == 2 for weights in found.weights)
    like, unlike = found.weights[0].weights
    assert like > 2 * unlike  # the first task borrows from the second, not from the third
    alone = train_tasks(logits, start(), tasks, TransferTraining(epochs=20, learning_rate=0.05), seed=0, fixed=0.0)
    held_out = draw(one, 20_000, 9)
    assert loss(found.parameters[0], held_out) < loss(alone.parameters[0], held_out)


def test_algorithm_2_starts_with_every_task_alone_and_one_task_stays_alone() -> None:
    tasks = [draw(truth(1), 50, 1), draw(truth(2), 50, 2)]
    found = train_tasks(logits, start(), tasks, TransferTraining(epochs=1), seed=0)
    assert [weights.weights for weights in found.weights] == [(0.0,), (0.0,)]
    single = train_tasks(logits, start(), tasks[:1], TransferTraining(epochs=3), seed=0)
    assert single.weights[0].weights == ()


@pytest.mark.parametrize("algorithm", ["target", "tasks"])
def test_training_is_deterministic_and_leaves_its_arguments_alone(algorithm: str) -> None:
    target, sources = domains()
    samples, begin = draw(target, 40, 5), start()
    before = {name: value.clone() for name, value in begin.items()}
    training = TransferTraining(epochs=3, learning_rate=0.05)
    results, shares = [], []
    for _ in range(2):
        if algorithm == "target":
            found = train_target(logits, begin, samples, sources, training, seed=4, progress=shares.append)
            results.append(found.parameters)
        else:
            tasks = [samples, *(source.samples for source in sources)]
            results.append(train_tasks(logits, begin, tasks, training, seed=4, progress=shares.append).parameters[0])
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert all(torch.equal(before[name], value) for name, value in begin.items())
    assert shares[-1] == 1.0
    assert not any(value.requires_grad for value in results[0].values())
