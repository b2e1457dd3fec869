"""What the published data-free rivals have in common: `ties`, `tsv-m`, `opcm`, `dare`, `score`, `lore` …."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.fusion.dare import Dare
from foldd.fusion.lore import PREFIX, Lore
from foldd.fusion.magmax import MagMax
from foldd.fusion.method import FoldMethod
from foldd.fusion.nufilt import Nufilt
from foldd.fusion.opcm import Opcm
from foldd.fusion.score import Score
from foldd.fusion.state import MergeState, pack, unpack
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.ties import Ties
from foldd.fusion.tsv_m import TsvM

METHODS: list[FoldMethod] = [
    Ties(),
    Ties(adds=False),
    TsvM(),
    TsvM(alpha=0.5, by_count=True),
    Opcm(),
    Nufilt(steps=3),
    MagMax(),
    Dare(),
    Score(),
    Score(threshold="code"),
    Lore(),
    Lore(scaling=0.5),
]
every = pytest.mark.parametrize("method", METHODS, ids=repr)


def run(method: FoldMethod, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def bits(state: MergeState) -> dict[str, bytes]:
    tensors, _ = pack(state)
    return {name: array.tobytes() for name, array in tensors.items()}


@every
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("is_delta", [True, False])
def test_first_fold_is_the_task_vector(
    method: FoldMethod, net: str, is_delta: bool, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoint = make(base, "a", 3, is_delta=is_delta)
    state, report = method.fold(method.init(base), checkpoint, seed=0)
    expected = task_vector(base, checkpoint)
    assert all(torch.equal(state.merged[name], expected[name]) for name in base.weights)
    assert (report.method, report.count, report.steps, report.cosine) == (method.name, 1, 0, None)
    assert report.task_vector_norm == report.merged_norm > 0


@every
def test_a_fold_needs_no_inputs_and_leaves_the_old_state_alone(method: FoldMethod, cnn: Base, make: Any) -> None:
    assert not method.needs_calibration
    start = run(method, cnn, make(cnn, "b", 1, inputs=0), make(cnn, "c", 2, inputs=0))
    before, weights = bits(start), {name: weight.clone() for name, weight in cnn.weights.items()}
    seen: list[float] = []
    state, report = method.fold(start, make(cnn, "a", 3, inputs=0), seed=0, progress=seen.append)
    assert (list(state.heads), state.calibration, state.previous, state.count) == (["a", "b", "c"], None, "a", 3)
    assert bits(start) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in cnn.weights.items())
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert json.loads(json.dumps(report.as_dict()))["method"] == method.name
    assert not any(tensor.requires_grad for tensor in state.merged.values())


@every
def test_replay_through_a_file_gives_the_same_bits(method: FoldMethod, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(4)]
    through = method.init(cnn)
    for checkpoint in checkpoints:
        through = unpack(cnn, *pack(method.fold(through, checkpoint, seed=0)[0]))
    assert bits(run(method, cnn, *checkpoints)) == bits(through)


@every
def test_the_state_grows_by_heads_alone(method: FoldMethod, cnn: Base, make: Any) -> None:
    state, sizes = method.init(cnn), []
    for i in range(5):
        state, _ = method.fold(state, make(cnn, f"t{i}", i), seed=0)
        tensors, _ = pack(state)
        sizes.append(sum(array.nbytes for name, array in tensors.items() if not name.startswith("heads/")))
        own = {name: array.nbytes for name, array in tensors.items() if name.startswith("statistics/")}
        scalars = sum(size for name, size in own.items() if not name.startswith(f"statistics/{PREFIX}"))
        assert scalars <= 24  # no second copy of the model anywhere
    assert sizes == sizes[:1] * 5


@every
def test_statistics_merge_as_moments(method: FoldMethod, cnn: Base, make: Any) -> None:
    before = run(method, cnn, make(cnn, "a", 1), make(cnn, "b", 2))
    checkpoint = make(cnn, "c", 3, scale=5.0)
    after, _ = method.fold(before, checkpoint, seed=0)
    expected = merge_statistics(cnn, before.merged, task_vector(cnn, checkpoint), 2)
    assert len(expected) == 2
    assert all(torch.equal(after.merged[name], tensor) for name, tensor in expected.items())


@every
def test_statistics_touch_nothing_else(method: FoldMethod, cnn: Base, make: Any) -> None:
    """Whatever BatchNorm counted, the weights merge alike: it is in no norm, no threshold and no matrix."""
    vectors = [task_vector(cnn, make(cnn, f"t{i}", i)) for i in range(3)]
    large = [{n: 100 * v if cnn.role(n) is Role.STATISTIC else v for n, v in vector.items()} for vector in vectors]
    one, two = (
        run(method, cnn, *(make(cnn, f"t{i}", i, vector=v) for i, v in enumerate(which))) for which in (vectors, large)
    )
    weights = [name for name in cnn.weights if cnn.role(name) is not Role.STATISTIC]
    assert all(torch.equal(one.merged[name], two.merged[name]) for name in weights)


def half(base: Base, seed: int) -> dict[str, Tensor]:
    """The difference of a half-precision model to the base: rounding noise in every direction."""
    g = torch.Generator().manual_seed(seed)
    return {n: (w + 0.01 * torch.randn(w.shape, generator=g).abs()).half().float() - w for n, w in base.weights.items()}


def adapter(base: Base, seed: int) -> dict[str, Tensor]:
    """Rank one in one matrix, nothing anywhere else."""
    g = torch.Generator().manual_seed(seed)
    vector = {name: torch.zeros_like(weight) for name, weight in base.weights.items()}
    name = next(name for name in reversed(vector) if base.role(name) is Role.MATRIX)
    rows, columns = vector[name].shape
    vector[name] = torch.randn(rows, 1, generator=g) @ torch.randn(1, columns, generator=g)
    return vector


@every
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("born", [half, adapter])
def test_half_precision_and_low_rank_vectors(
    method: FoldMethod, net: str, born: Any, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoints = [make(base, f"t{i}", i, vector=born(base, i)) for i in range(4)]
    state = run(method, base, *checkpoints)
    assert bits(run(method, base, *checkpoints)) == bits(state)
    assert all(bool(tensor.isfinite().all()) for tensor in state.merged.values())
    largest = max(float(v.abs().max()) for i in range(4) for v in born(base, i).values())
    # A sum of four at most, or TIES's: it grows by half of itself and of τ with each fold.
    assert max(float(tensor.abs().max()) for tensor in state.merged.values()) <= 5 * largest
    if born is adapter:
        touched = [name for name, tensor in state.merged.items() if bool(tensor.any())]
        assert touched == [name for name, tensor in born(base, 0).items() if bool(tensor.any())]


@every
def test_a_task_that_changed_nothing(method: FoldMethod, cnn: Base, make: Any) -> None:
    nothing = {name: torch.zeros_like(weight) for name, weight in cnn.weights.items()}
    for order in ("nn", "nt", "tn"):
        checkpoints = [
            make(cnn, f"t{i}", i, vector=nothing if kind == "n" else None, scale=0.1) for i, kind in enumerate(order)
        ]
        state = run(method, cnn, *checkpoints)
        assert all(bool(tensor.isfinite().all()) for tensor in state.merged.values())
        assert any(bool(tensor.any()) for tensor in state.merged.values()) == ("t" in order)


@every
def test_a_known_task_and_missing_tensors(method: FoldMethod, mlp: Base, make: Any) -> None:
    state = run(method, mlp, make(mlp, "a", 1), make(mlp, "b", 2))
    again = make(mlp, "a", 3)
    new, report = method.fold(state, again, seed=0)
    np.testing.assert_array_equal(new.heads["a"].weight.numpy(), again.head.weight)
    assert (new.count, report.refolded) == (3, True)
    del again.parameters["one.weight"]
    with pytest.raises(BadCheckpoint) as caught:
        method.fold(state, again, seed=0)
    assert caught.value.code == "missing-tensors"
