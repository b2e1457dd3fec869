"""`tsv-m`, `score` and `lore` offline against full decompositions in float64, and what LoRE's algorithm implies."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from offline_kit import ROLES, WEIGHTS, InMemory, Tensors, random_models, run
from torch import Tensor

from foldd.core.roles import Role
from foldd.fusion.offline.average import OfflineAverage
from foldd.fusion.offline.lore import OfflineLore, estimate, selection, shrink, singular_value
from foldd.fusion.offline.score import OfflineScore, prune, score_merge
from foldd.fusion.offline.tsv_m import OfflineTsvM

MATRICES = [n for n in WEIGHTS if ROLES[n] in (Role.MATRIX, Role.CONVOLUTION) and n != "row"]
Array = np.ndarray


def matrices(name: str, tensors: list[Tensors]) -> list[Array]:
    return [t[name].double().reshape(t[name].shape[0], -1).numpy() for t in tensors]


def vectors_of(name: str, base: Tensors, models: list[Tensors]) -> list[Array]:
    return [m - b for m, b in zip(matrices(name, models), matrices(name, [base] * len(models)), strict=True)]


def shared(vectors: list[Array]) -> tuple[Array, Array, Array]:
    """TSV-M's and SCORE's basis: polar factors by full decompositions."""
    k = min(vectors[0].shape) // len(vectors)
    triples = [np.linalg.svd(v, full_matrices=True) for v in vectors]
    u = np.concatenate([u[:, :k] for u, _, _ in triples], 1)
    v = np.concatenate([vt[:k].T for _, _, vt in triples], 1)
    s = np.concatenate([s[:k] for _, s, _ in triples])
    polar = []
    for x in (u, v):
        left, _, right = np.linalg.svd(x, full_matrices=False)
        polar.append(left @ right)
    return polar[0], s, polar[1]


def plain_score(vectors: list[Array], threshold: str) -> Array:
    left, _, right = shared(vectors)
    for column in range(left.shape[1]):
        if left[np.abs(left[:, column]).argmax(), column] < 0:
            left[:, column], right[:, column] = -left[:, column], -right[:, column]
    total = np.zeros((left.shape[1], right.shape[1]))
    for vector in vectors:
        c = left.T @ vector @ right
        size = len(c)
        off = [c[i, j] for i in range(size) for j in range(size) if i != j]
        if threshold == "code":
            off = off + [0.0] * size
        mu, sigma = np.mean(off), np.std(off, ddof=1)
        bound = 1.96 * sigma / (len(vectors) if threshold == "code" else 1)
        for i in range(size):
            for j in range(size):
                if i == j or (threshold != "diagonal" and abs(c[i, j] - mu) < bound):
                    total[i, j] += c[i, j]
    return left @ total @ right.T


def check(merged: Tensors, name: str, expected: Array) -> None:
    np.testing.assert_allclose(matrices(name, [merged])[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_tsv_m_against_the_definition(count: int) -> None:
    base, models = random_models(count)
    merged = run(OfflineTsvM(scaling=0.7), base, models)
    for name in MATRICES:
        left, s, right = shared(vectors_of(name, base, models))
        check(merged, name, matrices(name, [base])[0] + 0.7 * (left * s) @ right.T)


@pytest.mark.parametrize("count", [2, 3, 4])  # 4 divides none of the ranks, 2 and 3 some
@pytest.mark.parametrize("threshold", ["paper", "code", "diagonal"])
def test_score_against_the_definition(count: int, threshold: str) -> None:
    base, models = random_models(count)
    merged = run(OfflineScore(threshold=threshold, scaling=0.7), base, models)
    for name in MATRICES:
        check(merged, name, matrices(name, [base])[0] + 0.7 * plain_score(vectors_of(name, base, models), threshold))


@pytest.mark.parametrize("method", [OfflineTsvM(), OfflineScore(), OfflineLore()], ids=repr)
def test_the_rest_is_the_mean(method) -> None:
    base, models = random_models(3)
    merged, average = run(method, base, models), run(OfflineAverage(), None, models)
    for name in set(WEIGHTS) - set(MATRICES):
        torch.testing.assert_close(merged[name], average[name])


def test_more_tasks_than_rank_is_the_mean() -> None:
    vectors = [torch.randn(2, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    torch.testing.assert_close(score_merge(vectors, "paper"), torch.stack(vectors).mean(0))


def test_score_does_not_depend_on_the_signs_that_a_library_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from foldd.fusion import tsv_m

    vectors = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected, plain = score_merge(vectors, "paper"), tsv_m.svd

    def flipped(matrix: Tensor):
        u, s, v = plain(matrix)
        signs = torch.tensor([(-1.0) ** i for i in range(len(s))], dtype=s.dtype)
        return type(plain(matrix))(u * signs, s, v * signs)

    monkeypatch.setattr(tsv_m, "svd", flipped)
    torch.testing.assert_close(score_merge(vectors, "paper"), expected)


def test_score_keeps_what_tasks_do_in_directions_of_their_own() -> None:
    """Tasks that share no direction do not conflict: their sum, whole."""
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[:3, :3], two[3:, 3:] = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([5.0, 4.0, 0.5]))
    torch.testing.assert_close(score_merge([one, two], "diagonal"), one + two)


def test_prune_keeps_the_diagonal_and_drops_outliers() -> None:
    c = torch.full((6, 6), 0.1, dtype=torch.float64) + 0.01 * torch.arange(36).view(6, 6) / 36
    c[0, 5] = 9.0
    c.diagonal().fill_(50.0)
    for threshold in ("paper", "code"):
        kept = prune(c, threshold, 1)
        assert (float(kept[0, 5]), float(kept[2, 2])) == (0.0, 50.0)
        assert float(kept[3, 1]) == float(c[3, 1])
    assert torch.equal(prune(c, "diagonal", 1), torch.diag(c.diagonal()))
    assert int((prune(c, "code", 10) != 0).sum()) <= int((prune(c, "code", 1) != 0).sum())


def plain_lore(thetas: list[Array], share: float, rounds: int) -> tuple[Array, list[Array]]:
    """Algorithm 1, step 1, as printed, with full decompositions."""
    deltas, bounds = [np.zeros_like(t) for t in thetas], None
    for _ in range(rounds):
        base = sum(t - d for t, d in zip(thetas, deltas, strict=True)) / len(thetas)
        if bounds is None:
            r = int(share * min(base.shape))
            bounds = [np.linalg.svd(t - base, compute_uv=False)[r] for t in thetas]
        for i, theta in enumerate(thetas):
            u, s, vt = np.linalg.svd(theta - base, full_matrices=True)
            padded = np.zeros(theta.shape)
            np.fill_diagonal(padded, np.maximum(s - bounds[i], 0))
            deltas[i] = u @ padded @ vt
    return base, deltas


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("shape", [(12, 12), (20, 11), (10, 17)])
def test_lore_against_the_printed_algorithm(share: float, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(5)
    thetas = [torch.randn(shape, generator=g) + 3 for _ in range(3)]
    base, parts = estimate(thetas, share, rounds=12, tolerance=0.0)
    expected_base, expected_parts = plain_lore([t.double().numpy() for t in thetas], share, 12)
    np.testing.assert_allclose(base.double().numpy(), expected_base, atol=3e-6)
    for part, expected in zip(parts, expected_parts, strict=True):
        np.testing.assert_allclose(part.double().numpy(), expected, atol=3e-6)


def test_lore_selections_against_loops() -> None:
    g = torch.Generator().manual_seed(6)
    parts = [torch.randn(4, 5, generator=g) for _ in range(3)]
    expected = torch.zeros(4, 5)
    for i in range(4):
        for j in range(5):
            values = [float(p[i, j]) for p in parts]
            agree = [v for v in values if v * sum(values) > 0]
            expected[i, j] = sum(agree) / len(agree)
    torch.testing.assert_close(selection(parts, "ties"), expected)
    torch.testing.assert_close(selection(parts, "sum"), sum(parts))
    torch.testing.assert_close(selection(parts, "mean"), sum(parts) / 3)


def test_lore_mean_is_plain_averaging_at_convergence() -> None:
    _, models = random_models(3)
    close = run(OfflineLore(select="mean", share=0.5, rounds=1000), None, models)
    average = run(OfflineAverage(), None, models)
    for name in MATRICES:
        torch.testing.assert_close(close[name], average[name], atol=2e-6, rtol=0)
    once = run(OfflineLore(select="mean", share=0.5, rounds=2), None, models)
    assert any(float((once[name] - average[name]).abs().max()) > 1e-4 for name in MATRICES)
    whole = run(OfflineLore(select="sum", share=0.5), None, models)
    assert any(float((whole[name] - average[name]).abs().max()) > 1e-3 for name in MATRICES)


@pytest.mark.parametrize("select", ["sum", "mean", "ties"])
def test_lore_of_two_models_is_plain_averaging(select: str) -> None:
    _, models = random_models(2)
    merged, average = run(OfflineLore(select=select), None, models), run(OfflineAverage(), None, models)
    for name in merged:
        torch.testing.assert_close(merged[name], average[name])
    for name in MATRICES:  # by the printed algorithm too, which knows no short cut
        base, deltas = plain_lore(matrices(name, models), 0.2, 5)
        np.testing.assert_allclose(base + sum(deltas), matrices(name, [average])[0], atol=1e-6)


def test_lore_moves_with_its_models() -> None:
    """A matrix added to all models is added to the result: no base is known, none is needed."""
    _, models = random_models(3)
    moved = [{n: t + 2.0 for n, t in m.items()} for m in models]
    one, two = run(OfflineLore(), None, models), run(OfflineLore(), None, moved)
    for name in MATRICES:
        torch.testing.assert_close(two[name] - 2.0, one[name], atol=1e-4, rtol=0)


def test_lore_of_low_rank_changes_finds_them_whole() -> None:
    """Changes of no more than the wanted rank have σ_{r+1} = 0: nothing is cut, base = mean, δ_i = θ_i − base."""
    g = torch.Generator().manual_seed(1)
    rank_one = [torch.randn(15, 1, generator=g) @ torch.randn(1, 15, generator=g) for _ in range(3)]
    base, parts = estimate(rank_one, share=0.2)
    mean = torch.stack(rank_one).mean(0)
    torch.testing.assert_close(base, mean)
    for part, theta in zip(parts, rank_one, strict=True):
        torch.testing.assert_close(part, theta - mean)


def nuclear(x: Tensor) -> float:
    return float(torch.linalg.svdvals(x).sum())


def objective(theta: list[Tensor], base: Tensor, parts: list[Tensor], bounds: list[float]) -> float:
    pairs = zip(theta, parts, bounds, strict=True)
    return sum(0.5 * float((base + d - t).square().sum()) + mu * nuclear(d) for t, d, mu in pairs)


def test_lore_rounds_descend_one_convex_objective() -> None:
    g = torch.Generator().manual_seed(2)
    thetas = [torch.randn(12, 9, generator=g).double() for _ in range(4)]
    mean = torch.stack(thetas).mean(0)
    bounds = [singular_value(t - mean, int(0.3 * 9)) for t in thetas]
    values = []
    for rounds in (1, 2, 4, 8, 16, 64):
        base, parts = estimate(thetas, 0.3, rounds, 0.0)
        values.append(objective(thetas, base.double(), [p.double() for p in parts], bounds))
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(values))
    for _ in range(200):  # nobody near the end does better: it is the minimum
        other = base.double() + 0.01 * torch.randn(12, 9, generator=g)
        moved = [p.double() + 0.01 * torch.randn(12, 9, generator=g) for p in parts]
        assert objective(thetas, other, moved, bounds) > values[-1]


def test_shrink_is_the_prox_of_the_nuclear_norm_and_not_of_its_square() -> None:
    """For the square, which the paper's objective names, the threshold grows with the singular values that stay."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, generator=g).double()
    mu = 0.8
    found = shrink(x, mu)

    def plain(d: Tensor) -> float:
        return 0.5 * float((d - x).square().sum()) + mu * nuclear(d)

    def square(d: Tensor) -> float:
        return float((d - x).square().sum()) + mu * nuclear(d) ** 2

    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    nearby = [found + 0.02 * torch.randn(7, 5, generator=g) for _ in range(200)]
    nearby += [
        u @ torch.diag((s - bound).clamp_min(0)) @ vt for bound in np.linspace(0, 3, 61) if abs(bound - mu) > 1e-9
    ]
    assert all(plain(other) > plain(found) for other in nearby)
    bounds = [mu * float(s[:k].sum()) / (1 + mu * k) for k in range(1, 6)]
    best = min((u @ torch.diag((s - bound).clamp_min(0)) @ vt for bound in bounds), key=square)
    assert square(best) < square(found) - 0.1


@pytest.mark.parametrize("shape", [(9, 9), (14, 6), (5, 12)])
@pytest.mark.parametrize("bound", [0.0, 0.5, 1.7, 100.0])
def test_shrink_against_a_full_decomposition(shape: tuple[int, int], bound: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    expected = (u * (s - bound).clamp_min(0)) @ vt
    torch.testing.assert_close(shrink(x, bound).double(), expected, atol=1e-6, rtol=1e-6)
    for place in range(len(s)):
        assert singular_value(x, place) == pytest.approx(float(s[place]), rel=1e-5)
    assert singular_value(x, len(s)) == 0.0


def test_spectral_progress_ends_at_one() -> None:
    base, models = random_models(3)
    seen: list[float] = []
    run(OfflineScore(), base, models, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert InMemory(base, models).count == 3
