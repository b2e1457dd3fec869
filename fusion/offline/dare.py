"""`dare`: drop elements of task vectors at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import Models, Piece, elementwise, elementwise_workspace, require_share
from foldd.fusion.offline.task_arithmetic import scaled_sum


@dataclass(frozen=True)
class OfflineDare:
    """θ = θ⁰ + scaling · Σ δ_i, δ_i = m ⊙ τ_i / (1 − drop) with m = 0 with probability `drop`, element by element.

    The expectation is task arithmetic. What is dropped depends on the seed, the model's place, and the tensor's name
    and position, never on the order in which tensors are merged.

    Attributes:
        drop: the published p; 0.5 is what LoRE-Merging's comparison takes, DARE itself goes up to 0.9 and 0.99.
    """

    name: ClassVar[str] = "dare"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = True

    drop: float = 0.5
    scaling: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        require_share(self.name, "drop", self.drop, low=0, high=1, open_high=True)

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        def combine(name: str, start: int, vectors: list[Tensor]) -> Tensor:
            for model, vector in enumerate(vectors):
                drop_and_rescale(vector, self.drop, key=(self.seed, model, name, start))
            return scaled_sum(vectors, self.scaling)

        yield from elementwise(models, combine, progress, vectors=True)

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return elementwise_workspace(count)


def drop_and_rescale(vector: Tensor, drop: float, *, key: tuple[object, ...]) -> Tensor:
    """Zeroes each element with probability `drop` and divides the others by 1 − drop, in place.

    Args:
        key: what the draw depends on; equal keys drop the same elements.
    """
    words = np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32)
    # A generator whose stream numpy promises to keep; 32 of its bits an element, so that `drop` is exact to 2⁻³².
    source = np.random.SFC64(np.random.SeedSequence([int(word) for word in words]))
    draws = np.asarray(source.random_raw((vector.numel() + 1) // 2)).view(np.uint32)[: vector.numel()]
    kept = torch.from_numpy(draws >= np.uint32(min(round(drop * 2**32), 2**32 - 1))).view(vector.shape)
    return vector.mul_(kept).div_(1 - drop)
