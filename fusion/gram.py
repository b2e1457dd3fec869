"""Second moments of what a layer gets: G = mean of x·xᵀ over rows, the constant-size memory of all folded inputs."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # rows that are multiplied at a time in the rows' own type; chunks are summed in float64
_DIAGONAL_FLOOR = 1e-12


def moment(one: Tensor, other: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of one·otherᵀ over rows: [g, rows, d] twice → float64 [g, d, d].

    Args:
        weight: [g, rows], not negative; None: all rows alike.
    """
    total = one.new_zeros(one.shape[0], one.shape[2], other.shape[2], dtype=torch.float64)
    if weight is not None:
        one = one * (weight / weight.sum(1, keepdim=True).clamp_min(_DIAGONAL_FLOOR))[:, :, None]
    for a, b in zip(torch.split(one, CHUNK, 1), torch.split(other, CHUNK, 1), strict=True):
        total += (a.transpose(1, 2) @ b).double()
    return total if weight is not None else total / one.shape[1]


def ridge_of(gram: Tensor, share: float) -> Tensor:
    """`share` of each group's mean diagonal, on the diagonal: float64 [g, d, d]."""
    scale = share * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_DIAGONAL_FLOOR)
    return torch.diag_embed(scale[:, None].expand(gram.shape[0], gram.shape[1]))


def solve_right(target: Tensor, gram: Tensor) -> Tensor:
    """target · gram⁻¹ for a positive definite gram: [g, o, d], [g, d, d] → [g, o, d]."""
    return torch.cholesky_solve(target.transpose(1, 2), torch.linalg.cholesky(gram)).transpose(1, 2)


def pack_gram(gram: Tensor) -> Tensor:
    """A symmetric [g, d, d] as its lower triangle, float32 [g, d·(d+1)/2]: half of the memory."""
    rows, columns = torch.tril_indices(gram.shape[1], gram.shape[2])
    return gram[:, rows, columns].float()


def unpack_gram(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_gram`: float64 [g, size, size]."""
    gram = packed.new_zeros(len(packed), size, size, dtype=torch.float64)
    rows, columns = torch.tril_indices(size, size)
    gram[:, rows, columns] = packed.double()
    gram[:, columns, rows] = packed.double()
    return gram
