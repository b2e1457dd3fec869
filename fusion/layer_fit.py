"""One layer of the merge: weighted least squares between what two teachers' layers give, in closed form.

All matrices are float64, per group: layers [g, o, d], moments [g, d, d], as `AffineLayer` and `moment` give them. A
wide layer's moment is a good part of the whole model (3072 inputs: 75 MB), so they are made one after the other, and
in place of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.drift import Drift
from foldd.fusion.gram import add_moment, mirror, ridge_of
from foldd.fusion.kronecker import solve_two


@dataclass(frozen=True, eq=False)
class Sight:
    """What a layer sees of one task's inputs: rows [g, rows, d] of the teacher and of the merge under way."""

    teacher: Tensor
    student: Tensor

    def equations(self, layer: Tensor, student: float) -> tuple[Tensor, Tensor]:
        """G and H whose solution H·G⁻¹ makes a layer do what the teacher's `layer` does on these inputs.

        With student = 1 the layer answers the student's inputs as the teacher's layer answers its own, and so takes
        back what the layers before it have changed (Nguyen et al. 2025 feed merged inputs too); with 0 it copies the
        teacher's layer where the teacher's inputs lie (RegMean, Jin et al. 2023, equation 2). Between, the mean.
        """
        gram = layer.new_zeros(len(layer), layer.shape[2], layer.shape[2])
        if student < 1:
            add_moment(gram, self.teacher, self.teacher, 1 - student)
        if student > 0:
            add_moment(gram, self.student, self.student, student)
        mirror(gram)
        # The product with what the teacher's layer makes of the difference, and not with its answer: where nothing has
        # changed H is W·G to the last bit, so that rounding in G cancels. It is also the smaller product.
        target = layer @ gram
        if student > 0:
            missed = (self.teacher - self.student) @ layer.transpose(1, 2).to(self.teacher.dtype)
            add_moment(target, missed, self.student, student)
        return gram, target


def old_equations(gram: Tensor, layer: Tensor, drift: Drift | None, share: float) -> tuple[Tensor, Tensor]:
    """G and H of all tasks folded so far, which are known by their second moments alone.

    Their inputs x have become about R·x by the layers changed so far. The equations of x and of R·x are mixed:
    E‖W·x − W_old·x‖² and E‖W·R·x − W_old·x‖² both have moments of x only.

    Args:
        gram: G of the old inputs as they were; it is overwritten.
        drift: R.
        share: of the moved inputs' equations.
    """
    target = layer @ gram
    if drift is None or not share:
        return gram, target
    moved = drift.applied(gram)  # G·Rᵀ
    target.baddbmm_(layer, moved, beta=1 - share, alpha=share)
    return gram.mul_(1 - share).add_(drift.applied(moved.mT).mT, alpha=share), target


@dataclass(frozen=True, eq=False)
class Equations:
    """One side of the fit: tr(B·(W·G·Wᵀ − 2·W·Hᵀ)), a layer's loss as its Fisher information sees it.

    Attributes:
        gram: G [g, d, d], second moment of the inputs.
        target: H [g, o, d]: what the layer should give, times the inputs, in the mean.
        curvature: B [g, o, o], second moment of the gradients at the outputs: which errors change decisions.
    """

    gram: Tensor
    target: Tensor
    curvature: Tensor


def fit(old: Equations, new: Equations, prior: Tensor, ridge: float) -> Tensor:
    """The layer that minimises both sides' sum and λ·tr(B_old·(W − prior)·(W − prior)ᵀ).

    λ = ridge × the mean diagonal of both G.

    Solved for the difference to `prior`, so that where both sides agree with it nothing moves by rounding.

    Args:
        old, new: their moments are overwritten.
    """
    extra = ridge_of(old.gram, ridge) + ridge_of(new.gram, ridge)
    right = old.curvature @ old.target.sub_(prior @ old.gram)
    right += new.curvature @ new.target.sub_(prior @ new.gram)
    old.gram.diagonal(dim1=1, dim2=2).add_(extra[:, None])
    return prior + solve_two((old.gram, old.curvature), (new.gram, new.curvature), right)


def damped(curvature: Tensor, damping: float) -> Tensor:
    """B [g, o, o] with a mean diagonal of 1, so that every task counts alike, and mixed with the identity, in place.

    A few dozen inputs know a few dozen directions of the outputs. The identity stands for the others, and for all where
    no gradient came.
    """
    scale = curvature.diagonal(dim1=1, dim2=2).mean(1)
    alive = scale > torch.finfo(torch.float32).tiny
    curvature.mul_(torch.where(alive, (1 - damping) / scale.where(alive, torch.ones_like(scale)), 0.0)[:, None, None])
    curvature.diagonal(dim1=1, dim2=2).add_(torch.where(alive, damping, 1.0)[:, None])
    return curvature
