"""One layer of the merge: weighted least squares between what two teachers' layers give.

All matrices are float64: layers [g·m, o, d] and moments [g·m, d, d] of each frequency m (`Modes`), moments of gradients
[g, o, o]. A wide layer's moment is a good part of the whole model (3072 inputs: 75 MB), so they are made one after the
other, and in place of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.drift import Drift
from foldd.fusion.gram import is_root, moment, ridge_of
from foldd.fusion.kronecker import Term, solve_two

WIDE = 512  # inputs or outputs; of a layer with more, about so many rows are looked at


@dataclass(frozen=True, eq=False)
class Sight:
    """What a layer sees of one task's inputs: rows [g·m, rows, d] of the teacher and of the merge under way."""

    teacher: Tensor
    student: Tensor

    def equations(self, layer: Tensor, student: float) -> tuple[Tensor, Tensor]:
        """Rows [g·m, r, d] whose second moment is G, and E: W + E·G⁻¹ makes a layer do what the teacher's `layer` W
        does on these inputs.

        With student = 1 the layer answers the student's inputs as the teacher's layer answers its own, and so takes
        back what the layers before it have changed (Nguyen et al. 2025 feed merged inputs too); with 0 it copies the
        teacher's layer where the teacher's inputs lie (RegMean, Jin et al. 2023, equation 2), and E is zero. Between,
        the mean, for which both take turns.
        """
        count, wide = self.teacher.shape[1], layer.shape[2] > WIDE
        step = -(-count // WIDE) if wide else 1
        if student <= 0:
            return self.teacher[:, ::step], torch.zeros_like(layer)
        if student >= 1:
            return self.student[:, ::step], Sight(self.teacher[:, ::step], self.student[:, ::step])._missed(layer)
        turn = slice(step if step < count else 0, None, 2 * step)
        own, sight = self.teacher[:, :: 2 * step], Sight(self.teacher[:, turn], self.student[:, turn])
        total = own.shape[1] + sight.student.shape[1]
        rows = torch.cat(
            [
                own * math.sqrt((1 - student) * total / own.shape[1]),
                sight.student * math.sqrt(student * total / sight.student.shape[1]),
            ],
            1,
        )
        return rows, sight._missed(layer).mul_(student)

    def _missed(self, layer: Tensor) -> Tensor:
        """E where all rows are the student's, in the order of its three factors that costs less."""
        lost = self.teacher - self.student
        if layer.shape[2] < 2 * layer.shape[1]:
            return layer @ moment(lost, self.student)
        return moment(lost @ layer.mT.to(lost.dtype), self.student)


def old_equations(gram: Tensor, layer: Tensor, drift: Drift, share: float) -> tuple[Tensor, Tensor]:
    """G and E of all tasks folded so far, which are known by their second moments alone.

    Their inputs x have become about R·x = x + U·V·x by the layers changed so far. The equations of x and of R·x are
    mixed: E‖W·x − W_old·x‖² and E‖W·R·x − W_old·x‖² both have moments of x only.

    Args:
        gram: G of the old inputs as they were; it is overwritten.
        share: of the moved inputs' equations.
    """
    left, seen = drift.left, drift.seen(gram)  # V·G
    moved = torch.baddbmm(seen, drift.seen(seen.mT), left.mT)  # V·G·Rᵀ
    gram.baddbmm_(seen.mT, left.mT, alpha=share).baddbmm_(left, moved, alpha=share)
    return gram, (layer @ left).mul_(-share) @ moved


@dataclass(frozen=True, eq=False)
class Equations:
    """One side of the fit: tr(B·(D·G·Dᵀ − 2·D·Eᵀ)) with D = W − the teacher's layer: its loss as its Fisher information
    sees it.

    Attributes:
        layer: the teacher's [g·m, o, d].
        gram: G, second moment of the inputs; of the new side it may be the root.
        missed: E [g·m, o, d]: what the layer should give beyond that, times the inputs, in the mean.
        curvature: B [g, o, o], second moment of the gradients at the outputs: which errors change decisions.
    """

    layer: Tensor
    gram: Tensor
    missed: Tensor
    curvature: Tensor

    def weigh(self, share: float) -> Equations:
        """The same equations with a weight, in place."""
        self.gram.mul_(math.sqrt(share) if is_root(self.gram) else share)
        self.missed.mul_(share)
        return self


def fit(old: Equations, new: Equations, prior: Tensor, ridge: float) -> Tensor:
    """The layer that minimises both sides' sum and λ·tr(B_old·(W − prior)·(W − prior)ᵀ).

    λ = ridge × the mean diagonal of both G.

    Solved for the difference to `prior`, so that where both sides agree with it nothing moves by rounding.

    Args:
        old, new: overwritten, but for their layers.
    """
    terms = [Term(e.gram, e.curvature, e.layer - prior, e.missed) for e in (old, new)]
    extra = (ridge_of(old.gram, ridge) + ridge_of(new.gram, ridge))[:, None]
    old.gram.diagonal(dim1=1, dim2=2).add_(extra)
    terms[0].missed.sub_(extra[..., None] * terms[0].change)  # it pulls to the prior, not to the old layer
    return prior + solve_two(*terms)


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
