"""`otmf` against plain float64 least squares on all inputs at once, and what it promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.network import Base
from foldd.base.walk import Lane
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.gram import is_root, moment, pack_gram, ridge_of, root_of, solve_right, unpack_gram
from foldd.fusion.layer_fit import Equations, Sight, damped, fit
from foldd.fusion.otmf import POSITIONS, Otmf
from foldd.fusion.state import MergeState, merged_weights, pack
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector

Tensors = dict[str, Tensor]
EVEN = Otmf(incoming=0.4, incoming_convolution=0.4)  # between tasks; the default leans to the old ones
# RegMean, recursively.
PLAIN = Otmf(incoming=1, incoming_convolution=1, previous=0, student=0, damping=1, drift=0, ridge=1e-9)


def run(method: Any, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the parts


def test_a_moment_is_the_mean_of_outer_products() -> None:
    x, y = rows(9000, 3, seed=1), rows(9000, 4, seed=2)
    torch.testing.assert_close(moment(x, y), torch.einsum("grd,gre->gde", x, y) / 9000)
    wide = rows(50, 1000, seed=3)
    torch.testing.assert_close(moment(wide, wide), wide.mT @ wide / 50)


def test_packing_halves_a_symmetric_matrix_and_loses_only_the_last_bits() -> None:
    gram = moment(rows(50, 7, seed=1), rows(50, 7, seed=1))
    packed = pack_gram(gram)
    assert packed.shape == (1, 28)
    torch.testing.assert_close(unpack_gram(packed, 7), gram, rtol=1e-6, atol=1e-7)


def test_fit_minimises_its_objective() -> None:
    """No step away from the answer lowers Σ (W·x − y)ᵀ·B·(W·x − y) + the pull to the prior, on the rows themselves."""
    seen = [(rows(40, 5, seed=1), rows(40, 3, seed=2)), (rows(60, 5, seed=3), rows(60, 3, seed=4))]
    curvatures = [moment(r, r) for r in (rows(30, 3, seed=6), rows(30, 3, seed=7))]
    prior = rows(3, 5, seed=5)
    layers = rows(3, 5, seed=8), rows(3, 5, seed=9)  # any: what they do not give is missed
    sides = [
        Equations(w, moment(x, x), moment(y - x @ w.mT, x), b.clone())
        for (x, y), w, b in zip(seen, layers, curvatures, strict=True)
    ]
    got = fit(*sides, prior, 0.1)
    scale = 0.1 * float(sum(moment(x, x) for x, _ in seen).diagonal(dim1=1, dim2=2).mean())

    def loss(errors: Tensor, curvature: Tensor) -> Tensor:
        return torch.einsum("gro,gop,grp->", errors, curvature, errors) / errors.shape[1]

    def objective(layer: Tensor) -> Tensor:
        total = sum(loss(x @ layer.mT - y, b) for (x, y), b in zip(seen, curvatures, strict=True))
        return total + scale * 5 * loss((layer - prior).mT, curvatures[0])  # a mean over five columns, times five

    layer = got.clone().requires_grad_()
    objective(layer).backward()
    assert float(layer.grad.abs().max()) < 1e-5
    assert float(objective(prior)) > float(objective(got))


def test_damping_scales_and_mixes_with_the_identity() -> None:
    curvature = torch.cat([3 * moment(rows(30, 4, seed=1), rows(30, 4, seed=1)), torch.zeros(1, 4, 4).double()])
    expected = 0.75 * curvature[0] / curvature[0].diagonal().mean() + 0.25 * torch.eye(4)
    got = damped(curvature, 0.25)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], torch.eye(4, dtype=torch.float64))  # no gradient reached it


@pytest.mark.parametrize("outputs", [2, 8])
def test_equations_with_student_inputs_take_back_what_came_before(outputs: int) -> None:
    """Where the student's inputs are an invertible map of the teacher's, the fitted layer undoes the map."""
    teacher = rows(200, 5, seed=1)
    change = torch.eye(5, dtype=torch.float64) + 0.2 * rows(5, 5, seed=2)[0]
    layer = rows(outputs, 5, seed=3)
    sight = Sight(teacher, teacher @ change.T)
    seen, missed = sight.equations(layer, 1.0)
    undone = layer + missed @ torch.linalg.inv(moment(seen, seen))
    torch.testing.assert_close(undone @ change, layer, rtol=1e-6, atol=1e-6)
    seen, missed = sight.equations(layer, 0.0)
    assert torch.equal(seen, teacher)
    assert not missed.any(), "the teacher's layer is what is wanted"


def test_teacher_and_student_take_turns() -> None:
    teacher, student, layer = rows(9, 5, seed=1), rows(9, 5, seed=2), rows(2, 5, seed=3)
    seen, missed = Sight(teacher, student).equations(layer, 0.25)
    own, merged = teacher[:, ::2], student[:, 1::2]
    torch.testing.assert_close(moment(seen, seen), 0.75 * moment(own, own) + 0.25 * moment(merged, merged))
    torch.testing.assert_close(missed, 0.25 * layer @ moment(teacher[:, 1::2] - merged, merged))
    seen, missed = Sight(teacher[:, :1], student[:, :1]).equations(layer, 0.5)
    assert bool(seen.isfinite().all()), "one row is for both"
    assert bool(missed.isfinite().all()), "one row is for both"


@pytest.mark.parametrize("student", [0.0, 0.5, 1.0])
def test_a_wide_layer_is_seen_in_fewer_rows_than_inputs(student: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the student's network is the teacher's, there is nothing to take back."""
    monkeypatch.setattr("foldd.fusion.layer_fit.WIDE", 10)
    teacher, layer = rows(64, 12, seed=1), rows(2, 12, seed=3)
    seen, missed = Sight(teacher, teacher).equations(layer, student)
    assert is_root(seen)
    assert seen.shape[1] <= 10
    assert not missed.any()
    torch.testing.assert_close(root_of(seen).mT @ root_of(seen), moment(seen, seen))
    torch.testing.assert_close(ridge_of(root_of(seen), 0.1), ridge_of(moment(seen, seen), 0.1))


