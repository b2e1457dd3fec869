"""`fisher` and `regmean` offline, on captured networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.fusion.method import head_of
from foldd.fusion.offline.average import OfflineAverage
from foldd.fusion.offline.bundles import Bundles, merge_bundles
from foldd.fusion.offline.contract import OfflineMethod, weight_names
from foldd.fusion.offline.fisher import OfflineFisher, diagonal_fisher
from foldd.fusion.offline.regmean import OfflineRegMean
from foldd.fusion.offline.task_arithmetic import OfflineTaskArithmetic
from foldd.fusion.offline.ties import OfflineTies
from foldd.fusion.offline.tsv_m import OfflineTsvM
from foldd.fusion.state import as_tensor
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector


def weights_of(base: Base, checkpoint: Any) -> dict[str, Tensor]:
    vector = task_vector(base, checkpoint)
    return {name: weight + vector[name] for name, weight in base.weights.items()}


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize(
    "method", [OfflineFisher(), OfflineRegMean(), OfflineTies(density=1.0), OfflineTsvM()], ids=repr
)
def test_one_bundle_is_that_model(
    method: OfflineMethod, net: str, is_delta: bool, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoint = make(base, "a", 1, is_delta=is_delta)
    merged, expected = merge_bundles(method, base, [checkpoint]), task_vector(base, checkpoint)
    for name in base.weights:
        torch.testing.assert_close(merged[name], expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [OfflineFisher(), OfflineRegMean()], ids=repr)
def test_statistics_and_repeatability(method: OfflineMethod, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(2)]
    one, two = (merge_bundles(method, cnn, checkpoints) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    vectors = [task_vector(cnn, checkpoint) for checkpoint in checkpoints]
    for name, tensor in merge_statistics(cnn, *vectors, 1).items():
        torch.testing.assert_close(one[name], tensor, atol=1e-6, rtol=1e-5)


def test_regmean_is_the_least_squares_fit_of_every_layer(mlp: Base, make: Any) -> None:
    """Against torch's solver on the inputs themselves: W minimises Σ ‖X_i·Wᵀ − X_i·W_iᵀ‖²."""
    checkpoints = [make(mlp, f"t{i}", i, inputs=20) for i in range(3)]
    merged = merge_bundles(OfflineRegMean(scale=1.0), mlp, checkpoints)
    models = [weights_of(mlp, checkpoint) for checkpoint in checkpoints]
    firsts = [as_tensor(c.inputs) + m["position"] for c, m in zip(checkpoints, models, strict=True)]
    seconds = [torch.tanh(x @ m["one.weight"].T + m["one.bias"]) for x, m in zip(firsts, models, strict=True)]
    for name, inputs in (("one.weight", firsts), ("two.weight", seconds)):
        outputs = torch.cat([x @ m[name].T for x, m in zip(inputs, models, strict=True)]).double()
        expected = torch.linalg.lstsq(torch.cat(inputs).double(), outputs).solution.T
        torch.testing.assert_close(merged[name].double(), expected - mlp.weights[name], atol=1e-4, rtol=1e-4)
    mean = torch.stack([m["one.bias"] for m in models]).mean(0)
    torch.testing.assert_close(merged["one.bias"], mean - mlp.weights["one.bias"], atol=1e-6, rtol=1e-5)


def test_fisher_weights_against_the_formula(mlp: Base, make: Any) -> None:
    checkpoints = [make(mlp, f"t{i}", i, inputs=6) for i in range(3)]
    merged = merge_bundles(OfflineFisher(floor=0.01), mlp, checkpoints)
    names = weight_names(Bundles(mlp, checkpoints))
    models = [weights_of(mlp, checkpoint) for checkpoint in checkpoints]
    fishers = []
    for seed, (checkpoint, model) in enumerate(zip(checkpoints, models, strict=True)):
        raw = diagonal_fisher(mlp, model, names, head_of(checkpoint), as_tensor(checkpoint.inputs), seed=seed)
        mean = torch.cat([f.reshape(-1) for f in raw.values()]).double().mean()
        fishers.append({name: f.double() / mean + 0.01 for name, f in raw.items()})
    for name in names:
        top = sum(f[name] * m[name].detach().double() for f, m in zip(fishers, models, strict=True))
        expected = top / sum(f[name] for f in fishers) - mlp.weights[name]
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=1e-4)
    flat = merge_bundles(OfflineFisher(floor=1e6), mlp, checkpoints)
    average = merge_bundles(OfflineAverage(), mlp, checkpoints)
    assert all(torch.allclose(flat[name], average[name], atol=1e-4) for name in names)


def test_the_drawn_fisher_has_the_exact_one_as_its_mean(mlp: Base, make: Any) -> None:
    """Σ_c p_c·(∂ log p_c/∂θ)² by automatic differentiation, against the mean of many draws."""
    checkpoint = make(mlp, "a", 1, inputs=3)
    weights, head, inputs = weights_of(mlp, checkpoint), head_of(checkpoint), as_tensor(checkpoint.inputs)
    name = "two.weight"
    draws = torch.stack(
        [diagonal_fisher(mlp, weights, [name], head, inputs, seed=seed)[name] for seed in range(400)]
    ).double()
    exact = torch.zeros_like(weights[name])
    for one in inputs.split(1):
        weight = weights[name].detach().requires_grad_()
        logs = head.logits(mlp.features({**weights, name: weight}, one)).log_softmax(1)[0]
        for log in logs:
            (gradient,) = torch.autograd.grad(log, weight, retain_graph=True)
            exact += log.exp().detach() * gradient**2 / len(inputs)
    assert bool(((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 400**0.5 + 1e-9).all())


def test_bundles_and_task_arithmetic_agree_with_task_vectors(cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i, is_delta=bool(i)) for i in range(2)]
    merged = merge_bundles(OfflineTaskArithmetic(scaling=0.5), cnn, checkpoints)
    vectors = [task_vector(cnn, checkpoint) for checkpoint in checkpoints]
    for name in weight_names(Bundles(cnn, checkpoints)):
        torch.testing.assert_close(merged[name], 0.5 * (vectors[0][name] + vectors[1][name]), atol=1e-6, rtol=1e-5)
