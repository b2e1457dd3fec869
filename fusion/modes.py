"""A convolution's kernel by spatial frequencies, each of which is a layer of its own to `otmf`.

A patch has channels × places numbers, 1729 for 192 channels and a 3 × 3 kernel, and moments of all pairs are four
times the whole model. In the basis of the discrete cosine transform over the places, images are nearly uncorrelated
between frequencies (which is why JPEG uses it), so that only the moments within each frequency are kept: nine
matrices of 193 instead of one of 1729, a ninth of the memory and less than a hundredth of the time to solve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foldd.base.layers import AffineLayer


@dataclass(frozen=True)
class Modes:
    """The frequencies of a layer's kernel. Shapes as `AffineLayer` has them, and m frequencies.

    Attributes:
        kernel: its height and width; (1, 1) for a linear layer.
        biased: whether the last column is the constant 1, or the bias. It belongs to the frequency zero, the first.
    """

    kernel: tuple[int, int]
    biased: bool

    @staticmethod
    def of(layer: AffineLayer, weight: Tensor) -> Modes:
        return Modes((1, 1) if layer.kernel is None else (weight.shape[2], weight.shape[3]), layer.bias is not None)

    @property
    def count(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def split(self, patches: Tensor) -> Tensor:
        """Rows or a layer's matrix, [g, n, d] → [g·m, n, (d − biased) / m + biased]; zero where a constant would be."""
        if self.count == 1:
            return patches
        groups, count, end = len(patches), self.count, patches.shape[2] - self.biased
        places = patches[..., :end].reshape(groups, -1, end // count, count)
        modes = patches.new_zeros(groups, count, places.shape[1], end // count + self.biased)
        modes[..., : end // count] = (places @ _transform(*self.kernel).to(patches.dtype).T).permute(0, 3, 1, 2)
        if self.biased:
            modes[:, 0, :, -1:] = patches[..., end:]
        return modes.flatten(0, 1)

    def of_moment(self, gram: Tensor) -> Tensor:
        """The moments within each frequency, of one of whole patches: [g, d, d] → [g·m, …, …]."""
        each = (len(gram), self.count, gram.shape[1], -1)
        once = self.split(gram).view(each)
        twice = [
            self.split(once[:, mode].mT).view(len(gram), self.count, once.shape[3], -1)[:, mode]
            for mode in range(self.count)
        ]
        return torch.stack(twice, 1).flatten(0, 1)

    def join(self, modes: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.count == 1:
            return modes
        groups, channels = len(modes) // self.count, modes.shape[2] - self.biased
        modes = modes.reshape(groups, self.count, *modes.shape[1:])
        places = modes[..., :channels].permute(0, 2, 3, 1) @ _transform(*self.kernel).to(modes.dtype)
        patches = places.reshape(groups, modes.shape[2], -1)
        return torch.cat([patches, modes[:, 0, :, -1:]], 2) if self.biased else patches


@cache
def _transform(height: int, width: int) -> Tensor:
    """Places to frequencies, float64 [m, m], orthonormal; frequency zero comes first."""
    return torch.kron(_cosines(height), _cosines(width))


def _cosines(size: int) -> Tensor:
    """The cosine transform (DCT-II) of so many values, [size, size]."""
    i = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * i[:, None] * (i + 0.5))
    unit: Tensor = waves / torch.linalg.vector_norm(waves, dim=1, keepdim=True)
    return unit
