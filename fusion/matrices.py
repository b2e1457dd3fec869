"""What the spectral methods share: which tensors are matrices to them, singular vectors, the polar factor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role

# Rounding to float32 leaves a matrix of low rank with singular values of about 1e-7 of the largest. Their vectors are
# rounding noise, so everything below this share counts as zero; a full-rank matrix of 10⁵ rows stays above it.
RANK_TOLERANCE = 1e-6

FACTORED = (Role.MATRIX, Role.CONVOLUTION)


def is_factored(base: Base, name: str) -> bool:
    """Matrices and convolutions; embeddings, norms and biases have no input space to speak of."""
    return base.role(name) in FACTORED


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight [out, in, …] as the matrix [out, in·…] that it is for one output position; a view where it can be."""
    return tensor.reshape(tensor.shape[0], -1)


class Svd(NamedTuple):
    """matrix = u·diag(s)·vᵀ over its r directions that are not zero, in float64.

    Attributes:
        u: [m, r], orthonormal columns.
        s: [r], falling.
        v: [n, r], orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def svd(matrix: Tensor) -> Svd:
    """The singular value decomposition of a matrix [m, n] without its zero directions (`RANK_TOLERANCE`).

    Zero directions have no vectors of their own: a library completes the basis as it likes, and what a method then
    computes there is arbitrary. Vectors are eigenvectors of the smaller Gram matrix in float64. A whole
    projection of `opcm` takes, on one core, as long as with the full decomposition in float32 that was published where
    a matrix is 768×768, and 0.36 of it at 3072×768; of one with the thin decomposition in float64 0.60 and 0.47.
    """
    matrix = matrix.double()
    if matrix.shape[0] < matrix.shape[1]:
        u, s, v = svd(matrix.T)
        return Svd(v, s, u)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    v = vectors.flip(1)  # eigh sorts the other way
    u = matrix @ v
    s = torch.linalg.vector_norm(u, dim=0)  # more exact than the root of an eigenvalue
    keep = s > RANK_TOLERANCE * s[:1]
    return Svd(u[:, keep] / s[keep], s[keep], v[:, keep])


def polar_factor(matrix: Tensor) -> Tensor:
    """u·vᵀ of a matrix [m, n]: the nearest one with orthonormal columns (or rows, where it is wide); float64.

    Directions that are zero stay zero: two equal columns stay equal, each of length 1/√2.
    """
    u, _, v = svd(matrix)
    return u @ v.T
