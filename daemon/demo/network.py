"""The demo's base network: a residual network with BatchNorm, 77 thousand parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
FEATURES = WIDTHS[-1]
HEAD = "fc"  # the layer whose input is the feature output


class Residual(nn.Module):
    """Two convolutions around a shortcut, which is a convolution itself where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DemoNetwork(nn.Module):
    """Images [n, 1, 16, 16] → logits [n, classes]; `features` stops before the head, at [n, 64]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        self.blocks = nn.Sequential(
            Residual(WIDTHS[0], WIDTHS[0], 1), Residual(WIDTHS[0], WIDTHS[1], 2), Residual(WIDTHS[1], WIDTHS[2], 2)
        )  # fmt: skip
        self.fc = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Images [n, 1, 16, 16] → features [n, 64]."""
        pooled: Tensor = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits
