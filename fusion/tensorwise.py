"""Folding one tensor after the other: the frame of the methods that see a tensor of both sides and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from foldd.core.roles import Role
from foldd.fusion.matrices import as_matrix, is_factored
from foldd.fusion.method import Progress
from foldd.fusion.state import MergeState


def fold_matrices(
    state: MergeState,
    vector: Mapping[str, Tensor],
    progress: Progress,
    merge: Callable[[Tensor, Tensor, int], Tensor],
    *,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """All tensors but BatchNorm statistics after one more fold, fresh.

    Matrices and convolutions go through `merge`; the rest, and matrices of a single row or column, which have no rank
    to share, are the mean by count.

    Args:
        merge: (merged, incoming, rank), matrices [m, n] and min(m, n) → [m, n], fresh.
        scale: the merged side is divided by it first.
    """
    base, count = state.base, state.count
    merged: dict[str, Tensor] = {}
    for done, (name, old) in enumerate(state.merged.items(), start=1):
        if base.role(name) is not Role.STATISTIC:
            old, new = old / scale, vector[name]
            rank = min(as_matrix(new).shape)
            if is_factored(base, name) and rank > 1:
                merged[name] = merge(as_matrix(old), as_matrix(new), rank).view(new.shape)
            else:
                merged[name] = old + (new - old) / (count + 1)
        progress(done / (len(base.weights) + 1))
    return merged
