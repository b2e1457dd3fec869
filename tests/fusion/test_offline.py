"""What all offline methods have in common, and the elementwise ones against plain loops in float64."""

from __future__ import annotations

from itertools import permutations
from statistics import mean, pvariance

import pytest
import torch
from offline_kit import SHAPES, WEIGHTS, InMemory, Tensors, random_model, random_models, run

from foldd.core.errors import BadSetup
from foldd.fusion.offline import contract, dare, ties
from foldd.fusion.offline.average import OfflineAverage
from foldd.fusion.offline.contract import OfflineMethod
from foldd.fusion.offline.dare import OfflineDare
from foldd.fusion.offline.lore import OfflineLore
from foldd.fusion.offline.magmax import OfflineMagMax
from foldd.fusion.offline.score import OfflineScore
from foldd.fusion.offline.task_arithmetic import OfflineTaskArithmetic
from foldd.fusion.offline.ties import OfflineTies, disjoint_mean, least_kept
from foldd.fusion.offline.tsv_m import OfflineTsvM

METHODS: list[OfflineMethod] = [
    OfflineAverage(), OfflineTaskArithmetic(), OfflineTies(), OfflineDare(), OfflineMagMax(), OfflineTsvM(),
    OfflineScore(), OfflineScore(threshold="code"), OfflineScore(threshold="diagonal"), OfflineLore(),
    OfflineLore(select="ties"),
]  # fmt: skip
every = pytest.mark.parametrize("method", METHODS, ids=repr)
# With the options under which a single model is to come out as it went in.
NEUTRAL: list[OfflineMethod] = [
    OfflineAverage(), OfflineTaskArithmetic(scaling=1.0), OfflineTies(density=1.0), OfflineDare(drop=0.0, scaling=1.0),
    OfflineMagMax(), OfflineTsvM(), OfflineScore(), OfflineLore(),
]  # fmt: skip


def numbers(model: Tensors) -> list[float]:
    return [x for name in WEIGHTS for x in model[name].double().flatten().tolist()]


def close(one: Tensors, other: Tensors, tolerance: float = 1e-5) -> None:
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", NEUTRAL, ids=repr)
def test_one_model_is_that_model(method: OfflineMethod) -> None:
    base, models = random_models(1)
    close(run(method, base, models), models[0])


@every
def test_the_base_itself_stays_the_base(method: OfflineMethod) -> None:
    base = random_model(3)
    close(run(method, base, [base] * 3), base)


@every
def test_statistics_are_the_moments_of_a_mixture(method: OfflineMethod) -> None:
    base, models = random_models(4)
    merged = run(method, base, models)
    for i in range(5):
        means = [float(m["n.running_mean"][i]) for m in models]
        variance = mean(float(m["n.running_var"][i]) for m in models) + pvariance(means)
        assert float(merged["n.running_mean"][i]) == pytest.approx(mean(means), abs=1e-6)
        assert float(merged["n.running_var"][i]) == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "dare"], ids=repr)
def test_no_order_among_models(method: OfflineMethod) -> None:
    base, models = random_models(3)
    expected = run(method, base, models)
    for order in list(permutations(models))[1:]:
        close(run(method, base, list(order)), expected)


@every
def test_scaling_all_inputs_scales_the_result(method: OfflineMethod) -> None:
    base, models = random_models(3)
    expected = run(method, base, models)
    scaled = run(method, {n: 8 * t for n, t in base.items()}, [{n: 8 * t for n, t in m.items()} for m in models])
    close({n: scaled[n] / 8 for n in WEIGHTS}, {n: expected[n] for n in WEIGHTS}, 1e-4)


@every
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_repeatable(method: OfflineMethod, kind: torch.dtype) -> None:
    base, models = random_models(3, spread=0.01)
    halves = [{n: t.to(kind) for n, t in m.items()} for m in models]
    base = {n: t.to(kind) for n, t in base.items()}
    one, two = run(method, base, halves), run(method, base, halves)
    assert all(bool(t.isfinite().all()) and torch.equal(t, two[n]) for n, t in one.items())
    assert max(float(t.abs().max()) for t in one.values()) < 10


