"""The debiased Sinkhorn divergence between two sets of features, with a gradient that is right and cheap."""

from __future__ import annotations

import math

import ot
import torch
from torch import Tensor

BLUR = 0.05
SHRINK = 0.5  # of ε from stage to stage; 0.25 is too bold for dense low-dimensional clouds
STAGE_ITERATIONS = 10  # per stage of ε-scaling
FINAL_ITERATIONS = 300  # at the target ε, at most
SELF_ITERATIONS = 50  # of a cloud with itself
TOLERANCE = 1e-9  # of the weights, L2


def sinkhorn_divergence(x: Tensor, y: Tensor, *, blur: float = BLUR) -> Tensor:
    """S_ε(x, y) = OT_ε(x, y) − ½·OT_ε(x, x) − ½·OT_ε(y, y) of two uniformly weighted point clouds.

    The cost is ½|x − y|², ε = blur²: what geomloss's `SamplesLoss("sinkhorn", p=2, blur=blur)` computes
    (Feydy et al. 2019, equation 3). OT_ε(x, y) = min ⟨P, C⟩ + ε·KL(P ‖ a⊗b).

    At the minimum OT_ε changes with the cost as ⟨P, dC⟩ (the envelope theorem), so the plans are found on detached
    costs and only ⟨P, C(x, y)⟩ is differentiated. POT's default solver underflows at such an ε on unnormalised
    features and returns a plan, hence a gradient, of zeros; see `transport_plan`.

    Args:
        x: features [n, width]. y: features [m, width]. Gradients flow into both.

    Returns:
        A scalar of x's type, 0 for equal clouds and positive otherwise.
    """
    return _entropic(x, y, blur) - 0.5 * _entropic(x, x, blur) - 0.5 * _entropic(y, y, blur)


def transport_plan(cost: Tensor, regularisation: float) -> Tensor:
    """The entropic plan between uniform weights: [n, m] float64, its rows sum to 1/n and its columns to 1/m.

    Sinkhorn's iterations in the log domain (POT), with ε-scaling: solved at ε of the order of the largest cost first,
    where a few iterations do, then at ever smaller ones, each starting from the last potentials (Schmitzer 2019,
    section 3). How many iterations there are depends on the costs alone, never on a clock. What violation of the
    weights is left is then rounded away (Altschuler et al. 2017, algorithm 2).

    Args:
        cost: [n, m], any float type; not differentiated.
        regularisation: ε > 0, in units of the cost.

    Raises:
        ValueError: a cost is not finite.
    """
    cost = _checked(cost)
    rows = cost.new_full((cost.shape[0],), 1 / cost.shape[0])
    columns = cost.new_full((cost.shape[1],), 1 / cost.shape[1])
    plan, potentials, last = torch.outer(rows, columns), None, 1.0
    for epsilon in _ladder(cost, regularisation):
        if potentials is not None:  # POT's potentials are in units of ε
            potentials = (potentials[0] * (last / epsilon), potentials[1] * (last / epsilon))
        plan, log = ot.bregman.sinkhorn_log(
            rows,
            columns,
            cost,
            epsilon,
            numItermax=FINAL_ITERATIONS if epsilon == regularisation else STAGE_ITERATIONS,
            stopThr=TOLERANCE,
            warn=False,
            log=True,
            warmstart=potentials,
        )
        potentials, last = (log["log_u"], log["log_v"]), epsilon
    return _round(plan)


def self_plan(cost: Tensor, regularisation: float) -> Tensor:
    """The plan of a cloud with itself: [n, n] float64, symmetric, rows and columns sum to 1/n.

    Both potentials are the same here, and halfway steps f ← ½·(f + T f) reach them in tens of iterations, at any ε
    and from zero, where alternating ones need thousands (Feydy et al. 2019, section 3.1).

    Args:
        cost: [n, n], symmetric. regularisation: ε > 0, in units of the cost.

    Raises:
        ValueError: a cost is not finite.
    """
    cost = _checked(cost) / regularisation
    log_count = math.log(len(cost))
    potential = torch.zeros(len(cost), dtype=cost.dtype)  # in units of ε
    for _ in range(SELF_ITERATIONS):
        potential = 0.5 * (potential - torch.logsumexp(potential - cost, 1) + log_count)
    plan = _round(torch.exp(potential[:, None] + potential[None, :] - cost - 2 * log_count))
    return 0.5 * (plan + plan.T)


def _ladder(cost: Tensor, regularisation: float) -> list[float]:
    """ε from the largest cost down to the target, which comes last."""
    ladder, epsilon = [], float(cost.max())
    while epsilon > regularisation:
        ladder.append(epsilon)
        epsilon *= SHRINK
    return [*ladder, regularisation]


def _checked(cost: Tensor) -> Tensor:
    cost = cost.detach().double()
    if not bool(cost.isfinite().all()):
        raise ValueError("transport costs must be finite")
    return cost


def _entropic(x: Tensor, y: Tensor, blur: float) -> Tensor:
    """OT_ε(x, y): its value is exact for the plan found, its gradient the envelope theorem's."""
    difference = x[:, None, :] - y[None, :, :]
    # Not |x|² + |y|² − 2xy: in float32 that loses small distances between large features.
    cost = 0.5 * difference.square().sum(-1)
    epsilon = blur**2
    plan = (self_plan if x is y else transport_plan)(cost, epsilon)
    uniform = 1.0 / (plan.shape[0] * plan.shape[1])
    divergence = float(torch.xlogy(plan, plan / uniform).sum())
    return (plan.to(cost.dtype) * cost).sum() + epsilon * divergence


def _round(plan: Tensor) -> Tensor:
    """The nearest-by plan whose rows and columns have exactly the uniform weights."""
    rows, columns = 1.0 / plan.shape[0], 1.0 / plan.shape[1]
    plan = plan * (rows / plan.sum(1)).clamp(max=1.0)[:, None]
    plan = plan * (columns / plan.sum(0)).clamp(max=1.0)[None, :]
    row_rest, column_rest = (rows - plan.sum(1)).clamp(min=0), (columns - plan.sum(0)).clamp(min=0)
    rest = float(row_rest.sum())
    return plan + torch.outer(row_rest, column_rest) / rest if rest > 0 else plan
