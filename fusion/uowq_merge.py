"""UOWQ for N models at once: shares from counts and discrepancies, and the weighted average of Lemma 8.

Two questions have two answers. *One model for all*: every model is a target (`joint_shares`; not in the paper). *One
target, the others its sources*, as published: θ* = (N₀θ₀ + Σ w_i N_i θ_i) / (N₀ + Σ w_i N_i), which is what training on
the target's samples and the w-weighted samples of the sources comes to, and needs no sample at merge time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.fisher import fisher_products
from foldd.fusion.state import HeadTensors
from foldd.fusion.statistics import MEAN, VARIANCE
from foldd.fusion.transfer_weights import Matrix, TransferWeights, joint_shares, transfer_weights
from foldd.fusion.uowq import MAX_INPUTS, free_names, task_logits

Vector = Mapping[str, Tensor]
RoleOf = Callable[[str], Role]


@dataclass(frozen=True, eq=False)
class TaskModel:
    """One of the models: task vector, training-set size, and what its Fisher information is taken from.

    Attributes:
        labels: [n]; the empirical Fisher information with them, the model's own without.
    """

    vector: Vector
    samples: float
    head: HeadTensors
    inputs: Tensor
    labels: Tensor | None = None


def merge_products(base: Base, models: Sequence[TaskModel]) -> Matrix:
    """G_ij = τ_iᵀJτ_j, [M, M]: J is the mean of all models' Fisher informations, each on its own calibration inputs
    under its own head. M² forward-mode derivatives of a batch; one model's weights are held at a time.

    The origin of the task vectors does not matter to what is made of G.
    """
    directions = [{name: model.vector[name] for name in free_names(base)} for model in models]
    total = np.zeros((len(models), len(models)))
    for model in models:
        logits, free = task_logits(base, model.vector, model.head)
        labels = None if model.labels is None else model.labels[:MAX_INPUTS]
        total += fisher_products(logits, free, directions, model.inputs[:MAX_INPUTS], labels)
    return total / len(models)


def shares_for_all(samples: Sequence[float], products: Matrix, dimension: float) -> tuple[float, ...]:
    """Shares of M models in one that serves all their tasks, each task as important as any other."""
    return joint_shares(samples, products, dimension)


def shares_for_target(
    samples: Sequence[float], products: Matrix, dimension: float, target: int
) -> tuple[tuple[float, ...], TransferWeights]:
    """Shares of M models in one that serves the task `target`, by Lemma 8, and the weights of the others as sources.

    Args:
        samples: N, [M], the target's among them.
        products: G, [M, M], about any origin.
        target: place of the target among the models.
    """
    sources = [number for number in range(len(samples)) if number != target]
    if not sources:
        return (1.0,), TransferWeights((), (), 0.0)
    moved = np.eye(len(samples))
    moved[target] -= 1  # columns: τ_i − τ_target
    about = (moved.T @ products @ moved)[np.ix_(sources, sources)]
    weights = transfer_weights([samples[number] for number in sources], about, dimension)
    total = samples[target] + weights.quantity
    shares = np.zeros(len(samples))
    shares[target] = samples[target] / total
    shares[sources] = [share * weights.quantity / total for share in weights.shares]
    return tuple(shares.tolist()), weights


def weighted_merge(vectors: Sequence[Vector], shares: Sequence[float], role: RoleOf) -> dict[str, Tensor]:
    """Σ β_i τ_i, tensor by tensor, in the first vector's names and types; sums are in float64.

    BatchNorm's running means and variances merge as the moments of a mixture: to the mean of the variances comes the
    variance of the means.
    """
    return {name: _weighted(vectors, shares, name, role) for name in vectors[0]}


def _weighted(vectors: Sequence[Vector], shares: Sequence[float], name: str, role: RoleOf) -> Tensor:
    value = _mean([vector[name] for vector in vectors], shares)
    mean = name.removesuffix(VARIANCE) + MEAN
    if role(name) is Role.STATISTIC and name.endswith(VARIANCE) and mean in vectors[0]:
        means = [vector[mean] for vector in vectors]
        centre = _mean(means, shares)
        value = value + _mean([(one.double() - centre) ** 2 for one in means], shares)
    return value.to(vectors[0][name].dtype)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Steps from the first one, in float64: the mean of equal tensors is exactly that tensor."""
    first = tensors[0].double()
    total = first.clone()
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total += share * (tensor.double() - first)
    return total
