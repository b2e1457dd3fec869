"""`otmf` against a plain float64 transcription of its objective, and what it promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.fusion.otmf import Otmf, divergence
from foldd.fusion.state import HeadTensors, MergeState, merged_weights, pack
from foldd.fusion.task_vector import task_vector
from foldd.fusion.transport import sinkhorn_divergence

Tensors = dict[str, Tensor]


def run(method: Otmf, base: Base, *checkpoints: Checkpoint) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def plain_kl(head: tuple[Tensor, Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) written out over inputs and classes."""
    p, q = (torch.softmax(f @ head[0].T + head[1], 1) for f in (teacher, student))
    return (p * (p.log() - q.log())).sum() / len(student)


def objective(
    base: Base, weights: Tensors, pre: Tensors, post: Tensors, tasks: list[Checkpoint], x: Tensor, z: Tensor, m: Otmf
) -> Tensor:
    """The loss on previous inputs x and incoming inputs z; the last of `tasks` comes in."""
    heads = [(torch.from_numpy(c.head.weight), torch.from_numpy(c.head.bias)) for c in tasks]
    heads = [(w.to(x.dtype), b.to(x.dtype)) for w, b in heads]

    def features(vector: Tensors, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return base.features({n: w + vector[n] for n, w in base.weights.items()}, inputs)

    sx, sz = base.features(weights, x), base.features(weights, z)
    total = plain_kl(heads[-1], sz, features(post, z))
    for head in heads[:-1]:
        total = total + m.older * (plain_kl(head, sx, features(pre, x)) + plain_kl(head, sz, features(pre, z)))
    unit = [f / f.norm(dim=1, keepdim=True) for f in (sx, features(pre, x), sz, features(post, z))]
    old, new = sinkhorn_divergence(unit[0], unit[1]), sinkhorn_divergence(unit[2], unit[3])
    return total + m.transport * (m.older * old + new)


def test_against_a_plain_transcription(mlp: Base, make: Any) -> None:
    """Full batches, so that only the mathematics is compared: masks in autograd, torch's Adam on each of them."""
    base = replace(mlp, weights={n: w.double() for n, w in mlp.weights.items()})
    method = Otmf(steps=5, batch=6, learning_rate=0.05)
    tasks = [make(base, task, i, inputs=6, scale=0.5) for i, task in enumerate("abc")]
    state = run(method, base, *tasks[:2])
    got, report = method.fold(state, tasks[2], seed=0)
    pre = {n: v.double() for n, v in state.merged.items()}
    post = {n: v.double() for n, v in task_vector(base, tasks[2]).items()}
    x, z = (torch.from_numpy(c.inputs).double() for c in tasks[1:])
    masks: dict[str, list[Tensor]] = {}
    for name, weight in base.weights.items():
        shapes = [(weight.shape[0], 1), (1, weight.shape[1])] if name.endswith("weight") and weight.ndim == 2 else []
        shapes = shapes or [tuple(weight.shape)]
        masks[name] = [torch.ones(s, dtype=torch.float64, requires_grad=True) for s in shapes * 2]

    def constant(a: float, b: float) -> Tensors:
        return {n: w + a * pre[n] + b * post[n] for n, w in base.weights.items()}

    starts = [(1.0, 1.0), (1.0, 0.5), (1.0, 0.25), (2 / 3, 1 / 3)]
    first = [float(objective(base, constant(*start), pre, post, tasks, x, z, method)) for start in starts]
    start = starts[first.index(min(first))]
    for factors in masks.values():
        with torch.no_grad():
            factors[0].fill_(start[0])
            factors[len(factors) // 2].fill_(start[1])

    def vector() -> Tensors:
        result = {}
        for name, (*factors,) in masks.items():
            half = len(factors) // 2
            one, two = factors[0], factors[half]
            if half == 2:
                one, two = one * factors[1], two * factors[3]
            result[name] = one * pre[name] + two * post[name]
        return result

    optimiser = torch.optim.Adam([f for factors in masks.values() for f in factors], lr=0.05)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        merged = vector()
        loss = objective(base, {n: w + merged[n] for n, w in base.weights.items()}, pre, post, tasks, x, z, method)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    expected = vector()
    assert report.loss_first == pytest.approx(min(first), rel=1e-6)
    assert report.loss_first == pytest.approx(losses[0], rel=1e-6)
    assert report.loss_last == pytest.approx(losses[-1], rel=1e-4)
    for name in base.weights:
        torch.testing.assert_close(got.merged[name].double(), expected[name].detach(), rtol=1e-4, atol=1e-6)


def test_divergence_is_kl_of_the_teacher() -> None:
    g = torch.Generator().manual_seed(0)
    head = HeadTensors(torch.randn(4, 5, generator=g), torch.randn(4, generator=g))
    one, two = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    expected = plain_kl((head.weight, head.bias), one, two)
    torch.testing.assert_close(divergence(head, one, two), expected)
    assert float(divergence(head, one, one)) == pytest.approx(0, abs=1e-7)


def test_folding_comes_nearer_to_all_teachers_than_any_constant_masks(cnn: Base, make: Any) -> None:
    tasks = [make(cnn, task, i, inputs=16, scale=0.5) for i, task in enumerate("abc")]
    method = Otmf(steps=20, batch=8)
    state = run(method, cnn, *tasks[:2])
    pre, post = state.merged, task_vector(cnn, tasks[2])
    x, z = (torch.from_numpy(c.inputs) for c in tasks[1:])
    trained = merged_weights(method.fold(state, tasks[2], seed=0)[0])
    untrained = merged_weights(replace(method, steps=0).fold(state, tasks[2], seed=0)[0])
    with torch.no_grad():
        loss, start = (objective(cnn, w, pre, post, tasks, x, z, method) for w in (trained, untrained))
    assert float(loss) < 0.7 * float(start)


def test_an_empty_vector_changes_little(mlp: Base, make: Any) -> None:
    """A checkpoint that is the base itself, with heads that agree: the older tasks keep the merge where it was."""
    one = make(mlp, "a", 1, inputs=16)
    nothing = make(mlp, "b", 2, inputs=16, vector={n: torch.zeros_like(w) for n, w in mlp.weights.items()})
    method = Otmf(steps=30, batch=8, older=1e4)
    before = run(method, mlp, one)
    after, _ = method.fold(before, nothing, seed=0)
    x = torch.from_numpy(one.inputs)
    head = before.heads["a"]
    with torch.no_grad():
        old, new = (head.logits(mlp.features(merged_weights(s), x)) for s in (before, after))
    assert float((old.argmax(1) == new.argmax(1)).double().mean()) >= 0.9


def test_every_channel_stays_in_the_span_of_the_two_vectors(cnn: Base, make: Any) -> None:
    """A mask scales; it cannot invent: where both vectors are zero, so is the merge."""
    vectors = [task_vector(cnn, make(cnn, task, i)) for i, task in enumerate("ab")]
    for vector in vectors:
        vector["stem.weight"][2] = 0
        vector["last.weight"][:, 1] = 0
    checkpoints = [make(cnn, task, i, vector=v) for i, (task, v) in enumerate(zip("ab", vectors, strict=True))]
    merged = run(Otmf(steps=5, batch=4), cnn, *checkpoints).merged
    assert not merged["stem.weight"][2].any()
    assert not merged["last.weight"][:, 1].any()
    assert merged["stem.weight"][:2].all()


def test_statistics_are_never_trained(cnn: Base, make: Any) -> None:
    one, two = make(cnn, "a", 1), make(cnn, "b", 2)
    short, long = (run(Otmf(steps=steps, batch=4), cnn, one, two) for steps in (1, 6))
    for name in cnn.weights:
        assert torch.equal(short.merged[name], long.merged[name]) == (cnn.role(name) is Role.STATISTIC)


def test_memory_grows_by_heads_alone(mlp: Base, make: Any) -> None:
    sizes = []
    state = Otmf(steps=1).init(mlp)
    for i in range(4):
        state, _ = Otmf(steps=1, batch=4).fold(state, make(mlp, f"t{i}", i), seed=0)
        sizes.append(sum(array.nbytes for name, array in pack(state)[0].items() if not name.startswith("heads/")))
    assert len(set(sizes)) == 1


def test_the_report_says_how_well_the_teachers_are_followed(mlp: Base, make: Any) -> None:
    one, two = make(mlp, "a", 1), make(mlp, "b", 2)
    method = Otmf(steps=5, batch=4)
    state = run(method, mlp, one)
    new, report = method.fold(state, two, seed=0)
    assert report.agreement.keys() == {"a", "b"}
    with torch.no_grad():
        x = torch.from_numpy(one.inputs)
        old, now = (state.heads["a"].logits(mlp.features(merged_weights(s), x)).argmax(1) for s in (state, new))
    assert report.agreement["a"] == pytest.approx(float((old == now).double().mean()))
    assert report.steps == 5
    assert report.warnings == ()


def test_missing_calibration(mlp: Base, make: Any) -> None:
    method = Otmf(steps=3, batch=4)
    state = run(method, mlp, make(mlp, "a", 1))
    with pytest.raises(BadCheckpoint) as caught:
        method.fold(state, make(mlp, "b", 2, inputs=0), seed=0)
    assert caught.value.code == "no-calibration"
    _, report = method.fold(replace(state, calibration=None), make(mlp, "b", 2), seed=0)
    assert "stand in" in report.warnings[0]


def test_fewer_inputs_than_a_batch(mlp: Base, make: Any) -> None:
    state = run(Otmf(steps=3, batch=16), mlp, make(mlp, "a", 1, inputs=1), make(mlp, "b", 2, inputs=5))
    assert all(np.isfinite(tensor.numpy()).all() for tensor in state.merged.values())
