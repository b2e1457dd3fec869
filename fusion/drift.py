"""How the inputs of a layer move in a fold, estimated on those at hand, and allowed for in what older tasks left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.gram import ridge_of, solve_right

RIDGE = 0.1  # a hundred inputs do not know a thousand directions
RANK = 128  # of a wider layer's drift
ROWS = 1024  # that a narrower one is estimated on


@dataclass(frozen=True, eq=False)
class Drift:
    """x → x + U·V·x for what a layer takes.

    Attributes:
        left: U, float64 [g, d, r].
        right: V, float64 [g, r, d]; None for the identity.
    """

    left: Tensor
    right: Tensor | None = None

    def seen(self, columns: Tensor) -> Tensor:
        """V·columns, of which U makes how far each moves: [g, d, n] → [g, r, n]."""
        return columns.clone() if self.right is None else self.right @ columns


def drift(*pairs: tuple[Tensor, Tensor]) -> Drift:
    """The drift between two networks' rows [g, rows, d] on the same inputs; each pair has rows of other inputs.

    Ridge regression of the difference, whatever the rows' task, shrunk to no drift. In the rows' own type: it is a
    rough estimate, and its ridge keeps it well conditioned.
    """
    wide = pairs[0][0].shape[2] > RANK
    picked = [_spread(pair, (RANK if wide else ROWS) // len(pairs)) for pair in pairs]
    before = torch.cat([one for one, _ in picked], 1)
    change = torch.cat([other for _, other in picked], 1).sub_(before)
    if wide:  # by the dual: as many equations as rows, instead of as inputs
        inner = before @ before.mT
        ridge = RIDGE * inner.diagonal(dim1=1, dim2=2).sum(1) / before.shape[2]
        inner.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        return Drift(solve_right(change.mT, inner).double(), before.double())
    gram, moved = before.mT @ before, change.mT @ before
    gram.diagonal(dim1=1, dim2=2).add_(ridge_of(gram, RIDGE)[:, None])
    return Drift(solve_right(moved, gram).double())


def _spread(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """At most so many rows of both, evenly spread."""
    step = -(-pair[0].shape[1] // count)
    return pair[0][:, ::step], pair[1][:, ::step]
