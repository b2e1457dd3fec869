"""Drift of a layer's inputs: against ridge regression and against the moved rows themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldd.fusion import drift as module
from foldd.fusion.drift import Drift, drift
from foldd.fusion.gram import moment, ridge_of
from foldd.fusion.layer_fit import old_equations


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near_one(size: int, seed: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) + 0.3 * rows(size, size, seed=seed)


def whole(change: Drift) -> Tensor:
    """1 + U·V."""
    moves = change.left if change.right is None else change.left @ change.right
    return moves + torch.eye(moves.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("rank", [3, 4], ids=["by its dual", "as it is"])
def test_it_is_ridge_regression_shrunk_to_no_drift(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANK", rank)
    before = rows(2, 6, 4, seed=1)
    change = near_one(4, seed=2)
    seen = before if rank == 4 else before[:, ::2]  # no more rows than the rank
    gram = moment(seen, seen)
    penalty = ridge_of(gram, 0.1)[:, None, None] * torch.eye(4)
    expected = (change - torch.eye(4)) @ gram @ torch.linalg.inv(gram + penalty) + torch.eye(4)
    torch.testing.assert_close(whole(drift((before, before @ change.T))), expected)
    assert torch.equal(whole(drift((before, before))), torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_each_pair_has_an_equal_share_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 6)
    one, two = (rows(1, 9, 4, seed=1), rows(1, 9, 4, seed=2)), (rows(1, 3, 4, seed=3), rows(1, 3, 4, seed=4))
    together = tuple(torch.cat([a[:, ::3], b], 1) for a, b in zip(one, two, strict=True))
    assert torch.equal(whole(drift(one, two)), whole(drift((together[0], together[1]))))


@pytest.mark.parametrize("right", [None, 2], ids=["of full rank", "of low rank"])
def test_old_equations_are_those_of_the_moved_inputs(right: int | None) -> None:
    """With the whole share on the moved inputs: least squares on the old rows themselves, moved."""
    old, layer = rows(2, 80, 4, seed=1), rows(2, 3, 4, seed=2)
    change = Drift(0.3 * rows(2, 4, right or 4, seed=3), None if right is None else rows(2, right, 4, seed=4))
    gram, missed = old_equations(moment(old, old), layer, change, 1.0)
    moved = old @ whole(change).mT
    torch.testing.assert_close(gram, moment(moved, moved))
    torch.testing.assert_close(layer @ gram + missed, moment(old @ layer.mT, moved))
    mixed, half = old_equations(moment(old, old), layer, change, 0.25)
    torch.testing.assert_close(mixed, 0.75 * moment(old, old) + 0.25 * gram)
    torch.testing.assert_close(half, 0.25 * missed)
