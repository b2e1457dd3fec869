"""One layer of the merge: least squares between what two teachers' layers give, in closed form.

All matrices are float64, per group: layers [g, o, d], moments [g, d, d], as `AffineLayer` and `moment` give them. A
wide layer's moment is a good part of the whole model (3072 inputs: 75 MB), so they are made one after the other, and
in place of each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.gram import BLOCK, add_moment, mirror, ridge_of, row_shares, solve_right

DRIFT_RIDGE = 0.1  # of the map from old to new inputs: a hundred inputs do not know a thousand directions


@dataclass(frozen=True, eq=False)
class Sight:
    """What a layer sees of one task's inputs: rows [g, rows, d] of the teacher and of the merge under way.

    `weight` [g, rows] says how much each row matters to what the heads decide; None: all alike.
    """

    teacher: Tensor
    student: Tensor
    weight: Tensor | None = None

    def equations(self, layer: Tensor, student: float) -> tuple[Tensor, Tensor]:
        """G and H whose solution H·G⁻¹ makes a layer do what the teacher's `layer` does on these inputs.

        With student = 1 the layer answers the student's inputs as the teacher's layer answers its own, and so takes
        back what the layers before it have changed (Nguyen et al. 2025 feed merged inputs too); with 0 it copies the
        teacher's layer where the teacher's inputs lie (RegMean, Jin et al. 2023, equation 2). Between, the mean.
        """
        shares = row_shares(self.teacher, self.weight)
        gram = layer.new_zeros(len(layer), layer.shape[2], layer.shape[2])
        if student < 1:
            add_moment(gram, self.teacher, self.teacher, (1 - student) * shares)
        if student > 0:
            add_moment(gram, self.student, self.student, student * shares)
        mirror(gram)
        # The product with what the teacher's layer makes of the difference, and not with its answer: where nothing has
        # changed H is W·G to the last bit, so that rounding in G cancels. It is also the smaller product.
        target = layer @ gram
        if student > 0:
            missed = (self.teacher - self.student) @ layer.transpose(1, 2).to(self.teacher.dtype)
            add_moment(target, missed, self.student, student * shares)
        return gram, target


def drift_map(before: Tensor, after: Tensor) -> Tensor:
    """R [g, d, d], shrunk to the identity, with after ≈ R·before: how a layer's inputs moved in this fold.

    Ridge regression of the difference on all rows at hand, whatever their task.
    """
    shares = row_shares(before, None)
    gram, change = (before.new_zeros(len(before), *2 * (before.shape[2],), dtype=torch.float64) for _ in range(2))
    add_moment(gram, before, before, shares)
    add_moment(change, after - before, before, shares)
    gram.diagonal(dim1=1, dim2=2).add_(ridge_of(gram, DRIFT_RIDGE)[:, None])
    drift = solve_right(change, gram)
    drift.diagonal(dim1=1, dim2=2).add_(1.0)
    return drift


def old_equations(gram: Tensor, layer: Tensor, drift: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """G and H of all tasks folded so far, which are known by their second moments alone.

    Their inputs x have become about R·x by the layers changed so far. The equations of x and of R·x are mixed:
    E‖W·x − W_old·x‖² and E‖W·R·x − W_old·x‖² both have moments of x only. Of the G given back only the lower half is
    right.

    Args:
        gram: G of the old inputs as they were; it is overwritten.
        drift: R, or None.
        share: of the moved inputs' equations.
    """
    target = layer @ gram
    if drift is None or not share:
        return gram, target
    moved = gram @ drift.transpose(1, 2)
    target.baddbmm_(layer, moved, beta=1 - share, alpha=share)
    for start in range(0, gram.shape[1], BLOCK):  # R·G·Rᵀ is symmetric: the lower half is enough
        part = gram[:, start:, start : start + BLOCK]
        part.mul_(1 - share).add_(drift[:, start:] @ moved[:, :, start : start + BLOCK], alpha=share)
    return gram, target


def fit(parts: Iterable[tuple[float, Tensor, Tensor]], prior: Tensor, ridge: float) -> Tensor:
    """The layer that minimises Σ wᵢ·tr(W·Gᵢ·Wᵀ − 2·W·Hᵢᵀ) + λ·‖W − prior‖², λ = ridge × mean diagonal of Σ wᵢ·Gᵢ.

    Args:
        parts: wᵢ, Gᵢ, Hᵢ, taken one after the other and overwritten; of Gᵢ only the lower half is read.
    """
    gram, target = prior.new_zeros(len(prior), *2 * (prior.shape[2],)), torch.zeros_like(prior)
    for weight, part, wanted in parts:
        gram.add_(part, alpha=weight)
        target.add_(wanted, alpha=weight)
        del part, wanted  # before the next one is made
    extra = ridge_of(gram, ridge)
    gram.diagonal(dim1=1, dim2=2).add_(extra[:, None])
    return solve_right(target.add_(prior * extra[:, None, None]), gram)
