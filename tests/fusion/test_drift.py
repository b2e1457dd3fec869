"""Drift of a layer's inputs: against ridge regression and against the moved rows themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.fusion.drift import Drift, drift
from foldd.fusion.gram import moment, ridge_of
from foldd.fusion.layer_fit import old_equations


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near_one(size: int, seed: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) + 0.3 * rows(size, size, seed=seed)


def patches(images: Tensor) -> Tensor:
    """As a 3 × 3 convolution of two groups takes them, with a one behind: [2, rows, 9·c + 1]."""
    split = F.unfold(images, 3).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return torch.cat([split, split.new_ones(*split.shape[:2], 1)], 2)


def test_it_is_ridge_regression_shrunk_to_the_identity() -> None:
    before = rows(1, 300, 4, seed=1)
    gram = moment(before, before)
    assert torch.equal(drift(before, before).matrix, torch.eye(4, dtype=torch.float64)[None])
    change = near_one(4, seed=2)
    got = drift(before, before @ change.T).matrix
    penalty = ridge_of(gram, 0.1)[0] * torch.eye(4)
    expected = (change - torch.eye(4)) @ gram[0] @ torch.linalg.inv(gram[0] + penalty) + torch.eye(4)
    torch.testing.assert_close(got[0], expected)


def test_channels_that_move_move_at_each_place_of_a_kernel() -> None:
    """Images whose channels were mixed and shifted: the rows of their patches are R·x of the old ones."""
    images, change, lift = rows(5, 6, 8, 8, seed=1), near_one(3, seed=2), rows(3, seed=3)
    moved = torch.cat([torch.einsum("dc,nchw->ndhw", change, i) + lift[:, None, None] for i in images.split(3, 1)], 1)
    matrix = torch.zeros(2, 4, 4, dtype=torch.float64)
    matrix[:, :3, :3], matrix[:, :3, 3], matrix[:, 3, 3] = change, lift, 1.0
    torch.testing.assert_close(Drift(matrix, 9, biased=True).applied(patches(images)), patches(moved))


def test_the_middle_of_the_kernel_is_enough_to_see_it() -> None:
    images, change = rows(400, 6, 5, 5, seed=1), near_one(3, seed=2)
    moved = torch.cat([torch.einsum("dc,nchw->ndhw", change, i) for i in images.split(3, 1)], 1)
    got = drift(patches(images), patches(moved), 9, biased=True)
    expected = drift(*(x.reshape(400, 2, 3, 25)[..., [6, 7, 8, 11, 12, 13, 16, 17, 18]].permute(1, 0, 3, 2).reshape(
        2, -1, 3) for x in (images, moved)))  # fmt: skip
    torch.testing.assert_close(got.matrix[:, :3, :3], expected.matrix, atol=0.02, rtol=0)
    assert float((got.matrix[:, :3, :3] - change).abs().max()) < 0.1 * float((change - torch.eye(3)).abs().max()) + 0.02
    without = drift(patches(images)[..., :-1], patches(moved)[..., :-1], 9)
    torch.testing.assert_close(without.matrix, expected.matrix, atol=0.02, rtol=0)
    whole = patches(images)[..., :-1]
    torch.testing.assert_close(without.applied(whole)[0, 0, :9], (without.matrix @ whole[:, 0].view(2, 3, 9))[0, 0])


def test_old_equations_are_those_of_the_moved_inputs() -> None:
    """With the whole share on the moved inputs: least squares on the old rows themselves, moved."""
    old, layer = rows(1, 80, 4, seed=1), rows(1, 3, 4, seed=2)
    change = Drift(near_one(4, seed=3)[None])
    gram, target = old_equations(moment(old, old), layer, change, 1.0)
    moved = old @ change.matrix.mT
    torch.testing.assert_close(gram, moment(moved, moved))
    torch.testing.assert_close(target, moment(old @ layer.transpose(1, 2), moved))
    half = old_equations(moment(old, old), layer, change, 0.25)[0]
    torch.testing.assert_close(half, 0.75 * moment(old, old) + 0.25 * gram)


def test_old_equations_of_a_convolution() -> None:
    old, layer = patches(rows(20, 6, 5, 5, seed=1)), rows(2, 3, 28, seed=2)
    change = Drift(torch.stack([near_one(4, seed=3), near_one(4, seed=4)]), 9, biased=True)
    gram, target = old_equations(moment(old, old), layer, change, 1.0)
    moved = change.applied(old)
    torch.testing.assert_close(gram, moment(moved, moved))
    torch.testing.assert_close(target, moment(old @ layer.transpose(1, 2), moved))
