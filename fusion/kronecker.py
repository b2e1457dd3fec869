"""Two Kronecker products at once: B₁·X·A₁ + B₂·X·A₂ = R, solved for X in closed form.

A layer's Fisher information is about A ⊗ B, A the second moment of its inputs and B that of the gradients at its
outputs (K-FAC, Martens & Grosse 2015). Merging two models in it means one such equation a layer. Sums of Kronecker
products have no simple inverse in general, and MaTS (Tam et al. 2023) iterates; of two there is one, because two
symmetric matrices can be made diagonal together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_two(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
    """X with B₁·X·A₁ + B₂·X·A₂ = R: float64 [g, o, d].

    With A₁ + A₂ = L·Lᵀ and L⁻¹·A₂·L⁻ᵀ = V·diag(λ)·Vᵀ both are diagonal in the basis L·V, as 1 − λ and λ, and B₁ and B₂
    likewise with μ. There each element of X stands alone, its factor is (1 − μᵢ)(1 − λⱼ) + μᵢ·λⱼ.

    Args:
        one: A₁ [g, d, d] and B₁ [g, o, o], positive definite; overwritten.
        two: A₂ and B₂, positive semidefinite.
        right: R [g, o, d].
    """
    inner, outer = _Pair(one[0], two[0]), _Pair(one[1], two[1])
    factors = (1 - outer.values)[:, :, None] * (1 - inner.values)[:, None, :]
    factors += outer.values[:, :, None] * inner.values[:, None, :]
    right = inner.into(outer.into(right).mT).mT
    return inner.out_of(outer.out_of(right.div_(factors)).mT).mT


class _Pair:
    """The common basis of two symmetric matrices.

    Eigenvectors, and products with them, in float32: λ lies between 0 and 1 by construction and the vectors are
    orthonormal, so that errors stay as small as that, and a wide layer costs half of the time and memory. Everything
    else is float64.
    """

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self._root = torch.linalg.cholesky(one.add_(two))
        half = torch.linalg.solve_triangular(self._root, two, upper=False)
        whole = torch.linalg.solve_triangular(self._root, half.mT, upper=False)
        del half
        values, vectors = torch.linalg.eigh(whole.float())
        self.values, self._vectors = values.clamp_(0, 1), vectors

    def into(self, right: Tensor) -> Tensor:
        """Vᵀ·L⁻¹·right, float32."""
        whitened: Tensor = torch.linalg.solve_triangular(self._root, right.double(), upper=False)
        turned: Tensor = self._vectors.mT @ whitened.float()
        return turned

    def out_of(self, right: Tensor) -> Tensor:
        """L⁻ᵀ·V·right, float64."""
        turned = (self._vectors @ right.float()).double()
        result: Tensor = torch.linalg.solve_triangular(self._root.mT, turned, upper=True)
        return result
