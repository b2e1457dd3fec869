"""One layer of the merge: least squares between what two teachers' layers give, in closed form.

All matrices are float64, per group: layers [g, o, d], moments [g, d, d], as `AffineLayer` and `moment` give them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.gram import moment, ridge_of, solve_right

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
        seen = moment(self.student, self.student, self.weight)
        crossed = moment(self.teacher, self.student, self.weight)
        gram, target = student * seen, student * crossed
        if student < 1:
            own = moment(self.teacher, self.teacher, self.weight)
            gram, target = gram + (1 - student) * own, target + (1 - student) * own
        return gram, layer @ target


def drift_map(before: Tensor, after: Tensor) -> Tensor:
    """R [g, d, d], shrunk to the identity, with after ≈ R·before: how a layer's inputs moved in this fold.

    Ridge regression of the difference on all rows at hand, whatever their task.
    """
    gram = moment(before, before)
    change = moment(after - before, before)
    identity = torch.eye(gram.shape[1], dtype=torch.float64).expand_as(gram)
    return identity + solve_right(change, gram + ridge_of(gram, DRIFT_RIDGE))


def old_equations(gram: Tensor, layer: Tensor, drift: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """G and H of all tasks folded so far, which are known by their second moments alone.

    Their inputs x have become about R·x by the layers changed so far. The equations of x and of R·x are mixed:
    E‖W·x − W_old·x‖² and E‖W·R·x − W_old·x‖² both have moments of x only.

    Args:
        gram: G of the old inputs as they were. drift: R, or None. share: of the moved inputs' equations.
    """
    target = layer @ gram
    if drift is None or not share:
        return gram, target
    moved = gram @ drift.transpose(1, 2)
    both = drift @ moved
    both = 0.5 * (both + both.transpose(1, 2))
    return (1 - share) * gram + share * both, (1 - share) * target + share * (layer @ moved)


def fit(parts: list[tuple[float, Tensor, Tensor]], prior: Tensor, ridge: float) -> Tensor:
    """The layer that minimises Σ wᵢ·tr(W·Gᵢ·Wᵀ − 2·W·Hᵢᵀ) + λ·‖W − prior‖², λ = ridge × mean diagonal of Σ wᵢ·Gᵢ."""
    gram = sum((w * g for w, g, _ in parts[1:]), parts[0][0] * parts[0][1])
    target = sum((w * h for w, _, h in parts[1:]), parts[0][0] * parts[0][2])
    extra = ridge_of(gram, ridge)
    return solve_right(target + prior @ extra, gram + extra)
