"""How much each source counts, by UOWQ (arXiv 2601.10779): the formulas alone, in float64, without a network.

A target with N₀ samples and parameters θ₀ borrows from K sources with N_i samples and parameters θ_i. A source that
counts more lowers the variance of the estimate and pulls it away from the target. The expected divergence K from the
target's distribution is least at the weights given here; all samples of every source are used at them (equation 9).

Everything comes down to one K × K matrix, M = ΘᵀJΘ: the inner products of the discrepancies Θ = [θ_i − θ₀] under the
target's Fisher information J (foldd.fusion.fisher computes it), and the number of dimensions d.

**d**: the theory is about maximum likelihood in a regular family, whose estimate has variance J⁻¹/N in each of its d
dimensions. As published d is the number of trained parameters. A network that is tuned for a few epochs does not use
them all: M/d then is nothing beside 1/N_i, and every weight is 1. `effective_dimension` estimates how many it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class TransferWeights:
    """The optimum of Theorem 5.

    Attributes:
        weights: w_i of equation (25), the weight of one sample of source i beside 1 of a target sample; [K], from 0 on.
            May exceed 1: sources on opposite sides of the target cancel each other's bias.
        shares: α_i of (23), what part of all that is transferred comes from source i; [K], of sum 1.
        quantity: s of (24), how many target samples the sources are worth.
    """

    weights: tuple[float, ...]
    shares: tuple[float, ...]
    quantity: float


def source_weight(samples: float, discrepancy: float) -> float:
    """w of one source with `samples` samples: 1 / (1 + N·t), equations (10) and, for d dimensions, (12).

    Args:
        discrepancy: t = (θ₁ − θ₀)ᵀJ(θ₁ − θ₀)/d.

    Raises:
        ValueError: no samples, or a negative discrepancy.
    """
    _check([samples], np.array([[discrepancy]]), 1.0)
    return 1.0 / (1.0 + samples * discrepancy)


def transfer_weights(samples: Sequence[float], products: Matrix, dimension: float) -> TransferWeights:
    """The weights of K sources, equations (22) to (25).

    The quadratic programme min αᵀQα over the simplex and s = 1/(α*ᵀQα*), with Q = diag(1/N) + M/d, have the same
    conditions of optimality as one problem in v = s·α, non-negative least squares: min ½vᵀQv − 1ᵀv over v ≥ 0. It has
    one solution, since Q is positive definite.

    Args:
        samples: N_i, [K].
        products: M = ΘᵀJΘ, [K, K], positive semi-definite.
        dimension: d.

    Raises:
        ValueError: a shape, a count or the matrix is wrong.
    """
    counts = _check(samples, products, dimension)
    root = np.sqrt(counts)
    # In v/√N the matrix is 1 + (something positive): well conditioned, whatever the counts are.
    scaled = np.eye(len(counts)) + root[:, None] * (products + products.T) * root / (2 * dimension)
    lower = np.linalg.cholesky(scaled)
    solution, _ = nnls(lower.T, solve_triangular(lower, root, lower=True))
    worth = root * solution
    total = float(worth.sum())
    return TransferWeights(tuple((worth / counts).tolist()), tuple((worth / total).tolist()), total)


def kl_measure(
    target: float, samples: Sequence[float], weights: Sequence[float], products: Matrix, dimension: float
) -> float:
    """K of equation (16) in nats, to first order, at any weights; (7) and (11) for one source.

    Args:
        target: N₀.
        samples: n_i that are used, [K].
        weights: w_i, [K].
    """
    counts = _check(samples, products, dimension)
    worth = np.asarray(weights, np.float64) * counts
    total = float(worth.sum())
    spread = target + float((worth**2 / counts).sum())
    return 0.5 * (dimension * spread + float(worth @ products @ worth)) / (target + total) ** 2


def joint_shares(
    samples: Sequence[float], products: Matrix, dimension: float, importance: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Shares of M models in one merged model that serves all their tasks.

    Not in the paper, which knows one target; its measure, summed over targets: Σ π_m K_m. For a merge Σ β_i θ_i that
    is ½ (d·Σ β_i²/N_i + (β − π)ᵀG(β − π)) and a constant, with G_ij = τ_iᵀJτ_j about any origin. On the simplex
    β − π = (I − π1ᵀ)β, so this is (23) again with the weighted centre of all models in the place of the target.

    Args:
        samples: N_m, [M].
        products: G, [M, M].
        importance: π, [M], of sum 1; 1/M each where None.

    Raises:
        ValueError: as `transfer_weights`, or π is not on the simplex.
    """
    number = len(samples)
    pi = np.full(number, 1 / number) if importance is None else np.asarray(importance, np.float64)
    if pi.shape != (number,) or pi.min() < 0 or abs(pi.sum() - 1) > 1e-9:
        raise ValueError(f"The importance of {number} tasks must be as many shares of sum 1, it is {pi.tolist()}.")
    centre = np.eye(number) - np.outer(pi, np.ones(number))
    return transfer_weights(samples, centre.T @ products @ centre, dimension).shares


def fold_share(previous: float, new: float, discrepancy: float, importance: float) -> float:
    """α of a fold θ = α·θ_previous + (1 − α)·θ_new: (1/N_new + δπ) / (1/N_new + 1/N_previous + δ).

    `joint_shares` of two models, written out: N_previous samples were folded before, whose tasks have the importance π.
    At δ = 0 the counts of samples decide, at large δ the importance alone. To take the incoming task as the only
    target, as equation (10) reads, would drop the old tasks where the new one differs most.

    Args:
        discrepancy: δ = (θ_previous − θ_new)ᵀJ(θ_previous − θ_new)/d.
        importance: π of the old tasks; (t − 1)/t for t tasks in all.

    Raises:
        ValueError: no samples, a negative discrepancy, or π outside 0…1.
    """
    _check([previous, new], np.diag([discrepancy, discrepancy]), 1.0)
    if not 0 <= importance <= 1:
        raise ValueError(f"The importance must be from 0 to 1, it is {importance}.")
    return (1 / new + discrepancy * importance) / (1 / new + 1 / previous + discrepancy)


def effective_dimension(samples: int, training_loss: float, held_out_loss: float) -> float:
    """How many dimensions a trained model really has: N · (loss on held-out samples − loss on its own), at least 1.

    Not in the paper. In a regular family of d dimensions both losses differ from the true parameter's by d/2N, to
    either side; that is how Akaike's criterion (1974) counts parameters, read backwards.

    Args:
        samples: N, what the model was trained on.
        training_loss, held_out_loss: mean negative log-likelihood in nats, on these samples and on others.
    """
    return max(1.0, samples * (held_out_loss - training_loss))


def _check(samples: Sequence[float], products: Matrix, dimension: float) -> Matrix:
    counts = np.asarray(samples, np.float64)
    if counts.ndim != 1 or not len(counts) or not np.isfinite(counts).all() or counts.min() <= 0:
        raise ValueError(f"Sample counts must be positive, they are {list(samples)}.")
    if products.shape != (len(counts), len(counts)) or not np.isfinite(products).all() or products.diagonal().min() < 0:
        raise ValueError(
            f"The inner products of {len(counts)} discrepancies must be a finite matrix of that size with a diagonal "
            f"from 0 on, they are {list(products.shape)}."
        )
    if not dimension > 0:
        raise ValueError(f"The number of dimensions must be positive, it is {dimension}.")
    return counts
