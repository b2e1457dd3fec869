"""A kernel by its frequencies: nothing is lost of a layer, and images are less correlated than by places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.layers import AffineLayer
from foldd.fusion.gram import moment
from foldd.fusion.modes import Modes


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


every = pytest.mark.parametrize(
    "modes", [Modes((3, 3), True), Modes((1, 3), False), Modes((1, 1), True), Modes((4, 2), True)], ids=repr
)


@every
def test_the_layer_is_the_sum_of_its_frequencies(modes: Modes) -> None:
    size = 5 * modes.count + modes.biased
    rows, layer = random(2, 30, size, seed=1), random(2, 4, size, seed=2)
    each = modes.split(rows) @ modes.split(layer).mT
    torch.testing.assert_close(each.view(2, modes.count, 30, 4).sum(1), rows @ layer.mT)


@every
def test_join_is_the_inverse_of_split(modes: Modes) -> None:
    layer = random(2, 4, 5 * modes.count + modes.biased, seed=1)
    torch.testing.assert_close(modes.join(modes.split(layer)), layer)


@every
def test_moments_of_patches_hold_those_of_each_frequency(modes: Modes) -> None:
    rows = random(2, 30, 5 * modes.count + modes.biased, seed=1)
    split = modes.split(rows)
    torch.testing.assert_close(modes.of_moment(moment(rows, rows)), moment(split, split))


def test_a_constant_image_is_all_in_the_first() -> None:
    layer = AffineLayer("conv", "w", "b", kernel=((1, 1), (0, 0), (1, 1)))
    weight = torch.zeros(2, 3, 3, 3)
    split = Modes.of(layer, weight).split(layer.rows(torch.ones(1, 3, 6, 6), weight))
    torch.testing.assert_close(split[0], torch.tensor([3.0, 3, 3, 1]).expand_as(split[0]))
    torch.testing.assert_close(split[1:], torch.zeros_like(split[1:]))


def test_frequencies_of_smooth_images_are_nearly_uncorrelated() -> None:
    images = F.avg_pool2d(random(40, 1, 20, 20, seed=1), 5, stride=1)
    patches = F.unfold(images, 3).mT.reshape(1, -1, 9)

    def correlated(rows: Tensor) -> float:
        """Mean squared correlation of different columns."""
        matrix = torch.corrcoef(rows[0].T)
        return float(matrix.square().sum() - 9) / 72

    by_frequency = Modes((3, 3), False).split(patches).permute(1, 2, 0)[..., 0, :][None]
    assert correlated(by_frequency) < 0.1 * correlated(patches)
