"""How the inputs of a layer move in a fold, estimated on those at hand, and allowed for in what older tasks left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldd.fusion.gram import add_moment, ridge_of, solve_right

RIDGE = 0.1  # a hundred inputs do not know a thousand directions


@dataclass(frozen=True, eq=False)
class Drift:
    """x → R·x for what a layer takes.

    A convolution takes the same channels at every place of its kernel, and they moved there alike: R is a matrix of
    channels, which is estimated in the middle of the kernel and applied at each place. It has fewer unknowns by the
    square of the places.

    Attributes:
        matrix: R, float64 [g, c, c], of c channels, with the layer's constant 1 among them where it has a bias.
        places: of the kernel; 1 for a linear layer.
        biased: whether the last element of x is that constant.
    """

    matrix: Tensor
    places: int = 1
    biased: bool = False

    def applied(self, rows: Tensor) -> Tensor:
        """R·x for each row x, or each of a matrix's: float64 [g, m, d] → [g, m, d]."""
        if self.places == 1:
            return rows @ self.matrix.mT
        groups, count, _ = rows.shape
        channels = self.matrix.shape[1] - self.biased
        weights, lift = self.matrix[:, :channels, :channels], self.matrix[:, :channels, channels:]
        taken = rows[..., : channels * self.places].reshape(groups, count, channels, self.places)
        moved = taken.mT.reshape(groups, -1, channels) @ weights.mT
        moved = moved.view(groups, count, self.places, channels).mT
        if not self.biased:
            return moved.reshape(groups, count, -1)
        constant = rows[..., -1:]
        moved = moved + (constant @ lift.mT)[..., None]
        return torch.cat([moved.reshape(groups, count, -1), constant], 2)


def drift(before: Tensor, after: Tensor, places: int = 1, biased: bool = False) -> Drift:
    """The drift between two networks' rows [g, rows, d] on the same inputs.

    Ridge regression of the difference on all rows at hand, whatever their task, shrunk to the identity. In the rows'
    own type: it is a rough estimate, and its ridge keeps it well conditioned.
    """
    before, change = (_middle(rows, places, biased) for rows in (before, after - before))
    gram, moved = (before.new_zeros(len(before), *2 * (before.shape[2],)) for _ in range(2))
    add_moment(gram, before, before, 1.0)
    add_moment(moved, change, before, 1.0)
    gram.diagonal(dim1=1, dim2=2).add_(ridge_of(gram, RIDGE)[:, None])
    matrix = solve_right(moved, gram).double()
    matrix.diagonal(dim1=1, dim2=2).add_(1.0)
    return Drift(matrix, places, biased)


def _middle(rows: Tensor, places: int, biased: bool) -> Tensor:
    """What a layer takes in the middle of its kernel, [g, rows, c]."""
    if places == 1:
        return rows
    middle = rows[..., places // 2 : rows.shape[2] - biased : places]
    return torch.cat([middle, rows[..., -1:]], 2) if biased else middle
