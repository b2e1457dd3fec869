"""Heads, fine-tuning, averaging, baselines and the export, on an untrained network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foldd.daemon.demo import build, train
from foldd.daemon.demo.network import FEATURES, DemoNetwork


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As `build` sets it: tensors this small are slower with more where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(build.THREADS)
    yield
    torch.set_num_threads(before)


def _network(seed: int = 0) -> DemoNetwork:
    torch.manual_seed(seed)
    return DemoNetwork(5).eval()


def _images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 16, 16, generator=generator) + labels[:, None, None, None]
    return images, labels


def test_the_head_picks_the_nearest_class_mean() -> None:
    network, (images, labels) = _network(), _images(90)
    weight, bias = train.nearest_class_mean(network, images, labels)
    with torch.no_grad():
        features = network.features(images)
    means = torch.stack([features[labels == c][: train.SHOTS].mean(0) for c in range(3)])
    expected = torch.cdist(features, means).argmin(1)
    assert weight.shape == (3, FEATURES)
    assert torch.equal((features @ weight.T + bias).argmax(1), expected)


def test_fine_tuning_leaves_head_and_statistics_alone_and_repeats_itself() -> None:
    base, (images, labels) = _network(), _images(64)
    head = train.nearest_class_mean(base, images, labels)
    done: list[float] = []
    first = train.fine_tune(base, head, images, labels, seed=1, report=done.append)
    second = train.fine_tune(base, head, images, labels, seed=1, report=lambda _: None)
    old, new, again = base.state_dict(), first.state_dict(), second.state_dict()
    for name in old:
        assert torch.equal(new[name], again[name]), name
        fixed = name.startswith("fc.") or "running_" in name or name.endswith("num_batches_tracked")
        assert torch.equal(old[name], new[name]) == fixed, name
    assert done[-1] == 1.0
    assert done == sorted(done)


def test_the_backbone_has_statistics_but_neither_head_nor_counters() -> None:
    names = set(train.backbone(_network()))
    assert {"stem.weight", "norm.running_var", "blocks.1.shortcut.0.weight"} <= names
    assert not [n for n in names if n.startswith("fc.") or n.endswith("num_batches_tracked")]


def test_averaging_adds_the_mean_task_vector() -> None:
    base, tuned = _network(0), [_network(1), _network(2)]
    merged = train.averaged(base, tuned)
    expected = (tuned[0].stem.weight + tuned[1].stem.weight) / 2
    torch.testing.assert_close(merged.stem.weight, expected)
    assert torch.equal(merged.fc.weight, base.fc.weight)
    alone = train.averaged(base, tuned[:1])
    torch.testing.assert_close(alone.blocks[2].conv1.weight, tuned[0].blocks[2].conv1.weight)


def test_baselines_have_one_row_per_task_and_a_growing_average() -> None:
    base, tuned = _network(0), [_network(1), _network(2)]
    held_back = [_images(30, 1), _images(30, 2)]
    heads = [train.nearest_class_mean(base, *images) for images in held_back]
    rows = build.baselines(base, tuned, heads, held_back)
    assert len(rows["unfolded"]) == len(rows["individual"]) == 2
    averaged = rows["averaged"]
    assert [len(step) for step in averaged if isinstance(step, list)] == [1, 2]
    assert averaged[0] == [rows["individual"][0]]  # the mean of one vector is that vector


def test_the_exported_base_answers_as_the_network_for_any_batch(tmp_path: Path) -> None:
    network = _network()
    build.export(network, tmp_path / "base.pt2")
    program = torch.export.load(tmp_path / "base.pt2").module()
    for count in (1, 7):
        images, _ = _images(count)
        with torch.no_grad():
            torch.testing.assert_close(program(images), network(images))
