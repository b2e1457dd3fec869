"""ΘᵀJΘ by forward-mode derivatives, against an explicit Fisher matrix of per-sample gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from foldd.core.errors import BadSetup
from foldd.fusion.fisher import fisher_products

CLASSES = 4


class Attention(nn.Module):
    """[n, 5, 6] → [n, 4], with the fused attention kernel and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v)[:, 0]).mean(1))


class Convolution(nn.Module):
    """[n, 2, 5, 5] → [n, 4], with BatchNorm in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bn(self.conv(x))).mean((2, 3)))


def network(kind: str, samples: int = 9, directions: int = 3, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    module = {"attention": Attention, "convolution": Convolution}[kind]().eval().to(dtype)
    shape = {"attention": (5, 6), "convolution": (2, 5, 5)}[kind]
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    theta = [{name: torch.randn_like(value) for name, value in parameters.items()} for _ in range(directions)]
    inputs, labels = torch.randn(samples, *shape, dtype=dtype), torch.randint(0, CLASSES, (samples,))
    return (lambda at, x: functional_call(module, dict(at), (x,))), parameters, theta, inputs, labels


def gradient(logits, parameters, one: Tensor, label: int) -> np.ndarray:
    """∂ log p(label | one) by backpropagation, [d]."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    log_p = logits(leaves, one[None]).log_softmax(1)[0, label]
    return torch.cat([g.flatten() for g in torch.autograd.grad(log_p, list(leaves.values()))]).numpy()


def matrix(theta, parameters) -> np.ndarray:
    """Θ, [d, K]."""
    return np.stack([torch.cat([one[name].flatten() for name in parameters]).numpy() for one in theta], 1)


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_empirical_fisher_against_the_explicit_matrix(kind):
    logits, parameters, theta, inputs, labels = network(kind)
    rows = np.stack([gradient(logits, parameters, x, int(y)) for x, y in zip(inputs, labels, strict=True)])
    fisher = rows.T @ rows / len(rows)  # d × d
    big = matrix(theta, parameters)
    found = fisher_products(logits, parameters, theta, inputs, labels)
    np.testing.assert_allclose(found, big.T @ fisher @ big, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_models_own_fisher_is_the_exact_expectation_over_its_classes(kind):
    logits, parameters, theta, inputs, _ = network(kind)
    fisher = 0.0
    for x in inputs:
        p = logits(parameters, x[None]).softmax(1)[0].numpy()
        rows = np.stack([gradient(logits, parameters, x, c) for c in range(CLASSES)])
        fisher = fisher + rows.T @ (p[:, None] * rows) / len(inputs)
    big = matrix(theta, parameters)
    np.testing.assert_allclose(
        fisher_products(logits, parameters, theta, inputs), big.T @ fisher @ big, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_pieces_of_a_batch_add_up(labelled):
    logits, parameters, theta, inputs, labels = network("convolution", samples=150)
    chosen = labels if labelled else None
    whole = fisher_products(logits, parameters, theta, inputs, chosen)
    parts = [
        fisher_products(logits, parameters, theta, inputs[i : i + 50], None if chosen is None else chosen[i : i + 50])
        for i in (0, 50, 100)
    ]
    np.testing.assert_allclose(whole, np.mean(parts, 0), rtol=1e-9)


def test_it_is_symmetric_positive_semi_definite_and_quadratic():
    logits, parameters, theta, inputs, _ = network("attention", directions=4)
    found = fisher_products(logits, parameters, theta, inputs)
    assert (found == found.T).all()
    assert np.linalg.eigvalsh(found).min() > -1e-12
    doubled = [theta[0], {name: 2 * value for name, value in theta[1].items()}, *theta[2:]]
    scale = np.array([1, 2, 1, 1])
    np.testing.assert_allclose(
        fisher_products(logits, parameters, doubled, inputs), found * np.outer(scale, scale), rtol=1e-9
    )
    same = fisher_products(logits, parameters, [theta[0], theta[0]], inputs)
    np.testing.assert_allclose(same, found[0, 0], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_directions_in_half_precision_are_read_as_the_parameters_type(dtype):
    logits, parameters, theta, inputs, _ = network("convolution", dtype=torch.float32)
    half = [{name: value.to(dtype) for name, value in one.items()} for one in theta]
    again = [{name: value.float() for name, value in one.items()} for one in half]
    found = fisher_products(logits, parameters, half, inputs)
    assert np.isfinite(found).all()
    assert (found == fisher_products(logits, parameters, again, inputs)).all()


def test_nothing_is_left_with_a_gradient_and_parameters_stay():
    logits, parameters, theta, inputs, labels = network("attention")
    before = {name: value.clone() for name, value in parameters.items()}
    fisher_products(logits, {name: value.requires_grad_() for name, value in parameters.items()}, theta, inputs, labels)
    assert all(torch.equal(before[name], value) and value.grad is None for name, value in parameters.items())


def test_an_operation_without_forward_derivative_is_named():
    weights = {"w": torch.randn(3, 3)}
    with pytest.raises(BadSetup, match="_cdist_forward") as caught:
        fisher_products(lambda at, x: torch.cdist(x @ at["w"], x[:4]), weights, [weights], torch.randn(5, 3))
    assert caught.value.code == "no-forward-derivative"
