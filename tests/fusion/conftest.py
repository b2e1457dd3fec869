"""Tiny networks with checkpoints for the fusion tests: an MLP with an embedding, and a CNN with BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldd.base.load import capture
from foldd.base.network import Base, FeatureFunction
from foldd.base.store import network_of
from foldd.base.walk import Walker
from foldd.core.base_spec import BaseSpec, TensorSpec
from foldd.core.bundle import Checkpoint, Head, open_bundle, write_bundle
from foldd.core.digests import base_digest
from foldd.core.roles import Role

CLASSES = 3

Tensors = dict[str, Tensor]
Make = Callable[..., Checkpoint]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few dozen numbers only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Mlp(nn.Module):
    """[n, 6] → [n, 5], with an embedding, a norm, and a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6))
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)
        self.norm = nn.LayerNorm(5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(torch.tanh(self.one(x + self.position))))


class Cnn(nn.Module):
    """[n, 3, 6, 6] → [n, 5], with BatchNorm behind a convolution without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.stem(x))).mean((2, 3)))


class Grouped(nn.Module):
    """[n, 3, 6, 6] → [n, 5], its convolution in three groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3, groups=3), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv(x)).mean((2, 3)))


@cache
def captured(network: type[nn.Module], input_shape: tuple[int, ...]) -> tuple[FeatureFunction, Walker, FoldedNetwork]:
    return network_of(capture(network(), input_shape))


def make_base(weights: Tensors, roles: Mapping[str, Role], network: type[nn.Module], shape: tuple[int, ...]) -> Base:
    specs = {name: TensorSpec(tuple(tensor.shape), roles[name]) for name, tensor in weights.items()}
    digest = base_digest((name, tensor.numpy()) for name, tensor in weights.items())
    return Base(BaseSpec(digest, specs, shape, 5, None), weights, *captured(network, shape))


@pytest.fixture
def mlp() -> Base:
    """[6] → [5]; its embedding is [1, 6]."""
    g = torch.Generator().manual_seed(1)
    weights = {
        "position": torch.randn(1, 6, generator=g) * 0.1,
        "one.weight": torch.randn(8, 6, generator=g) * 0.5,
        "one.bias": torch.randn(8, generator=g) * 0.1,
        "two.weight": torch.randn(5, 8, generator=g) * 0.5,
        "norm.weight": torch.ones(5),
    }
    roles = dict(zip(weights, (Role.EMBEDDING, Role.MATRIX, Role.BIAS, Role.MATRIX, Role.NORM), strict=True))
    return make_base(weights, roles, Mlp, (6,))


@pytest.fixture
def cnn() -> Base:
    """[3, 6, 6] → [5]."""
    g = torch.Generator().manual_seed(2)
    weights = {
        "stem.weight": torch.randn(4, 3, 3, 3, generator=g) * 0.3,
        "bn.weight": torch.ones(4),
        "bn.bias": torch.zeros(4),
        "bn.running_mean": torch.randn(4, generator=g) * 0.1,
        "bn.running_var": torch.rand(4, generator=g) + 0.5,
        "last.weight": torch.randn(5, 4, generator=g),
    }
    kinds = (Role.CONVOLUTION, Role.NORM, Role.BIAS, Role.STATISTIC, Role.STATISTIC, Role.MATRIX)
    return make_base(weights, dict(zip(weights, kinds, strict=True)), Cnn, (3, 6, 6))


@pytest.fixture
def grouped() -> Base:
    """[3, 6, 6] → [5]."""
    g = torch.Generator().manual_seed(4)
    weights = {
        "conv.weight": torch.randn(6, 1, 3, 3, generator=g) * 0.3,
        "conv.bias": torch.randn(6, generator=g) * 0.1,
        "last.weight": torch.randn(5, 6, generator=g),
    }
    roles = dict(zip(weights, (Role.CONVOLUTION, Role.BIAS, Role.MATRIX), strict=True))
    return make_base(weights, roles, Grouped, (3, 6, 6))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(base, task, seed, scale=…, inputs=n or 0, is_delta=…, vector=…, samples=…) → an opened checkpoint."""

    def build(
        base: Base,
        task: str,
        seed: int,
        *,
        scale: float = 0.2,
        inputs: int = 12,
        is_delta: bool = True,
        vector: Tensors | None = None,
        samples: int | None = None,
    ) -> Checkpoint:
        g = torch.Generator().manual_seed(seed)
        if vector is None:
            # Absolute values keep variances positive; everything else gets a random sign as well.
            noise = {name: scale * torch.randn(w.shape, generator=g) for name, w in base.weights.items()}
            vector = {name: v.abs() if name.endswith("running_var") else v for name, v in noise.items()}
        parameters = {name: (v if is_delta else v + base.weights[name]).numpy() for name, v in vector.items()}
        head = Head(
            torch.randn(CLASSES, base.spec.features, generator=g).numpy(), torch.randn(CLASSES, generator=g).numpy()
        )
        x = torch.randn(inputs, *base.spec.input_shape, generator=g).numpy().astype(np.float32) if inputs else None
        path = tmp_path / f"{task}-{seed}.safetensors"
        write_bundle(path, parameters, head, task=task, base=base.spec, is_delta=is_delta, inputs=x, samples=samples)
        return open_bundle(path, base.spec)

    return build
