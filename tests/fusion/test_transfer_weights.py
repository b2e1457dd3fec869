"""UOWQ's formulas, each against another way to the same number: grids, SLSQP, Monte Carlo, explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from foldd.fusion.transfer_weights import (
    effective_dimension,
    fold_share,
    joint_shares,
    kl_measure,
    source_weight,
    transfer_weights,
)

SIMPLEX = {"type": "eq", "fun": lambda a: a.sum() - 1}


def case(seed: int, sources: int = 4, dimension: int = 6, spread: float = 0.1):
    """Counts [K], Θ [d, K], J [d, d] and ΘᵀJΘ."""
    random = np.random.RandomState(seed)
    counts = random.randint(50, 2000, sources).astype(float)
    theta = spread * random.randn(dimension, sources)
    root = random.randn(dimension, dimension)
    fisher = root @ root.T / dimension + 0.1 * np.eye(dimension)
    return counts, theta, fisher, theta.T @ fisher @ theta


def slsqp(objective, size):
    """The least of a convex function on the simplex, from several starts."""
    starts = [np.full(size, 1 / size), *np.random.RandomState(0).dirichlet(np.ones(size), 5)]
    options = {"ftol": 1e-15, "maxiter": 1000}
    results = [
        minimize(objective, start, method="SLSQP", bounds=[(0, 1)] * size, constraints=[SIMPLEX], options=options)
        for start in starts
    ]
    return min(results, key=lambda result: result.fun)


def simulate(target, counts, weights, theta, fisher, repetitions=200_000, seed=0):
    """K of the weighted estimate by Monte Carlo and its standard error. A Gaussian mean with known precision J: the
    weighted maximum of the likelihood is the weighted mean of all samples, so sample means can be drawn at once."""
    random = np.random.RandomState(seed)
    dimension = len(fisher)
    root = np.linalg.cholesky(np.linalg.inv(fisher))
    total = target * (random.randn(repetitions, dimension) @ root.T) / np.sqrt(target)
    for count, weight, offset in zip(counts, weights, theta.T, strict=True):
        total += weight * count * (offset + random.randn(repetitions, dimension) @ root.T / np.sqrt(count))
    estimate = total / (target + np.dot(weights, counts))
    values = 0.5 * np.einsum("ri,ij,rj->r", estimate, fisher, estimate)
    return values.mean(), values.std() / np.sqrt(repetitions)


@pytest.mark.parametrize(("target", "samples", "distance"), [(50, 400, 0.08), (20, 3000, 0.01), (500, 100, 0.5)])
def test_equation_10_is_the_least_of_equation_7(target, samples, distance):
    t = distance**2  # J = 1

    def k(w):  # equation 7, as it stands
        n, total = samples, target + w * samples
        return 0.5 * ((target + w**2 * n) / total**2 + (w * n) ** 2 / total**2 * t)

    grid = np.linspace(0, 1, 100_001)
    best = grid[np.argmin(k(grid))]
    assert source_weight(samples, t) == pytest.approx(best, abs=2e-5)
    assert kl_measure(target, [samples], [best], np.array([[t]]), 1) == pytest.approx(k(best), rel=1e-12)


def test_equation_10_in_its_limits():
    assert source_weight(100, 0.0) == 1.0
    assert source_weight(100, 1e9) < 1e-10
    assert source_weight(1000, 0.01) < source_weight(100, 0.01) < 1


def test_equation_12_with_an_explicit_fisher_matrix():
    counts, theta, fisher, products = case(1, sources=1)
    t = float(theta[:, 0] @ fisher @ theta[:, 0]) / 6
    assert source_weight(counts[0], t) == pytest.approx(1 / (1 + counts[0] * t), rel=1e-14)
    one = transfer_weights(counts, products, 6)
    assert one.weights[0] == pytest.approx(source_weight(counts[0], t), rel=1e-12)
    assert one.shares == (1.0,)


def test_equation_14_has_its_least_at_the_same_weight():
    target, samples, t = 80.0, 500.0, 0.004
    weight = source_weight(samples, t)
    alpha = weight * samples / (target + weight * samples)
    assert alpha == pytest.approx((1 / target) / (1 / target + 1 / samples + t), rel=1e-12)
    k = 0.5 * ((1 - alpha) ** 2 / target + alpha**2 / samples + alpha**2 * t)
    assert kl_measure(target, [samples], [weight], np.array([[t]]), 1) == pytest.approx(k, rel=1e-12)


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 1.4, 0.1)])
def test_equation_16_by_monte_carlo(weights):
    """200,000 repetitions in 4 dimensions: the standard error is 0.16 % of K and less."""
    counts, theta, fisher, products = case(3, sources=3, dimension=4)
    measured, error = simulate(40, counts, weights, theta, fisher)
    assert error < 0.002 * measured
    assert abs(measured - kl_measure(40, counts, weights, products, 4)) < 4 * error


@pytest.mark.parametrize("seed", range(6))
def test_equations_22_and_23_against_slsqp(seed):
    counts, _, _, products = case(seed)
    q = np.diag(1 / counts) + products / 6
    reference = slsqp(lambda a: 1e4 * (a @ q @ a), 4)
    found = np.array(transfer_weights(counts, products, 6).shares)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found @ q @ found <= reference.fun / 1e4 * (1 + 1e-9)
    np.testing.assert_allclose(found, reference.x, atol=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_equation_24_is_the_best_quantity_whatever_the_target_has(seed):
    counts, _, _, products = case(seed)
    found = transfer_weights(counts, products, 6)
    q = np.diag(1 / counts) + products / 6
    alpha = np.array(found.shares)
    assert found.quantity == pytest.approx(1 / (alpha @ q @ alpha), rel=1e-9)
    for target in (1.0, 100.0, 1e5):
        best = kl_measure(target, counts, found.weights, products, 6)
        assert best == pytest.approx(3 / (target + found.quantity), rel=1e-9)
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert kl_measure(target, counts, factor * np.array(found.weights), products, 6) > best


@pytest.mark.parametrize("seed", range(4))
def test_equation_25_is_the_least_over_all_weights(seed):
    """Against a search over w itself, which knows neither shares nor quantity."""
    counts, _, _, products = case(seed)
    found = transfer_weights(counts, products, 6)
    for i, weight in enumerate(found.weights):
        assert weight == pytest.approx(found.quantity * found.shares[i] / counts[i], rel=1e-9, abs=1e-15)
    reference = minimize(
        lambda w: 1e3 * kl_measure(100, counts, np.abs(w), products, 6), np.ones(4), method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000},
    )  # fmt: skip
    assert kl_measure(100, counts, found.weights, products, 6) <= reference.fun / 1e3 * (1 + 1e-9)


def test_equation_9_more_samples_are_never_worse():
    counts, _, _, products = case(5)
    quantities = [transfer_weights(f * counts, products, 6).quantity for f in (0.25, 0.5, 1.0, 2.0)]
    assert quantities == sorted(quantities)
    assert len(set(quantities)) == 4


def test_lemma_8_the_weighted_estimate_is_the_weighted_average_of_the_parameters():
    """1,000 logistic regressions with 2 parameters by Newton's method. Mean of the estimates; standard errors 0.002."""
    random = np.random.RandomState(0)
    counts, weights = (400, 800), (1.0, 0.5)  # the target's own weight is 1
    parameters = np.array([[0.3, -0.2], [0.45, -0.05]])
    estimates = []
    for _ in range(1000):
        x = random.randn(sum(counts), 2)
        truth = np.repeat(parameters, counts, axis=0)
        y = (random.rand(len(x)) < 1 / (1 + np.exp(-(x * truth).sum(1)))).astype(float)
        w = np.repeat(weights, counts)
        theta = np.zeros(2)
        for _ in range(8):
            p = 1 / (1 + np.exp(-x @ theta))
            theta = theta + np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x, x.T @ (w * (y - p)))
        estimates.append(theta)
    expected = (400 * parameters[0] + 400 * parameters[1]) / 800
    error = np.std(estimates, axis=0) / np.sqrt(1000)
    assert error.max() < 0.003
    assert (np.abs(np.mean(estimates, axis=0) - expected) < 4 * error + 0.002).all()  # O(1/N) bias of the estimate


