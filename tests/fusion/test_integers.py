"""The merged vector in integers: what stays float, the way to a file and back, no bias over many folds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from foldd.base.network import Base
from foldd.core.errors import BadSetup
from foldd.fusion.average import Average
from foldd.fusion.integers import IntegerVector, round_vector
from foldd.fusion.otmf import Otmf
from foldd.fusion.state import MergeState, empty_state, pack, unpack

INTEGERS = {"stem.weight", "last.weight"}


def rounded(state: MergeState, seed: int = 0) -> MergeState:
    return replace(state, merged=round_vector(state.base, state.merged, seed))


@pytest.fixture
def state(cnn: Base, make: Any) -> MergeState:
    state = Average().init(cnn)
    for task, seed in (("zebra", 1), ("ant", 2)):
        state, _ = Average().fold(state, make(cnn, task, seed), seed=0)
    return state


def through_file(state: MergeState, path: Path) -> MergeState:
    tensors, metadata = pack(state)
    save_file(tensors, path)
    return unpack(state.base, load_file(path), metadata)


def same(one: MergeState, other: MergeState) -> bool:
    assert list(one.merged) == list(other.merged)
    return all(torch.equal(one.merged[name], other.merged[name]) for name in one.merged)


def test_weights_become_integers_and_all_else_stays(state: MergeState) -> None:
    got = rounded(state)
    assert isinstance(got.merged, IntegerVector)
    assert set(got.merged.codes) == INTEGERS
    assert list(got.merged) == list(state.base.weights)
    assert len(got.merged) == len(state.base.weights)
    assert "stem.weight" in got.merged
    assert "nope" not in got.merged
    for name in state.merged:
        if name not in INTEGERS:
            assert torch.equal(got.merged[name], state.merged[name]), name
            continue
        step = got.merged.codes[name].step
        assert step.shape == (len(state.merged[name]),)
        error = (got.merged[name] - state.merged[name]).abs().reshape(len(step), -1).amax(1).numpy()
        assert (error <= step * (1 + 1e-5)).all()
        assert not torch.equal(got.merged[name], state.merged[name])


def test_a_weight_with_one_number_a_channel_stays_float(mlp: Base) -> None:
    narrow = {name: torch.ones(8, 1) if name == "one.weight" else w for name, w in mlp.weights.items()}
    assert "one.weight" not in round_vector(mlp, narrow, 0).codes
    assert "one.weight" in round_vector(mlp, mlp.weights, 0).codes


def test_a_file_holds_codes_and_steps_and_gives_the_same_bits(state: MergeState, tmp_path: Path) -> None:
    kept = rounded(state)
    tensors, _ = pack(kept)
    kinds = {name.partition("/")[2]: array.dtype for name, array in tensors.items() if name.startswith("merged/")}
    assert {name for name, kind in kinds.items() if kind == np.int8} == INTEGERS
    assert {name for name in tensors if name.startswith("step/")} == {f"step/{name}" for name in INTEGERS}
    got = through_file(kept, tmp_path / "one")
    assert same(got, kept)
    again, _ = pack(got)
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in tensors.items()}
    for array in tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 7


def test_seed_and_name_decide_the_bits(state: MergeState) -> None:
    assert same(rounded(state, 1), rounded(state, 1))
    assert not same(rounded(state, 1), rounded(state, 2))


@pytest.mark.parametrize("method", [Average(), Otmf()])
def test_a_fold_after_a_restart_gives_the_same_bits(method: Any, cnn: Base, make: Any, tmp_path: Path) -> None:
    state = method.init(cnn)
    for task, seed in (("zebra", 1), ("ant", 2)):
        state = rounded(method.fold(state, make(cnn, task, seed), seed=0)[0], seed)
    restarted = through_file(state, tmp_path / "s")
    last = make(cnn, "bee", 4)
    one, two = method.fold(state, last, seed=5)[0], method.fold(restarted, last, seed=5)[0]
    assert same(rounded(one, 5), rounded(two, 5))


def test_the_setting_may_change_between_folds(cnn: Base, make: Any, tmp_path: Path) -> None:
    """float, integers, float: whatever is found is read, and a fold without rounding is stored as floats again."""
    method = Average()
    state = method.init(cnn)
    kinds = []
    for number, quantized in enumerate((False, True, False)):
        state, _ = method.fold(state, make(cnn, f"t{number}", number), seed=0)
        state = through_file(rounded(state) if quantized else state, tmp_path / f"{number}")
        kinds.append(load_file(tmp_path / f"{number}")["merged/stem.weight"].dtype)
    assert kinds == [np.float32, np.int8, np.float32]
    plain = method.init(cnn)
    for number in range(3):
        plain, _ = method.fold(plain, make(cnn, f"t{number}", number), seed=0)
    for name in INTEGERS:
        error = (state.merged[name] - plain.merged[name]).abs().max()
        assert 0 < error < plain.merged[name].abs().max() / 64


def runs(base: Base, make: Any, biased: bool) -> Iterator[dict[str, Tensor]]:
    """Errors of `average` after 12 folds whose vectors nearly agree, so that an update is less than half a step."""
    checkpoints = [make(base, f"t{i}", 0, vector={
        name: weight * (0.1 + 0.0001 * i) for name, weight in base.weights.items()
    }) for i in range(12)]  # fmt: skip
    for seed in range(12):
        plain = state = Average().init(base)
        for number, checkpoint in enumerate(checkpoints):
            plain, _ = Average().fold(plain, checkpoint, seed=0)
            state, _ = Average().fold(state, checkpoint, seed=0)
            state = rounded(state, 0 if biased else 1000 * seed + number)
        yield {name: state.merged[name] - plain.merged[name] for name in INTEGERS}


def test_twelve_folds_are_without_bias(cnn: Base, make: Any) -> None:
    """With the same random numbers in each run and fold the errors stay; with fresh ones their mean goes to nothing."""
    rms = {}
    for biased in (True, False):
        errors = list(runs(cnn, make, biased))
        rms[biased] = float(sum(torch.stack([e[name] for e in errors]).mean(0).square().mean() for name in INTEGERS))
    assert rms[False] < rms[True] / 5


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("step/stem.weight"),
        lambda t: t.update({"step/bn.bias": np.ones(4, np.float32)}),
        lambda t: t.update({"step/stem.weight": np.ones(3, np.float32)}),
        lambda t: t.update({"step/stem.weight": np.array(1, np.float32)}),
        lambda t: t.update({"step/stem.weight": np.ones(4, np.float64)}),
        lambda t: t.update({"step/stem.weight": np.array([1, 1, 0, 1], np.float32)}),
        lambda t: t.update({"step/stem.weight": np.array([1, 1, np.nan, 1], np.float32)}),
        lambda t: t.update({"merged/stem.weight": t["merged/stem.weight"].astype(np.int16)}),
        lambda t: t.update({"merged/stem.weight": t["merged/stem.weight"][:1]}),
    ],
)
def test_broken_integers_are_named(state: MergeState, change: Any) -> None:
    tensors, metadata = pack(rounded(state))
    unpack(state.base, tensors, metadata)
    change(tensors)
    with pytest.raises(BadSetup) as caught:
        unpack(state.base, tensors, metadata)
    assert caught.value.code == "broken-state"


def test_the_empty_vector_stays_empty(mlp: Base) -> None:
    kept = rounded(empty_state(mlp))
    assert not any(kept.merged[name].any() for name in mlp.weights)
