"""Task vectors: what fine-tuning changed, θ − θ⁰, per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.base.lazy import Lazy
from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role

PIECE = 1 << 20  # elements


def task_vector(base: Base, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """θ − θ⁰ of one checkpoint: the names of `base.weights` in their order, statistics included, float32.

    The vector stays in the file: each access reads a tensor, piece by piece (Ilharco et al. 2023, section 2).

    Raises:
        BadCheckpoint: `missing-tensors` where the checkpoint lacks one of the base's.
    """
    for name in base.weights:
        if name not in checkpoint.parameters:
            raise BadCheckpoint("missing-tensors", f"{checkpoint.task}: the checkpoint lacks {name!r}.")

    def read(name: str) -> Tensor:
        stored = checkpoint.parameters[name]
        tensor = torch.empty(stored.shape, dtype=torch.float32)
        stored.read_into(tensor.numpy().reshape(-1))
        return tensor if checkpoint.is_delta else tensor.sub_(base.weights[name])

    return Lazy(base.weights, read)


def applied(base: Base, vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """θ⁰ + a vector, summed when it is asked for: no copy of the weights is held."""
    return Lazy(base.weights, lambda name: base.weights[name] + vector[name])


def norm(base: Base, vector: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors but statistics, whose scale says nothing about the weights; summed in float64."""
    return float(sum(_inner(vector[name]) for name in _compared(base)) ** 0.5)


@dataclass(frozen=True)
class Comparison:
    """Two task vectors, statistics left out: their L2 norms and the cosine between them (0 where one is zero)."""

    first_norm: float
    second_norm: float
    cosine: float


def compare(base: Base, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Comparison:
    """Reads both once, a tensor of each at a time; sums in float64."""
    first = second = both = 0.0
    for name in _compared(base):
        a, b = one[name], other[name]
        first, second, both = first + _inner(a), second + _inner(b), both + _inner(a, b)
    scale = first**0.5 * second**0.5
    return Comparison(first**0.5, second**0.5, both / scale if scale else 0.0)


def _compared(base: Base) -> Iterator[str]:
    return (name for name in base.weights if base.role(name) is not Role.STATISTIC)


def _inner(one: Tensor, other: Tensor | None = None) -> float:
    """Σ x·y in float64, in pieces: a tensor in float64 beside itself would be twice its size."""
    pieces = torch.split(one.reshape(-1), PIECE)
    others = pieces if other is None else torch.split(other.reshape(-1), PIECE)
    return float(sum(float((a.double() * b.double()).sum()) for a, b in zip(pieces, others, strict=True)))
