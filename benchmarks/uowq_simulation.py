"""UOWQ's closed form in simulation: families whose divergence is known, with weights beside the best ones.

Repetitions are independent; the same draws serve every weight of a case, so differences are paired. Gaussian cases
draw sample means at once (the mean of n samples is Gaussian itself, and the weighted estimate is a weighted mean); the
logistic one draws every sample and finds each weighted maximum of the likelihood by Newton's method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldd.fusion.transfer_weights import kl_measure, transfer_weights

Array = NDArray[np.float64]
ERROR = 0.005  # largest standard error, as a share of the measured divergence
NODES, MASSES = np.polynomial.hermite_e.hermegauss(60)  # E f(x) of a standard Gaussian x
MASSES = MASSES / MASSES.sum()
CHUNK = 2000  # repetitions of the logistic case at a time: 2,000 × 1,000 samples
NEWTON_STEPS = 7


@dataclass(frozen=True, eq=False)
class Case:
    """A target with `target` samples, sources with `counts` samples at the distances `theta` [d, K], J [d, d].

    `draw` gives, for each row of weights [W, K], the divergence of every repetition: [W, repetitions].
    """

    name: str
    target: int
    counts: tuple[int, ...]
    theta: Array
    fisher: Array
    draw: Callable[[Case, Array, int, np.random.RandomState], Array]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each case and weight; 100,000 repetitions, in the quick form 20,000 of the logistic case."""
    for case in CASES:
        repetitions = 20_000 if quick and case.draw is _logistic else 100_000
        products = case.theta.T @ case.fisher @ case.theta
        dimension = len(case.fisher)
        best = np.array(transfer_weights(case.counts, products, dimension).weights)
        kinds = {"0": 0 * best, "w*/2": best / 2, "w*": best, "2w*": 2 * best, "1": np.ones_like(best)}
        values = case.draw(case, np.array(list(kinds.values())), repetitions, np.random.RandomState(0))
        at_best = values[list(kinds).index("w*")]
        for (kind, weights), drawn in zip(kinds.items(), values, strict=True):
            beyond = drawn - at_best
            spread = beyond.std() / repetitions**0.5
            yield {
                "part": "simulation", "case": case.name, "weight": kind,
                "weights": " ".join(f"{w:.3f}" for w in weights),
                "kl": float(drawn.mean()), "standard_error": float(drawn.std() / repetitions**0.5),
                "kl_formula": kl_measure(case.target, case.counts, weights.tolist(), products, dimension),
                "beyond_best_in_errors": float(beyond.mean() / spread) if spread else None,
                "repetitions": repetitions,
            }  # fmt: skip


def failures(measured: Sequence[dict[str, Any]], quick: bool) -> list[str]:
    """What the simulation was to show and did not: w* below half and double of it by over 3 (unpaired) errors."""
    found = []
    for case in dict.fromkeys(row["case"] for row in measured):
        by = {row["weight"]: row for row in measured if row["case"] == case}
        best = by["w*"]
        if not quick and best["standard_error"] > ERROR * best["kl"]:
            found.append(f"{case}: the standard error is over {ERROR:.1%} of the divergence.")
        for other in ("w*/2", "2w*"):
            error = np.hypot(best["standard_error"], by[other]["standard_error"])
            if not by[other]["kl"] - best["kl"] > 3 * error:
                found.append(f"{case}: w* does not beat {other} outside the error.")
    return found


def _gaussian(case: Case, weights: Array, repetitions: int, random: np.random.RandomState) -> Array:
    """A mean with known precision J: the divergence is ½(θ̂ − θ₀)ᵀJ(θ̂ − θ₀)."""
    dimension = len(case.fisher)
    root = np.linalg.cholesky(np.linalg.inv(case.fisher)).T
    own = random.randn(repetitions, dimension) @ root / case.target**0.5
    means = [
        offset + random.randn(repetitions, dimension) @ root / count**0.5
        for count, offset in zip(case.counts, case.theta.T, strict=True)
    ]
    result = []
    for row in weights:
        worth = row * case.counts
        estimate = case.target * own + sum(v * mean for v, mean in zip(worth, means, strict=True))
        estimate /= case.target + worth.sum()
        result.append(0.5 * ((estimate @ case.fisher) * estimate).sum(1))
    return np.array(result)


LOGISTIC_TARGET = 0.5  # θ₀ of the logistic case; x is standard Gaussian


def _logistic(case: Case, weights: Array, repetitions: int, random: np.random.RandomState) -> Array:
    """P(y = 1 | x) = σ(θx): the weighted maximum of the likelihood, exactly; the divergence by quadrature over x."""
    (count,), ((offset,),) = case.counts, case.theta
    truth = np.repeat([LOGISTIC_TARGET, LOGISTIC_TARGET + offset], [case.target, count]).astype(np.float32)
    result = []
    for start in range(0, repetitions, CHUNK):
        size = min(CHUNK, repetitions - start)
        x = random.standard_normal((size, len(truth))).astype(np.float32)
        y = (random.random_sample(x.shape) < _sigmoid(x * truth)).astype(np.float32)
        found = []
        for row in weights:
            w = np.repeat([1.0, row[0]], [case.target, count]).astype(np.float32)
            theta = np.full(size, LOGISTIC_TARGET)
            for _ in range(NEWTON_STEPS):
                p = _sigmoid(x * theta[:, None].astype(np.float32))
                slope = np.einsum("rn,n,rn->r", x, w, y - p, dtype=np.float64)
                curve = np.einsum("rn,rn,n->r", x * x, p * (1 - p), w, dtype=np.float64)
                theta = theta + slope / curve
            found.append(theta)
        result.append(found)
    estimates = np.concatenate(result, axis=1)  # [W, repetitions]
    at = _sigmoid(LOGISTIC_TARGET * NODES)
    divergence = np.zeros_like(estimates)
    for node, mass, p in zip(NODES, MASSES, at, strict=True):
        if mass > 1e-12:  # the outermost nodes weigh nothing
            q = _sigmoid(estimates * node)
            divergence += mass * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    return divergence


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def _logistic_fisher() -> Array:
    p = _sigmoid(LOGISTIC_TARGET * NODES)
    return np.array([[(MASSES * p * (1 - p) * NODES**2).sum()]])


def _full(dimension: int) -> Array:
    root = np.random.RandomState(1).randn(dimension, dimension)
    return np.asarray(root @ root.T / dimension + 0.2 * np.eye(dimension))


CASES = (
    Case("gaussian 1-d", 50, (400,), np.array([[0.08]]), np.array([[1.0]]), _gaussian),
    Case(
        "gaussian 6-d, 3 sources", 40, (100, 400, 900), 0.12 * np.random.RandomState(2).randn(6, 3), _full(6), _gaussian
    ),
    Case("logistic 1-d", 200, (800,), np.array([[0.12]]), _logistic_fisher(), _logistic),
)