@every
def test_low_rank_vectors_are_finite_repeatable_and_touch_nothing_else(method: OfflineMethod) -> None:
    """LoRA-born: rank one in one matrix, nothing anywhere else; one task even changed nothing at all."""
    base = random_model(1)
    models = [dict(base) for _ in range(4)]
    for i, model in enumerate(models[:3]):
        g = torch.Generator().manual_seed(i)
        model["b.weight"] = base["b.weight"] + torch.randn(6, 1, generator=g) @ torch.randn(1, 11, generator=g)
    one, two = run(method, base, models), run(method, base, models)
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    assert float((one["b.weight"] - base["b.weight"]).abs().max()) < 12
    close({n: t for n, t in one.items() if n != "b.weight"}, {n: t for n, t in base.items() if n != "b.weight"})


# What `dare` drops depends on where a piece begins; the size of a piece is fixed.
@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "dare"], ids=repr)
def test_pieces_are_of_no_account(method: OfflineMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = random_models(3)
    expected, seen = run(method, base, models), []
    monkeypatch.setattr(contract, "PIECE", 5)
    merged = run(method, base, models, seen.append)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


def test_average_and_task_arithmetic_against_loops() -> None:
    base, models = random_models(5)
    columns = list(zip(*map(numbers, models), strict=True))
    assert numbers(run(OfflineAverage(), None, models)) == pytest.approx([mean(xs) for xs in columns], abs=1e-6)
    expected = [b + 0.4 * sum(x - b for x in xs) for b, xs in zip(numbers(base), columns, strict=True)]
    merged = run(OfflineTaskArithmetic(scaling=0.4), base, models)
    assert numbers(merged) == pytest.approx(expected, abs=1e-6)


def test_the_average_of_equal_models_is_that_model_to_the_bit() -> None:
    model = random_model(4)
    merged = run(OfflineAverage(), None, [model] * 7)
    assert all(torch.equal(merged[name], model[name]) for name in WEIGHTS)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.2, 0.7, 1.0])
def test_ties_against_loops(density: float) -> None:
    """Algorithm 1: the k largest of the whole vector, the sign of the sum, the mean of those that agree."""
    base, models = random_models(4)
    vectors = [[x - b for x, b in zip(numbers(m), numbers(base), strict=True)] for m in models]
    keep = max(1, int(density * len(vectors[0])))
    tops = [set(sorted(range(len(v)), key=lambda i, v=v: -abs(v[i]))[:keep]) for v in vectors]
    expected = []
    for i, b in enumerate(numbers(base)):
        kept = [v[i] if i in top else 0.0 for v, top in zip(vectors, tops, strict=True)]
        agree = [x for x in kept if x * sum(kept) > 0]
        expected.append(b + 0.6 * (sum(agree) / len(agree) if agree else 0.0))
    merged = run(OfflineTies(density=density, scaling=0.6), base, models)
    assert numbers(merged) == pytest.approx(expected, abs=1e-6)


