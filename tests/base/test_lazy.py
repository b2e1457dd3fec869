"""Tensors that stay in their file, and the pages that are handed back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import residual
from torch import Tensor

from foldd.base.lazy import Lazy
from foldd.base.load import capture
from foldd.base.store import network_of
from foldd.core.tensorfile import hand_back, open_tensors, write_tensors

BYTES = 32 << 20


def mapped_bytes(path: Path) -> int:
    """What of a file is resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_lazy_mapping_makes_what_it_is_asked_for_and_nothing_else() -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.tensor(float(len(name)))

    lazy = Lazy(["bb", "a"], make)
    assert (list(lazy), len(lazy), "a" in lazy, "c" in lazy, made) == (["bb", "a"], 2, True, False, [])
    assert float(lazy["bb"]) == 2
    assert made == ["bb"]
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reading_leaves_no_page_behind(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "x.safetensors"
    values = (np.arange(BYTES // np.dtype(dtype).itemsize) % 1000).astype(dtype)
    write_tensors(path, {"odd": np.ones(3, dtype), "x": values}, {})
    stored = open_tensors(path).tensors
    assert stored["x"].stored().astype(np.float64).sum() > 0
    assert mapped_bytes(path) > BYTES // 2
    np.testing.assert_array_equal(stored["x"].float32(), values.astype(np.float32))
    assert mapped_bytes(path) < BYTES // 8
    np.testing.assert_array_equal(stored["odd"].float32(), np.ones(3, np.float32))
    np.testing.assert_array_equal(stored["x"].stored(), values)  # it is read again


def test_an_array_in_memory_is_left_alone() -> None:
    array = np.arange(1 << 20)
    hand_back(array[5:])
    assert array[-1] == (1 << 20) - 1


def test_a_network_without_weights_of_its_own_computes_the_same() -> None:
    model = residual()
    program = capture(model, (1, 8, 8))
    weights = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = network_of(program)[0](weights, x)
    features, walker, _ = network_of(program, forget=weights)
    assert torch.equal(features(weights, x), expected)
    held = sum(t.numel() for t in walker._module.state_dict(keep_vars=True).values() if t.is_floating_point())
    assert held == 0
    with torch.no_grad():
        torch.testing.assert_close(expected, model(x))
