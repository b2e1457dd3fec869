"""Second moments of what a layer gets, mean of x·xᵀ over rows: the constant-size memory of all folded inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 4096  # rows that are multiplied at a time in the rows' own type; chunks are summed in float64
BLOCK = 256  # columns of a symmetric moment that are computed at a time
MIRROR_BLOCK = 256  # rows that are transposed at a time: what a cache holds
_DIAGONAL_FLOOR = 1e-12


def moment(one: Tensor, other: Tensor) -> Tensor:
    """Mean of one·otherᵀ over rows: [g, rows, d], [g, rows, e] → float64 [g, d, e].

    Of a matrix with itself only the lower half is multiplied, and mirrored.
    """
    total = one.new_zeros(one.shape[0], one.shape[2], other.shape[2], dtype=torch.float64)
    add_moment(total, one, other, 1.0)
    if one is other:
        mirror(total)
    return total


def add_moment(total: Tensor, one: Tensor, other: Tensor, share: float) -> None:
    """total += share × mean of one·otherᵀ over rows, in place: [g, d, e], [g, rows, d], [g, rows, e].

    Where `one` is `other`, the entries of the upper half that no block of the lower one covers stay as they are.
    """
    symmetric, scale = one is other, share / one.shape[1]
    for a, b in zip(torch.split(one, CHUNK, 1), torch.split(other, CHUNK, 1), strict=True):
        left = (a * scale).transpose(1, 2)
        for start in range(0, b.shape[2], BLOCK):
            first = start if symmetric else 0
            total[:, first:, start : start + BLOCK] += left[:, first:] @ b[:, :, start : start + BLOCK]


def mirror(gram: Tensor) -> None:
    """Makes the upper half of [g, d, d] the lower one's mirror image, in place."""
    for start in range(0, gram.shape[1], MIRROR_BLOCK):
        stop = start + MIRROR_BLOCK
        square = gram[:, start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).transpose(1, 2))
        gram[:, start:stop, stop:] = gram[:, stop:, start:stop].transpose(1, 2)


def root_of(rows: Tensor) -> Tensor:
    """Z [g, r, d], float64, with ZᵀZ = the mean of x·xᵀ over fewer rows than columns: it stands for that matrix."""
    root: Tensor = rows.double() / rows.shape[1] ** 0.5
    return root


def is_root(gram: Tensor) -> bool:
    """Whether this is not a moment, but its root: it has fewer rows than columns."""
    return gram.shape[1] < gram.shape[2]


def ridge_of(gram: Tensor, share: float) -> Tensor:
    """`share` of the mean diagonal of each group's moment, which may be given by its root: float64 [g]."""
    diagonal = gram.square().sum(1) if is_root(gram) else gram.diagonal(dim1=1, dim2=2)
    return share * diagonal.mean(1).clamp_min(_DIAGONAL_FLOOR)


def solve_right(target: Tensor, gram: Tensor) -> Tensor:
    """target · gram⁻¹ for a positive definite gram: [g, o, d], [g, d, d] → [g, o, d].

    Only the lower half of `gram` is read, and it is overwritten.
    """
    # A lower triangle by rows is an upper one by columns, which is how the library wants it: no copy is made.
    factor = torch.linalg.cholesky(gram.mT, upper=True, out=gram.mT)
    return torch.cholesky_solve(target.mT, factor, upper=True).mT


def pack_gram(gram: Tensor, other: Tensor | None = None) -> Tensor:
    """A symmetric [g, d, d], or the sum of two, as its lower triangle, float32 [g, d·(d+1)/2]: half of the memory."""
    half = _lower(gram.shape[1])
    packed = torch.empty(len(gram), int(half.sum()))
    for group, values in enumerate(packed.numpy()):
        own = gram[group].numpy()[half]
        values[:] = own if other is None else own + other[group].numpy()[half]
    return packed


def unpack_gram(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_gram`: float64 [g, size, size]."""
    half = _lower(size)
    gram = packed.new_empty(len(packed), size, size, dtype=torch.float64)
    for square, values in zip(gram.numpy(), packed.numpy(), strict=True):
        square[half] = values
    mirror(gram)
    return gram


def _lower(size: int) -> NDArray[np.bool_]:
    """Where the lower triangle is, which in this order of rows is its packed form. torch would make 8-byte indices."""
    return np.tri(size, dtype=np.bool_)
