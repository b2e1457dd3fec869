"""The masked merge's value and gradient against plain autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.masks import MaskedMerge, factor_shapes
from foldd.fusion.task_vector import task_vector


@pytest.fixture(params=["mlp", "cnn"])
def base(request: pytest.FixtureRequest) -> Base:
    base: Base = request.getfixturevalue(request.param)
    return base


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("trained", ["pre", "post", "both"])
def test_gradient_is_that_of_autograd_through_the_masks(base: Base, make: Any, channels: bool, trained: str) -> None:
    pre, post = task_vector(base, make(base, "a", 1)), task_vector(base, make(base, "b", 2))
    statistics = {n: 0.5 * pre[n] for n in base.weights if base.role(n) is Role.STATISTIC}
    x = torch.randn(4, *base.spec.input_shape, generator=torch.Generator().manual_seed(3))
    masked = MaskedMerge(base, pre, post, statistics, channels=channels, scale=(0.8, 0.2))
    with torch.no_grad():
        masked.pre.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
        masked.post.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(5))

    masks: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    weights: dict[str, Tensor] = {}
    for name, weight in base.weights.items():
        if name in statistics:
            weights[name] = weight + statistics[name]
            continue
        a, b = (
            [factor.clone().requires_grad_() for factor in masked.factors(side, name)]
            for side in (masked.pre, masked.post)
        )
        masks[name] = (a, b)
        weights[name] = weight + 0.8 * math.prod(a) * pre[name] + 0.2 * math.prod(b) * post[name]
    expected = base.features(weights, x)
    expected.square().sum().backward()

    got = base.features(masked.rebuild(), x)
    torch.testing.assert_close(got, expected)
    sides = {"pre": (masked.pre,), "post": (masked.post,), "both": (masked.pre, masked.post)}[trained]
    masked.backward(got.square().sum(), *sides)
    for i, side in enumerate((masked.pre, masked.post)):
        if not any(side is s for s in sides):
            assert side.grad is None
            continue
        assert side.grad is not None
        for name, pair in masks.items():
            for got_gradient, leaf in zip(masked.factors(side.grad, name), pair[i], strict=True):
                assert float(got_gradient.abs().max()) > 0
                torch.testing.assert_close(got_gradient, leaf.grad, rtol=1e-4, atol=1e-5)
    # A whole model's gradient is never kept.
    assert all(weight.grad is None for weight in masked.weights.values())


def test_shapes_follow_the_role(mlp: Base, cnn: Base) -> None:
    assert factor_shapes(mlp, "one.weight", channels=True) == ((8, 1), (1, 6))
    assert factor_shapes(mlp, "one.bias", channels=True) == ((8,),)
    assert factor_shapes(mlp, "position", channels=True) == ((1, 6),)  # an embedding's channels come last
    assert factor_shapes(cnn, "stem.weight", channels=True) == ((4, 1, 1, 1), (1, 3, 1, 1))
    assert factor_shapes(cnn, "stem.weight", channels=False) == ((4, 3, 3, 3),)


def test_statistics_have_no_mask_and_no_gradient(cnn: Base, make: Any) -> None:
    vector = task_vector(cnn, make(cnn, "a", 1))
    statistics = {n: 3 * vector[n] for n in cnn.weights if cnn.role(n) is Role.STATISTIC}
    masked = MaskedMerge(cnn, vector, vector, statistics, channels=True)
    assert masked.pre.numel() == (4 + 3) + 4 + 4 + (5 + 4)
    merged = masked.merged(masked.pre, 0 * masked.post)
    for name, tensor in merged.items():
        assert torch.equal(tensor, statistics.get(name, vector[name]))
        assert masked.weights[name].requires_grad == (name not in statistics)


def test_fill_makes_a_teacher_statistics_included(cnn: Base, make: Any) -> None:
    vector = task_vector(cnn, make(cnn, "a", 1))
    masked = MaskedMerge(cnn, vector, vector, {}, channels=True)
    for name, tensor in masked.fill(vector).items():
        assert torch.equal(tensor.detach(), cnn.weights[name] + vector[name])


def test_reset_makes_masks_constant(mlp: Base, make: Any) -> None:
    vector = task_vector(mlp, make(mlp, "a", 1))
    masked = MaskedMerge(mlp, vector, vector, {}, channels=True)
    with torch.no_grad():
        masked.pre.normal_()
    masked.reset(0.5, 0.25)
    for name in mlp.weights:
        assert (masked.mask(masked.pre, name) == 0.5).all()
        assert (masked.mask(masked.post, name) == 0.25).all()