def test_the_trimming_bound_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a sort of all magnitudes, with many equal ones and many that share their upper bits."""
    monkeypatch.setattr(contract, "PIECE", 50)
    g = torch.Generator().manual_seed(0)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    models = [random_model(1), {n: torch.randint(-3, 4, s, generator=g).float() for n, s in SHAPES.items()},
              {n: 1 + 1e-6 * torch.rand(s, generator=g) for n, s in SHAPES.items()}]  # fmt: skip
    for density in (0.0, 0.01, 0.2, 0.5, 0.99, 1.0):
        found = least_kept(InMemory(base, models), density, lambda _: None)
        for bound, model in zip(found, models, strict=True):
            ranked = sorted((abs(x) for x in numbers(model)), reverse=True)
            assert bound == ranked[max(1, int(density * len(ranked))) - 1]


def test_disjoint_mean_where_signs_cancel_or_nobody_speaks() -> None:
    parts = [torch.tensor([3.0, 1.0, 0.0, -4.0, 2.0]), torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0])]
    assert disjoint_mean(parts).tolist() == [2.0, 0.0, 0.0, -4.0, 2.0]


def test_magmax_against_loops() -> None:
    base, models = random_models(4)
    expected = []
    for b, *xs in zip(numbers(base), *map(numbers, models), strict=True):
        expected.append(b + 0.5 * max((x - b for x in xs), key=abs))
    merged = run(OfflineMagMax(scaling=0.5), base, models)
    assert numbers(merged) == pytest.approx(expected, abs=1e-6)


def test_magmax_takes_the_later_of_equal_magnitudes() -> None:
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    up = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    merged = run(OfflineMagMax(), base, [up, {name: -tensor for name, tensor in up.items()}])
    assert set(numbers(merged)) == {-1.0}


def test_dare_drops_and_rescales() -> None:
    """Each element is either gone or 1/(1−p) as large; their share is p; the expectation is the vector."""
    vector = torch.ones(200_000)
    thinned = dare.drop_and_rescale(vector.clone(), 0.9, key=(0, 0, "w", 0))
    assert sorted(set(thinned.tolist())) == [0.0, pytest.approx(10.0)]
    kept = float((thinned != 0).double().mean())
    assert abs(kept - 0.1) < 4 * (0.1 * 0.9 / 200_000) ** 0.5
    assert torch.equal(dare.drop_and_rescale(vector.clone(), 0.0, key=(1,)), vector)


def test_dare_on_average_is_task_arithmetic() -> None:
    base, models = random_models(3)
    expected = run(OfflineTaskArithmetic(scaling=0.3), base, models)
    draws = [run(OfflineDare(drop=0.5, scaling=0.3, seed=seed), base, models) for seed in range(400)]
    for name in WEIGHTS:
        stack = torch.stack([draw[name] for draw in draws]).double()
        error = (stack.mean(0) - expected[name]).abs()
        assert bool((error <= 5 * stack.std(0) / 400**0.5 + 1e-6).all())


def test_dare_draws_by_name_model_and_seed() -> None:
    ones = torch.ones(500)
    keys = [(0, 0, "w", 0), (1, 0, "w", 0), (0, 1, "w", 0), (0, 0, "v", 0), (0, 0, "w", 500)]
    draws = [dare.drop_and_rescale(ones.clone(), 0.5, key=key) for key in keys]
    assert torch.equal(draws[0], dare.drop_and_rescale(ones.clone(), 0.5, key=keys[0]))
    assert all(not torch.equal(draws[0], draw) for draw in draws[1:])
    base, models = random_models(2)
    whole = run(OfflineDare(), base, models)
    names = ["b.weight", "e"]
    part = run(OfflineDare(), base, [{n: m[n] for n in names} for m in models])
    assert all(torch.equal(whole[n], part[n]) for n in names)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OfflineTies, {"density": 1.5}), (OfflineTies, {"density": -0.1}), (OfflineDare, {"drop": 1.0}),
        (OfflineLore, {"select": "median"}), (OfflineScore, {"threshold": "none"}), (OfflineLore, {"share": 2.0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(kind, options) -> None:
    with pytest.raises(BadSetup, match=str(next(iter(options)))):
        kind(**options)


@pytest.mark.parametrize("method", [m for m in METHODS if m.is_elementwise], ids=repr)
def test_elementwise_methods_read_nothing_but_pieces(method: OfflineMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "PIECE", 7)
    base, models = random_models(3)
    source, sizes = InMemory(base, models), []
    for read in ("base", "weights"):
        plain = getattr(source, read)
        monkeypatch.setattr(source, read, lambda *a, plain=plain: sizes.append(a[-1] - a[-2]) or plain(*a))
    for piece in method.merge(source, lambda _: None):
        assert len(piece.values) <= 7
    assert max(sizes) == 7


def test_workspace_of_elementwise_methods_does_not_grow_with_the_tensors() -> None:
    for method in METHODS:
        small, large = method.workspace([10**6], 3), method.workspace([10**9], 3)
        assert (small == large) == method.is_elementwise
    assert ties.PIECE == contract.PIECE
