"""Merges of all tasks at once: what a method may do that sees every model side by side. References, not folds.

Each takes the base and all checkpoints and gives a merged task vector. BatchNorm statistics are merged as moments by
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base
from foldd.base.walk import Lane
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.matrices import as_matrix, is_factored
from foldd.fusion.method import head_of
from foldd.fusion.state import as_tensor
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.ties import least_kept, trim
from foldd.fusion.tsv_m import tsv_merge

TIES_DENSITY, TIES_SCALING = 0.2, 1.0  # the TIES paper's recipe where nothing can be validated
REGMEAN_SCALE = 0.9  # of a Gram matrix's off-diagonal elements, as published
FISHER_FLOOR = 1e-3  # as a share of the mean Fisher value of all elements: where no task cares, the mean
DEAD = 1e-9  # of the mean diagonal; a Gram matrix has zeros where an input is always zero

Vector = dict[str, Tensor]


def joint_ties(base: Base, checkpoints: Sequence[Checkpoint]) -> Vector:
    """Trim to the largest fifth, elect the sum's sign, mean of those that agree (arXiv 2306.01708, algorithm 1)."""
    vectors = _vectors(base, checkpoints)
    least = [least_kept(base, vector, TIES_DENSITY) for vector in vectors]
    merged = {}
    for name in _names(base):
        kept = torch.stack([trim(vector[name], bound) for vector, bound in zip(vectors, least, strict=True)])
        agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        merged[name] = TIES_SCALING * (kept * agree).sum(0) / agree.sum(0).clamp_min(1)
    return merged | _statistics(base, vectors)


def joint_tsv_m(base: Base, checkpoints: Sequence[Checkpoint]) -> Vector:
    """TSV-M as published (arXiv 2412.00081): an equal share of each matrix's rank for every task, factor 1."""
    vectors = _vectors(base, checkpoints)
    merged = {}
    for name in _names(base):
        parts = [vector[name] for vector in vectors]
        if is_factored(base, name) and min(as_matrix(parts[0]).shape) > 1:
            merged[name] = tsv_merge([as_matrix(part) for part in parts]).view(parts[0].shape)
        else:
            merged[name] = torch.stack(parts).mean(0)
    return merged | _statistics(base, vectors)


def joint_fisher(base: Base, checkpoints: Sequence[Checkpoint]) -> Vector:
    """Σ F·τ / Σ F with diagonal Fisher information F (arXiv 2111.09832), of each model on its calibration inputs.

    Of each task scaled to the same sum, since a task that is learned less well would outvote the others otherwise.
    """
    vectors = _vectors(base, checkpoints)
    names = list(_names(base))
    total = {name: torch.zeros_like(base.weights[name]) for name in names}
    weighted = {name: torch.zeros_like(base.weights[name]) for name in names}
    for number, (checkpoint, vector) in enumerate(zip(checkpoints, vectors, strict=True)):
        fisher = diagonal_fisher(base, checkpoint, vector, seed=number)
        scale = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values()) / sum(
            f.numel() for f in fisher.values()
        )
        for name, values in fisher.items():
            share = values / scale + FISHER_FLOOR
            total[name] += share
            weighted[name] += share * vector[name]
    return {name: weighted[name] / total[name] for name in names} | _statistics(base, vectors)


def joint_regmean(base: Base, checkpoints: Sequence[Checkpoint]) -> Vector:
    """Σ W·G · (Σ G)⁻¹ for every affine layer (arXiv 2212.09849), G = XᵀX of its inputs in each model; else the mean.

    A convolution is a linear layer on patches. As published only weights are merged so; biases are means.
    """
    vectors = _vectors(base, checkpoints)
    merged = {name: torch.stack([vector[name] for vector in vectors]).mean(0) for name in _names(base)}
    grams: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for checkpoint, vector in zip(checkpoints, vectors, strict=True):
        weights = {name: weight + vector[name] for name, weight in base.weights.items()}
        for layer, (inputs,) in base.walker.walk([Lane(weights, _inputs(checkpoint))]):
            weight = weights[layer.weight]
            rows = layer.rows(inputs, weight)
            own = weight[0].numel()  # inputs of a group; a bias would stand behind them
            rows = rows[:, :, :own].double()
            gram = rows.transpose(1, 2) @ rows
            diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
            gram = REGMEAN_SCALE * gram + (1 - REGMEAN_SCALE) * diagonal
            matrix = weight.double().reshape(len(gram), -1, own)
            name = layer.weight
            grams[name] = grams.get(name, 0.0) + gram
            targets[name] = targets.get(name, 0.0) + matrix @ gram
    for name, gram in grams.items():
        floor = DEAD * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(DEAD)
        identity = torch.eye(gram.shape[1], dtype=gram.dtype) * floor[:, None, None]
        mean = (base.weights[name] + merged[name]).double().reshape(targets[name].shape)
        target = targets[name] + floor[:, None, None] * mean
        solved = torch.linalg.solve(gram + identity, target.transpose(1, 2)).transpose(1, 2)
        merged[name] = solved.reshape(base.weights[name].shape).float() - base.weights[name]
    return merged | _statistics(base, vectors)


JOINT = {
    "joint-ties": joint_ties, "joint-tsv-m": joint_tsv_m, "joint-fisher": joint_fisher, "joint-regmean": joint_regmean,
}  # fmt: skip


def diagonal_fisher(base: Base, checkpoint: Checkpoint, vector: Vector, *, seed: int) -> Vector:
    """Mean squared gradient of log p(class), input by input, the class drawn from the model's own prediction."""
    weights = {name: weight + vector[name] for name, weight in base.weights.items()}
    names = list(_names(base))
    for name in names:
        weights[name].requires_grad_()
    head, inputs = head_of(checkpoint), _inputs(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    fisher = {name: torch.zeros_like(base.weights[name]) for name in names}
    for one in inputs.split(1):
        logits = head.logits(base.features(weights, one))
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(F.cross_entropy(logits, drawn), [weights[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            fisher[name].addcmul_(gradient, gradient, value=1 / len(inputs))
    return fisher


def _vectors(base: Base, checkpoints: Sequence[Checkpoint]) -> list[Vector]:
    return [task_vector(base, checkpoint) for checkpoint in checkpoints]


def _inputs(checkpoint: Checkpoint) -> Tensor:
    if checkpoint.inputs is None:
        raise ValueError(f"{checkpoint.task} has no calibration inputs.")
    return as_tensor(checkpoint.inputs)


def _names(base: Base) -> Iterator[str]:
    return (name for name in base.weights if base.role(name) is not Role.STATISTIC)


def _statistics(base: Base, vectors: Sequence[Vector]) -> Vector:
    """The moments of an equal mixture of all tasks, one task after the other."""
    merged = vectors[0]
    for count, vector in enumerate(vectors[1:], 1):
        merged = merge_statistics(base, merged, vector, count)
    return {name: merged[name] for name in base.weights if base.role(name) is Role.STATISTIC}
