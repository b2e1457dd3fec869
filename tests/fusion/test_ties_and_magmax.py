"""`ties` and `magmax` against plain loops over single numbers."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.magmax import MagMax
from foldd.fusion.method import FoldMethod
from foldd.fusion.state import MergeState
from foldd.fusion.task_vector import task_vector
from foldd.fusion.ties import Ties, elect, least_kept, trim

Tensors = dict[str, Tensor]


def numbers(base: Base, vector: Tensors) -> list[float]:
    """All numbers of a task vector in one list, statistics left out."""
    names = [name for name in base.weights if base.role(name) is not Role.STATISTIC]
    return [x for name in names for x in vector[name].double().flatten().tolist()]


def fold_all(method: FoldMethod, base: Base, make: Any, vectors: list[Tensors]) -> MergeState:
    state = method.init(base)
    for i, vector in enumerate(vectors):
        state, _ = method.fold(state, make(base, f"t{i}", i, vector=vector), seed=0)
    return state


def plain_ties(one: list[float], other: list[float], density: float) -> list[float]:
    keep = max(1, int(density * len(one)))
    tops = [set(sorted(range(len(xs)), key=lambda i, xs=xs: -abs(xs[i]))[:keep]) for xs in (one, other)]
    result = []
    for i in range(len(one)):
        kept = [xs[i] if i in top else 0.0 for xs, top in zip((one, other), tops, strict=True)]
        total = sum(kept)
        result.append(sum(x for x in kept if x * total > 0))
    return result


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_ties_against_plain_loops(
    density: float, adds: bool, net: str, make: Any, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(net)
    vectors = [task_vector(base, make(base, f"t{i}", 10 + i, scale=0.1 * (i + 1))) for i in range(4)]
    expected = [0.3 * x if adds else x for x in numbers(base, vectors[0])]
    for vector in vectors[1:]:
        result = plain_ties(expected, numbers(base, vector), density)
        expected = [old * adds + 0.3 * new for old, new in zip(expected, result, strict=True)]
    state = fold_all(Ties(density=density, scaling=0.3, adds=adds), base, make, vectors)
    assert numbers(base, state.merged) == pytest.approx(expected, abs=1e-6)


def test_trimming_is_over_the_whole_vector(mlp: Base, make: Any) -> None:
    """A tensor of small changes loses all of them, whatever its own largest are."""
    one, two = (dict(task_vector(mlp, make(mlp, task, seed))) for task, seed in (("a", 1), ("b", 2)))
    two["two.weight"] = two["two.weight"] * 1e-3
    state = fold_all(Ties(density=0.2), mlp, make, [{n: v * 1e-6 for n, v in one.items()}, two])
    kept = {name: int((state.merged[name].abs() > 1e-4).sum()) for name in mlp.weights}
    assert kept["two.weight"] == 0
    assert sum(kept.values()) == int(0.2 * len(numbers(mlp, two)))


def test_trimming_keeps_what_is_as_large_as_the_last(mlp: Base) -> None:
    vector = {name: torch.full_like(weight, -2.0) for name, weight in mlp.weights.items()}
    assert least_kept(mlp, vector, 0.2) == 2.0
    assert torch.equal(trim(vector["position"], 2.0), vector["position"])


def test_elected_signs() -> None:
    one, other = torch.tensor([3.0, -3.0, 2.0, -2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -5.0, 2.0, -4.0, 0.0])
    assert elect(one, other).tolist() == [4.0, -3.0, -5.0, 0.0, -4.0, 1.0]


def test_large_elements_grow_by_half_with_every_fold(mlp: Base, make: Any) -> None:
    """The quirk of the continual form, with tasks that change nothing: ½, then 1½ times as much each time."""
    vector, nothing = task_vector(mlp, make(mlp, "a", 1)), {n: torch.zeros_like(w) for n, w in mlp.weights.items()}
    state = fold_all(Ties(), mlp, make, [vector, nothing, nothing])
    least = least_kept(mlp, vector, 0.2)
    for name, tensor in vector.items():
        expected = 0.5 * torch.where(tensor.abs() >= least, 2.25 * tensor, tensor)
        torch.testing.assert_close(state.merged[name], expected)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_magmax_against_plain_loops_in_every_order(net: str, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    vectors = [task_vector(base, make(base, f"t{i}", i)) for i in range(3)]
    expected = [max(xs, key=abs) for xs in zip(*(numbers(base, v) for v in vectors), strict=True)]
    for order in permutations(vectors):
        assert numbers(base, fold_all(MagMax(), base, make, list(order)).merged) == expected


def test_magmax_keeps_the_earlier_of_equal_magnitudes(mlp: Base, make: Any) -> None:
    vector = task_vector(mlp, make(mlp, "a", 1))
    state = fold_all(MagMax(), mlp, make, [vector, {name: -tensor for name, tensor in vector.items()}])
    assert all(torch.equal(state.merged[name], tensor) for name, tensor in vector.items())
