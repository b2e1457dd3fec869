"""How the inputs of a layer move in a fold, estimated on those at hand, and allowed for in what older tasks left."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foldd.fusion.gram import ridge_of, solve_right

RIDGE = 0.1  # a hundred inputs do not know a thousand directions
RANK = 256  # of a wider layer's drift
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


def drift(before: Tensor, after: Tensor) -> Drift:
    """The drift between two networks' rows [g, rows, d] on the same inputs.

    Ridge regression of the difference, whatever the rows' task, shrunk to no drift. In the rows' own type: it is a
    rough estimate, and its ridge keeps it well conditioned.
    """
    wide = before.shape[2] > RANK
    step = -(-before.shape[1] // (RANK if wide else ROWS))
    before, change = before[:, ::step], after[:, ::step] - before[:, ::step]
    if wide:  # by the dual: as many equations as rows, instead of as inputs
        inner = before @ before.mT
        ridge = RIDGE * inner.diagonal(dim1=1, dim2=2).sum(1) / before.shape[2]
        inner.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        return Drift(solve_right(change.mT, inner).double(), before.double())
    gram, moved = before.mT @ before, change.mT @ before
    gram.diagonal(dim1=1, dim2=2).add_(ridge_of(gram, RIDGE)[:, None])
    return Drift(solve_right(moved, gram).double())