def test_a_weight_counts_alike_for_moments_and_roots() -> None:
    seen, layer, b = rows(3, 5, seed=1), rows(2, 5, seed=2), torch.eye(2, dtype=torch.float64)[None]
    prior, missed = rows(2, 5, seed=3), rows(2, 5, seed=4)

    def fitted(new_gram: Tensor) -> Tensor:
        old = Equations(-layer, torch.eye(5, dtype=torch.float64)[None], 0 * missed, b.clone())
        return fit(old, Equations(layer, new_gram, missed.clone(), b.clone()).weigh(0.3), prior, 0.01)

    torch.testing.assert_close(fitted(root_of(seen)), fitted(moment(seen, seen)), rtol=1e-4, atol=1e-5)


def test_solve_right() -> None:
    gram = moment(rows(50, 6, seed=1), rows(50, 6, seed=1))
    target = rows(2, 6, seed=2)
    torch.testing.assert_close(solve_right(target, gram.clone()) @ gram, target)


# --- the fold


def test_folding_one_by_one_is_the_joint_least_squares(mlp: Base, make: Any) -> None:
    """With the plain settings: RegMean of all tasks at once (Jin et al. 2023, equation 2), in any number of folds."""
    tasks = [make(mlp, task, i, inputs=40, scale=0.5) for i, task in enumerate("abcd")]
    merged = merged_weights(run(PLAIN, mlp, *tasks))
    models = [{n: (w + task_vector(mlp, c)[n]).double() for n, w in mlp.weights.items()} for c in tasks]
    inputs = [torch.from_numpy(c.inputs).double() for c in tasks]
    # The position is the mean by count; then layer one, on each model's own inputs with a one behind.
    position = sum(m["position"] for m in models) / 4
    torch.testing.assert_close(merged["position"].double(), position, rtol=1e-5, atol=1e-6)
    firsts = [torch.cat([x + m["position"], torch.ones(len(x), 1)], 1) for x, m in zip(inputs, models, strict=True)]
    layers = [torch.cat([m["one.weight"], m["one.bias"][:, None]], 1) for m in models]
    expected = joint(firsts, layers)
    torch.testing.assert_close(merged["one.weight"].double(), expected[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(merged["one.bias"].double(), expected[:, -1], rtol=1e-3, atol=1e-4)
    seconds = [torch.tanh(x @ layer.T) for x, layer in zip(firsts, layers, strict=True)]
    expected = joint(seconds, [m["two.weight"] for m in models])
    torch.testing.assert_close(merged["two.weight"].double(), expected, rtol=1e-3, atol=1e-4)


def joint(inputs: list[Tensor], layers: list[Tensor]) -> Tensor:
    """The layer nearest to all models' outputs on their inputs, by a solver for stacked rows, not normal equations."""
    scaled = [x / len(x) ** 0.5 for x in inputs]
    outputs = [x @ layer.T for x, layer in zip(scaled, layers, strict=True)]
    return torch.linalg.lstsq(torch.cat(scaled), torch.cat(outputs)).solution.T


def test_the_order_of_plain_folds_does_not_matter(mlp: Base, make: Any) -> None:
    tasks = [make(mlp, task, i, inputs=40) for i, task in enumerate("abc")]
    one, two = (run(PLAIN, mlp, *order).merged for order in (tasks, tasks[::-1]))
    for name in ("one.weight", "one.bias", "two.weight"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_same_model_again_changes_nothing(network: str, request: pytest.FixtureRequest, make: Any) -> None:
    base: Base = request.getfixturevalue(network)
    vector = task_vector(base, make(base, "x", 3))
    tasks = [make(base, task, i, inputs=40, vector=vector) for i, task in enumerate("abc")]
    merged = run(Otmf(), base, *tasks).merged
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, vector[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_decisions_come_nearer_to_all_teachers_than_the_mean(
    network: str, request: pytest.FixtureRequest, make: Any
) -> None:
    base: Base = request.getfixturevalue(network)
    tasks = []
    for i, task in enumerate("abc"):
        checkpoint = make(base, task, i, inputs=40, scale=0.3)
        seen = np.zeros_like(checkpoint.inputs)  # each task has inputs of its own: one channel, or two features
        part = (slice(None), slice(i, i + 1) if network == "cnn" else slice(2 * i, 2 * i + 2))
        seen[part] = checkpoint.inputs[part]
        tasks.append(replace(checkpoint, inputs=seen))

    def distance(state: MergeState) -> float:
        total = 0.0
        for task in tasks:
            x, own = torch.from_numpy(task.inputs), task_vector(base, task)
            teacher = base.features({n: w + own[n] for n, w in base.weights.items()}, x)
            student = base.features(merged_weights(state), x)
            logs = [state.heads[task.task].logits(features).log_softmax(1) for features in (student, teacher)]
            total += float(F.kl_div(*logs, log_target=True, reduction="batchmean"))
        return total

    assert distance(run(EVEN, base, *tasks)) < 0.85 * distance(run(Average(), base, *tasks))


def test_statistics_are_merged_as_moments(cnn: Base, make: Any) -> None:
    one, two = make(cnn, "a", 1), make(cnn, "b", 2)
    merged = run(Otmf(), cnn, one, two).merged
    expected = merge_statistics(cnn, task_vector(cnn, one), task_vector(cnn, two), 1)
    assert expected.keys() == {n for n in cnn.weights if cnn.role(n) is Role.STATISTIC}
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor)


def test_memory_grows_by_heads_alone(cnn: Base, make: Any) -> None:
    sizes = []
    state = Otmf().init(cnn)
    for i in range(4):
        state, _ = Otmf().fold(state, make(cnn, f"t{i}", i), seed=0)
        sizes.append(sum(array.nbytes for name, array in pack(state)[0].items() if not name.startswith("heads/")))
    assert len(set(sizes)) == 1


def test_tasks_that_another_method_folded_are_stood_in_for(mlp: Base, make: Any) -> None:
    """A plain checkpoint in between leaves no moments; it must not be forgotten for that."""
    tasks = [make(mlp, task, i, inputs=40) for i, task in enumerate("abc")]
    state = run(Average(), mlp, *tasks[:2])
    after, _ = Otmf().fold(state, tasks[2], seed=0)
    assert float(after.statistics["gram-count"]) == 3
    known, _ = Otmf().fold(run(Otmf(), mlp, tasks[0]), tasks[2], seed=0)
    assert after.statistics.keys() == known.statistics.keys()
    old, new = state.merged["one.weight"], task_vector(mlp, tasks[2])["one.weight"]
    share = float((after.merged["one.weight"] - old).norm() / (new - old).norm())
    assert 0.05 < share < 0.6


def test_a_grouped_convolution_that_another_method_folded(grouped: Base, make: Any) -> None:
    """Its stand-in moments have as many groups as it has."""
    state = run(Average(), grouped, make(grouped, "a", 1), make(grouped, "b", 2))
    after, _ = Otmf().fold(state, make(grouped, "c", 3), seed=0)
    frequencies = grouped.weights["conv.weight"][0, 0].numel()
    assert after.statistics["gram/conv.weight"].shape[0] == 3 * frequencies
    assert after.statistics["curvature/conv.weight"].shape[0] == 3
    assert all(bool(tensor.isfinite().all()) for tensor in after.merged.values())


def test_moments_of_whole_patches_are_taken_over(cnn: Base, make: Any) -> None:
    """A state from before a kernel's frequencies had moments of their own: their blocks are in it."""
    state, one = run(Otmf(), cnn, make(cnn, "a", 1)), make(cnn, "b", 2)
    x = torch.from_numpy(make(cnn, "a", 1).inputs)
    weights = merged_weights(state)
    assert cnn.walker is not None
    older = {}
    for layer, (inputs,) in cnn.walker.walk([Lane(weights, x)]):
        patches = layer.rows(inputs, weights[layer.weight], POSITIONS)
        older[f"gram/{layer.weight}"] = pack_gram(moment(patches, patches))
    assert any(older[name].shape != state.statistics[name].shape for name in older)
    before = replace(state, statistics=state.statistics | older)
    expected, got = (Otmf().fold(s, one, seed=0)[0] for s in (state, before))
    for name, tensor in expected.statistics.items():
        torch.testing.assert_close(got.statistics[name], tensor, rtol=1e-4, atol=1e-5)
    for name, tensor in expected.merged.items():
        torch.testing.assert_close(got.merged[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_report_says_how_well_the_teachers_are_followed(mlp: Base, make: Any) -> None:
    one, two = make(mlp, "a", 1), make(mlp, "b", 2)
    state = run(Otmf(), mlp, one)
    new, report = Otmf().fold(state, two, seed=0)
    assert report.agreement.keys() == report.transport.keys() == {"a", "b"}
    with torch.no_grad():
        x = torch.from_numpy(one.inputs)
        old, now = (mlp.features(merged_weights(s), x) for s in (state, new))
    same = state.heads["a"].logits(old).argmax(1) == state.heads["a"].logits(now).argmax(1)
    assert report.agreement["a"] == pytest.approx(float(same.double().mean()))
    assert all(value > 0 for value in report.transport.values())
    near = float((F.normalize(old, dim=1) - F.normalize(now, dim=1)).square().sum(1).mean()) / 2
    assert report.transport["a"] <= near + 1e-6, "no plan is dearer than the known one"
    assert report.warnings == ()


def test_missing_calibration(mlp: Base, make: Any) -> None:
    state = run(Otmf(), mlp, make(mlp, "a", 1))
    with pytest.raises(BadCheckpoint) as caught:
        Otmf().fold(state, make(mlp, "b", 2, inputs=0), seed=0)
    assert caught.value.code == "no-calibration"
    _, report = Otmf().fold(replace(state, calibration=None), make(mlp, "b", 2), seed=0)
    assert "stand in" in report.warnings[0]


def test_one_input_is_enough_to_stay_finite(mlp: Base, make: Any) -> None:
    state = run(Otmf(), mlp, make(mlp, "a", 1, inputs=1), make(mlp, "b", 2, inputs=1))
    assert all(bool(tensor.isfinite().all()) for tensor in state.merged.values())


def test_moments_by_their_roots_give_the_same_merge(mlp: Base, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer inputs than a layer has each one's new side is a root; and the same with the moments themselves."""
    tasks = [make(mlp, task, i, inputs=5) for i, task in enumerate("ab")]
    by_roots = run(Otmf(), mlp, *tasks).merged
    monkeypatch.setattr("foldd.fusion.otmf.is_root", lambda _: False)
    for name, tensor in run(Otmf(), mlp, *tasks).merged.items():
        torch.testing.assert_close(by_roots[name], tensor, rtol=1e-3, atol=1e-4)


def test_wide_layers_are_seen_in_few_rows_and_few_gradients(
    mlp: Base, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldd.fusion.otmf.WIDE", 4)
    monkeypatch.setattr("foldd.fusion.layer_fit.WIDE", 4)
    packed: list[int] = []

    def pack(gram: Tensor, other: Tensor | None = None) -> Tensor:
        packed.append(int(torch.linalg.matrix_rank(gram)))
        return pack_gram(gram, other)

    tasks = [make(mlp, task, i, inputs=40) for i, task in enumerate("ab")]
    monkeypatch.setattr("foldd.fusion.otmf.pack_gram", pack)
    merged = run(Otmf(), mlp, *tasks).merged
    passes = 2 * 3  # two layers, 40 inputs by 16: the first fold starts with their gradients
    assert max(packed[:passes]) <= 2, "4 rows of 40 are at most 2 of 16"
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    for name, tensor in run(Otmf(), mlp, *tasks).merged.items():
        assert torch.equal(tensor, merged[name])


def test_the_share_of_the_incoming_task_is_a_setting(mlp: Base, make: Any) -> None:
    tasks = [make(mlp, task, i, inputs=40) for i, task in enumerate("ab")]
    new = task_vector(mlp, tasks[1])["one.weight"]
    distances = [
        float((run(Otmf(incoming=share), mlp, *tasks).merged["one.weight"] - new).norm()) for share in (0.2, 1, 5)
    ]
    assert distances == sorted(distances, reverse=True)


def test_convolutions_have_a_share_of_their_own(cnn: Base, make: Any) -> None:
    tasks = [make(cnn, task, i, inputs=40) for i, task in enumerate("ab")]
    merged = [
        run(Otmf(incoming=linear, incoming_convolution=other), cnn, *tasks).merged
        for linear, other in ((0.1, 0.1), (1.0, 0.1), (0.1, 1.0))
    ]
    assert torch.equal(merged[0]["stem.weight"], merged[1]["stem.weight"])
    assert not torch.equal(merged[0]["last.weight"], merged[1]["last.weight"])
    new = task_vector(cnn, tasks[1])["stem.weight"]
    assert (merged[2]["stem.weight"] - new).norm() < 0.9 * (merged[0]["stem.weight"] - new).norm()
    assert Otmf().weight(4, linear=False) == Otmf().weight(1, linear=False) / 4
    assert Otmf().weight(4, linear=True) == Otmf().weight(1, linear=True)


def test_how_many_inputs_pass_at_a_time_does_not_matter(mlp: Base, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [make(mlp, task, i, inputs=40) for i, task in enumerate("ab")]
    whole = run(Otmf(), mlp, *tasks).merged
    monkeypatch.setattr("foldd.fusion.otmf.BACKWARD_BATCH", 7)
    for name, tensor in run(Otmf(), mlp, *tasks).merged.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)


def test_moments_of_many_columns_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(60, 11, seed=1)
    expected = torch.einsum("grd,gre->gde", x, x) / 60
    monkeypatch.setattr("foldd.fusion.gram.BLOCK", 4)
    monkeypatch.setattr("foldd.fusion.gram.MIRROR_BLOCK", 3)
    gram = moment(x, x)
    torch.testing.assert_close(gram, expected)
    assert torch.equal(gram, gram.mT)
    assert torch.equal(unpack_gram(pack_gram(gram), 11), gram.float().double())
    assert torch.equal(pack_gram(gram, 2 * gram), (3 * gram)[:, *torch.tril_indices(11, 11)].float())
