"""The merge state on its way to a file and back, task vectors, and moments against samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from foldd.base.network import Base
from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.otmf import Otmf
from foldd.fusion.state import MergeState, empty_state, merged_weights, pack, unpack
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import compare, norm, task_vector


@pytest.fixture
def state(cnn: Base, make: Any) -> MergeState:
    state = Average().init(cnn)
    for task, seed in (("zebra", 1), ("ant", 2)):
        state, _ = Average().fold(state, make(cnn, task, seed), seed=0)
    return replace(state, statistics={"sum": torch.tensor(1.5), "deep/name": torch.arange(6.0).reshape(2, 3).T})


def test_round_trip_to_the_last_bit(state: MergeState, tmp_path: Path) -> None:
    tensors, metadata = pack(state)
    save_file(tensors, tmp_path / "s.safetensors")
    got = unpack(state.base, load_file(tmp_path / "s.safetensors"), metadata)
    assert (got.previous, got.count, list(got.heads)) == ("ant", 2, ["ant", "zebra"])
    assert list(got.merged) == list(state.base.weights)
    assert got.calibration is not None
    assert state.calibration is not None
    pairs: list[tuple[Tensor, Tensor]] = [(got.calibration, state.calibration)]
    pairs += [(got.merged[n], state.merged[n]) for n in state.merged]
    pairs += [(got.statistics[n], state.statistics[n]) for n in state.statistics]
    pairs += [(got.heads[t].weight, state.heads[t].weight) for t in state.heads]
    pairs += [(got.heads[t].bias, state.heads[t].bias) for t in state.heads]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert one.shape == other.shape
        assert torch.equal(one, other)


def test_empty_state_round_trips(mlp: Base) -> None:
    got = unpack(mlp, *pack(empty_state(mlp)))
    assert (got.count, got.previous, got.calibration, got.heads, got.statistics) == (0, None, None, {}, {})


def test_packed_arrays_cannot_be_written_to(state: MergeState) -> None:
    tensors, _ = pack(state)
    for name, array in tensors.items():
        assert array.flags.c_contiguous, name
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 7


def test_a_fold_after_a_restart_gives_the_same_bits(cnn: Base, make: Any, tmp_path: Path) -> None:
    method = Otmf()
    state = method.init(cnn)
    for task, seed in (("zebra", 1), ("ant", 2), ("midge", 3)):
        state, _ = method.fold(state, make(cnn, task, seed), seed=0)
    tensors, metadata = pack(state)
    save_file(tensors, tmp_path / "s.safetensors")
    restarted = unpack(cnn, load_file(tmp_path / "s.safetensors"), metadata)
    last = make(cnn, "bee", 4)
    one, two = method.fold(state, last, seed=5)[0], method.fold(restarted, last, seed=5)[0]
    assert all(torch.equal(one.merged[name], two.merged[name]) for name in cnn.weights)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t, m: t.pop("merged/bn.bias"), "broken-state"),
        (lambda t, m: t.update({"merged/bn.bias": np.zeros(3, np.float32)}), "broken-state"),
        (lambda t, m: t.update({"other/x": np.zeros(3, np.float32)}), "broken-state"),
        (lambda t, m: t.pop("heads/ant/bias"), "broken-state"),
        (lambda t, m: m.update(count="many"), "broken-state"),
        (lambda t, m: m.pop("count"), "broken-state"),
        (lambda t, m: m.update(base="0" * 64), "wrong-base"),
    ],
)
def test_a_broken_state_is_named(state: MergeState, change: Any, code: str) -> None:
    tensors, metadata = pack(state)
    change(tensors, metadata)
    with pytest.raises(BadSetup) as caught:
        unpack(state.base, tensors, metadata)
    assert caught.value.code == code


@pytest.fixture
def labelled(state: MergeState) -> MergeState:
    assert state.calibration is not None
    return replace(state, labels=torch.arange(len(state.calibration)) % 3, classes=("cat", "dög", "owl"))


def test_labels_and_class_names_round_trip(labelled: MergeState) -> None:
    got = unpack(labelled.base, *pack(labelled))
    assert got.labels is not None
    assert labelled.labels is not None
    assert torch.equal(got.labels, labelled.labels)
    assert got.labels.dtype == torch.int64
    assert got.classes == ("cat", "dög", "owl")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: m.pop("classes"),
        lambda t, m: m.update(classes="[" * 9),
        lambda t, m: m.update(classes="7"),
        lambda t, m: m.update(classes='["only one"]'),
        lambda t, m: t.pop("calibration/inputs"),
        lambda t, m: t.update({"calibration/labels": np.zeros(3, np.int64)}),
        lambda t, m: t.update({"calibration/labels": t["calibration/labels"] - 1}),
        lambda t, m: t.update({"calibration/labels": t["calibration/labels"].astype(np.float32)}),
    ],
)
def test_labels_that_number_nothing_are_a_broken_state(labelled: MergeState, change: Any) -> None:
    tensors, metadata = pack(labelled)
    change(tensors, metadata)
    with pytest.raises(BadSetup, match="labels") as caught:
        unpack(labelled.base, tensors, metadata)
    assert caught.value.code == "broken-state"


def test_merged_weights_are_base_plus_vector(state: MergeState) -> None:
    weights = merged_weights(state)
    for name, weight in state.base.weights.items():
        np.testing.assert_array_equal(weights[name].numpy(), weight.numpy() + state.merged[name].numpy())


def test_task_vectors_of_full_weights_and_differences_agree(cnn: Base, make: Any) -> None:
    full, delta = make(cnn, "a", 5, is_delta=False), make(cnn, "b", 5)
    for name in cnn.weights:
        torch.testing.assert_close(task_vector(cnn, full)[name], task_vector(cnn, delta)[name], rtol=0, atol=1e-6)


def test_a_missing_tensor_is_named(cnn: Base, make: Any) -> None:
    checkpoint = make(cnn, "a", 5)
    parameters = {name: stored for name, stored in checkpoint.parameters.items() if name != "bn.bias"}
    with pytest.raises(BadCheckpoint, match=r"bn\.bias"):
        task_vector(cnn, replace(checkpoint, parameters=parameters))


def test_norms_leave_statistics_out(cnn: Base, make: Any) -> None:
    vector = task_vector(cnn, make(cnn, "a", 5))
    kept = [v.double().numpy().ravel() for n, v in vector.items() if cnn.role(n) is not Role.STATISTIC]
    assert norm(cnn, vector) == pytest.approx(float(np.linalg.norm(np.concatenate(kept))))
    opposite = {name: -2 * tensor for name, tensor in vector.items()}
    both = compare(cnn, vector, opposite)
    assert both.cosine == pytest.approx(-1)
    assert both.second_norm == pytest.approx(2 * both.first_norm)
    assert both.first_norm == pytest.approx(norm(cnn, vector))
    assert compare(cnn, vector, {name: 0 * tensor for name, tensor in vector.items()}).cosine == 0


def test_moments_are_those_of_all_samples_together(cnn: Base) -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(m, s, (500, 4)) for m, s in ((0.0, 1.0), (3.0, 0.5), (-2.0, 2.0), (7.0, 0.1))]

    def vector(samples: np.ndarray) -> dict[str, Tensor]:
        moments = {"bn.running_mean": samples.mean(0), "bn.running_var": samples.var(0)}
        return {n: torch.from_numpy(moments[n]).float() - cnn.weights[n] for n in moments}

    merged = vector(parts[0])
    for count, part in enumerate(parts[1:], 1):
        merged = merge_statistics(cnn, merged, vector(part), count)
        together = np.concatenate(parts[: count + 1])
        for name, expected in (("bn.running_mean", together.mean(0)), ("bn.running_var", together.var(0))):
            np.testing.assert_allclose((cnn.weights[name] + merged[name]).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_unpaired_statistic_is_averaged(cnn: Base) -> None:
    weights = {n: w for n, w in cnn.weights.items() if n != "bn.running_mean"}
    base = replace(cnn, weights=weights)
    one, two = {"bn.running_var": torch.ones(4)}, {"bn.running_var": torch.full((4,), 4.0)}
    np.testing.assert_allclose(merge_statistics(base, one, two, 2)["bn.running_var"].numpy(), np.full(4, 2.0))