def test_a_weight_may_exceed_one_and_be_exactly_zero():
    opposite = np.array([[0.3, -0.6]])
    found = transfer_weights([1000, 1000], opposite.T @ opposite, 1)
    np.testing.assert_allclose(found.weights, [1.2, 0.6], atol=0.005)
    aside = np.array([[0.5, 0.05]])
    assert transfer_weights([400, 400], aside.T @ aside, 1).weights[0] == 0.0


def test_permuted_sources_have_permuted_weights():
    counts, _, _, products = case(2)
    order = np.array([2, 0, 3, 1])
    found = np.array(transfer_weights(counts, products, 6).weights)
    moved = transfer_weights(counts[order], products[np.ix_(order, order)], 6).weights
    np.testing.assert_allclose(moved, found[order], rtol=1e-9)


def test_only_the_ratio_of_products_and_dimension_counts():
    counts, _, _, products = case(2)
    np.testing.assert_allclose(
        transfer_weights(counts, 7 * products, 42).weights, transfer_weights(counts, products, 6).weights, rtol=1e-9
    )
    scaled = transfer_weights(10 * counts, products / 10, 6)
    np.testing.assert_allclose(scaled.weights, transfer_weights(counts, products, 6).weights, rtol=1e-9)


def test_sources_equal_to_the_target_count_in_full():
    found = transfer_weights([10, 1000, 1e9], np.zeros((3, 3)), 5)
    np.testing.assert_allclose(found.weights, 1.0, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_extreme_counts_and_distances_keep_the_conditions_of_optimality(scale):
    counts, _, _, products = case(4)
    counts = counts * np.array([1, 1e3, 1e6, 1])
    found = transfer_weights(counts, scale * products, 6)
    worth = found.quantity * np.array(found.shares)
    slope = (np.diag(1 / counts) + scale * products / 6) @ worth - 1  # of ½vᵀQv − 1ᵀv
    assert np.isfinite(worth).all()
    assert slope.min() > -1e-6
    assert np.abs(slope[worth > 0]).max() < 1e-6


@pytest.mark.parametrize(
    ("previous", "new", "delta", "pi", "expected"), [(300, 100, 0.1**2, 0.5, 0.643), (300, 100, 0.5**2, 0.75, 0.750)]
)
def test_fold_share_is_the_least_of_the_two_targets_measure(previous, new, delta, pi, expected):
    grid = np.linspace(0, 1, 1_000_001)
    k = grid**2 / previous + (1 - grid) ** 2 / new + delta * (pi * (1 - grid) ** 2 + (1 - pi) * grid**2)
    found = fold_share(previous, new, delta, pi)
    assert found == pytest.approx(grid[np.argmin(k)], abs=2e-6)
    assert found == pytest.approx(expected, abs=1e-3)


def test_fold_share_in_its_limits():
    assert fold_share(300, 100, 0.0, 0.9) == pytest.approx(0.75, rel=1e-14)  # counts alone
    assert fold_share(300, 100, 1e12, 0.9) == pytest.approx(0.9, abs=1e-9)  # the importance alone
    for delta in (0.0, 1e-3, 1.0):  # equal counts: the running mean
        assert fold_share(3 * 500, 500, delta, 3 / 4) == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_joint_shares_against_slsqp(seed):
    """The sum of all targets' measures with an explicit J, at a merge of parameters about another origin."""
    random = np.random.RandomState(seed)
    counts, theta, fisher, _ = case(seed)
    pi = random.dirichlet(np.ones(4)) if seed else None
    weights = np.full(4, 0.25) if pi is None else pi

    def objective(beta):
        merged = theta @ beta
        bias = [(merged - theta[:, m]) @ fisher @ (merged - theta[:, m]) for m in range(4)]
        return 1e3 * (6 * (beta**2 / counts).sum() + np.dot(weights, bias))

    moved = theta + random.randn(6, 1)
    found = np.array(joint_shares(counts, moved.T @ fisher @ moved, 6, pi))
    reference = slsqp(objective, 4)
    assert objective(found) <= reference.fun * (1 + 1e-9)
    np.testing.assert_allclose(found, reference.x, atol=5e-4)


def test_joint_shares_of_two_models_are_the_fold_share():
    counts, theta, fisher, products = case(8, sources=2)
    difference = theta[:, 0] - theta[:, 1]
    alpha = fold_share(counts[0], counts[1], difference @ fisher @ difference / 6, 0.7)
    np.testing.assert_allclose(joint_shares(counts, products, 6, [0.7, 0.3]), [alpha, 1 - alpha], rtol=1e-9)


def test_joint_shares_of_identical_models_go_by_samples():
    counts, theta, fisher, _ = case(8)
    same = np.repeat(theta[:, :1], 4, axis=1)
    np.testing.assert_allclose(joint_shares(counts, same.T @ fisher @ same, 6), counts / counts.sum(), rtol=1e-9)


def test_effective_dimension_is_the_number_of_parameters_of_a_regular_family():
    """20,000 Gaussian means in 7 dimensions from 50 samples: the standard error of what is estimated is 0.13."""
    random = np.random.RandomState(0)
    own, other = random.randn(20_000, 50, 7), random.randn(20_000, 50, 7)
    mean = own.mean(1, keepdims=True)
    own_loss, other_loss = (0.5 * ((x - mean) ** 2).sum(2).mean(1) for x in (own, other))
    found = 50 * (other_loss - own_loss)
    error = found.std() / np.sqrt(len(found))
    assert error < 0.15
    assert abs(found.mean() - 7) < 4 * error
    assert effective_dimension(50, 1.0, 1.25) == 12.5
    assert effective_dimension(50, 1.0, 0.9) == 1.0


@pytest.mark.parametrize(
    ("counts", "products", "dimension"),
    [
        ([0, 1], np.eye(2), 1),
        ([np.nan, 1], np.eye(2), 1),
        ([], np.eye(0), 1),
        ([1, 1], np.eye(3), 1),
        ([1, 1], -np.eye(2), 1),
        ([1, 1], np.full((2, 2), np.inf), 1),
        ([1, 1], np.eye(2), 0),
    ],
)
def test_wrong_arguments_are_told(counts, products, dimension):
    with pytest.raises(ValueError, match=r"positive|finite"):
        transfer_weights(counts, products, dimension)


def test_wrong_importance_is_told():
    with pytest.raises(ValueError, match="sum 1"):
        joint_shares([1, 1], np.eye(2), 1, [0.5, 0.6])
    with pytest.raises(ValueError, match="from 0 to 1"):
        fold_share(1, 1, 0.1, 1.5)
