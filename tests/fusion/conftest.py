"""Tiny networks with checkpoints for the fusion tests: an MLP with an embedding, and a CNN with BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base, FeatureFunction
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


def make_base(
    weights: Tensors, roles: Mapping[str, Role], features: FeatureFunction, input_shape: tuple[int, ...], width: int
) -> Base:
    specs = {name: TensorSpec(tuple(tensor.shape), roles[name]) for name, tensor in weights.items()}
    digest = base_digest((name, tensor.numpy()) for name, tensor in weights.items())
    return Base(BaseSpec(digest, specs, input_shape, width, None), weights, features)


def mlp_features(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh((x + w["position"]) @ w["one.weight"].T + w["one.bias"])
    return F.layer_norm(hidden @ w["two.weight"].T, (5,), w["norm.weight"], None)


def cnn_features(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y = F.conv2d(x, w["stem.weight"], padding=1)
    y = F.batch_norm(y, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], training=False)
    return F.linear(F.relu(y).mean((2, 3)), w["last.weight"])


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
    return make_base(weights, roles, mlp_features, (6,), 5)


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
    return make_base(weights, dict(zip(weights, kinds, strict=True)), cnn_features, (3, 6, 6), 5)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(base, task, seed, scale=…, inputs=n or 0, is_delta=…, vector=…) → an opened checkpoint."""

    def build(
        base: Base,
        task: str,
        seed: int,
        *,
        scale: float = 0.2,
        inputs: int = 12,
        is_delta: bool = True,
        vector: Tensors | None = None,
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
        write_bundle(path, parameters, head, task=task, base=base.spec, is_delta=is_delta, inputs=x)
        return open_bundle(path, base.spec)

    return build
