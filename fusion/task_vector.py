"""Task vectors: what fine-tuning changed, θ − θ⁰, per tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role


def task_vector(base: Base, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """θ − θ⁰ of one checkpoint: the names of `base.weights` in their order, statistics included, float32.

    Tensors are read piece by piece from the file, so that each is held once (Ilharco et al. 2023, section 2).

    Raises:
        BadCheckpoint: `missing-tensors` where the checkpoint lacks one of the base's.
    """
    vector: dict[str, Tensor] = {}
    for name, weight in base.weights.items():
        stored = checkpoint.parameters.get(name)
        if stored is None:
            raise BadCheckpoint("missing-tensors", f"{checkpoint.task}: the checkpoint lacks {name!r}.")
        tensor = torch.empty(weight.shape, dtype=torch.float32)
        flat, start = tensor.numpy().reshape(-1), 0
        for piece in stored.slices():
            flat[start : start + piece.size] = piece
            start += piece.size
        vector[name] = tensor if checkpoint.is_delta else tensor.sub_(weight)
    return vector


def squared_norm(base: Base, vector: Mapping[str, Tensor]) -> float:
    """Σ x² over all tensors but statistics, whose scale says nothing about the weights; summed in float64."""
    return inner(base, vector, vector)


def norm(base: Base, vector: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors but statistics."""
    return float(squared_norm(base, vector) ** 0.5)


def inner(base: Base, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Inner product over all tensors but statistics, accumulated in float64, one tensor at a time."""
    total = 0.0
    for name in base.weights:
        if base.role(name) is not Role.STATISTIC:
            total += float((one[name].double() * other[name].double()).sum())
    return total


def cosine(base: Base, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Cosine between two task vectors, statistics left out; 0 where one of them is zero.

    Near 0, two tasks change the network in unrelated ways; clearly below 0, each undoes some of the other.
    """
    scale = norm(base, one) * norm(base, other)
    return inner(base, one, other) / scale if scale else 0.0
