"""Small networks for the tests: a residual one with BatchNorm, a transformer, one with a head of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Images [n, 1, 8, 8] → features [n, 12]; convolutions with and without bias, BatchNorm, a shortcut."""

    def __init__(self, inner: int = 8, outer: int = 12) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, inner, 3, 2, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv, self.norm = nn.Conv2d(inner, outer, 3, 1, 1), nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return F.relu(self.norm(self.conv(x)) + self.shortcut(x)).mean((2, 3))


class Attention(nn.Module):
    """Images [n, 1, 8, 8] → features [n, 16]; patches, a class token, positions, LayerNorm, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.pos = nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        self.n1, self.n2, self.norm = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        b, n, d = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        x = x + self.fc2(F.gelu(self.fc1(self.n2(x))))
        return self.norm(x)[:, 0]


class WithHead(nn.Module):
    """`Residual` with a classifier `fc` of 4 classes behind it, a tied pair, and an auxiliary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()
        self.mix = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.mix.weight
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x + torch.tanh(self.again(torch.relu(self.mix(x))))
        return self.fc(x)


def _lively(model: nn.Module) -> nn.Module:
    """Statistics and scales away from 0 and 1, so that folding them wrongly shows."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.3), (module.bias.data, -0.3)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def _seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return _lively(kind())


def residual() -> nn.Module:
    return _seeded(Residual)


def wide() -> nn.Module:
    """`Residual` with so many weights that they are most of an artifact: features [n, 64]."""
    return _seeded(lambda: Residual(32, 64))


def attention() -> nn.Module:
    return _seeded(Attention)


def with_head() -> nn.Module:
    return _seeded(WithHead)
