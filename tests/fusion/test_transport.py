"""The Sinkhorn divergence against exact transport, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from foldd.fusion.transport import self_plan, sinkhorn_divergence, transport_plan


def cloud(count: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cost_of(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


@pytest.mark.parametrize(("count", "width", "scale"), [(16, 2, 1.0), (16, 192, 1.0), (16, 192, 3.0), (40, 10, 1.0)])
def test_small_blur_gives_exact_transport(count: int, width: int, scale: float) -> None:
    x, y = cloud(count, width, 0, scale), cloud(count, width, 1, scale)
    cost = cost_of(x, y)
    rows, columns = linear_sum_assignment(cost.numpy())
    exact = float(cost[rows, columns].mean())
    # Entropy adds at most ε·log n to each term.
    assert float(sinkhorn_divergence(x, y, blur=0.02)) == pytest.approx(exact, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("epsilon", [0.0025, 0.1, 10.0])
@pytest.mark.parametrize("shape", [(16, 16), (7, 12), (1, 3)])
def test_plan_has_the_right_weights_and_form(epsilon: float, shape: tuple[int, int]) -> None:
    plan = transport_plan(cost_of(cloud(shape[0], 4, 2), cloud(shape[1], 4, 3)), epsilon)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((shape[0],), 1 / shape[0], dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((shape[1],), 1 / shape[1], dtype=torch.float64))


def test_plan_against_a_plain_sinkhorn() -> None:
    cost, epsilon = cost_of(cloud(5, 3, 4), cloud(6, 3, 5)), 0.5
    kernel, u, v = torch.exp(-cost / epsilon), torch.ones(5, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for _ in range(5000):
        v = (1 / 6) / (kernel.T @ u)
        u = (1 / 5) / (kernel @ v)
    torch.testing.assert_close(transport_plan(cost, epsilon), u[:, None] * kernel * v, rtol=1e-8, atol=1e-12)


def test_self_plan_is_the_plan_between_a_cloud_and_itself() -> None:
    cost = cost_of(cloud(9, 3, 30), cloud(9, 3, 30))
    torch.testing.assert_close(self_plan(cost, 2.0), transport_plan(cost, 2.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("width", "scale"), [(1, 1.0), (192, 0.005)])
def test_self_plan_converges_at_the_published_blur(width: int, scale: float) -> None:
    cost, epsilon = cost_of(cloud(32, width, 31, scale), cloud(32, width, 31, scale)), 0.0025
    plan = self_plan(cost, epsilon)
    assert torch.equal(plan, plan.T)
    # Optimal means: log P + C/ε is a sum of a row's and a column's potential.
    potentials = torch.log(plan.clamp(min=1e-300)) + cost / epsilon
    kept = plan > 1e-12
    diagonal = 0.5 * torch.diag(potentials)
    error = (potentials - diagonal[:, None] - diagonal[None, :])[kept]
    assert float(error.abs().max()) < 1e-6


def test_value_against_the_dual() -> None:
    """OT_ε from its plan equals ⟨a, f⟩ + ⟨b, g⟩ of a plain log-domain solver."""
    x, y, blur = cloud(9, 3, 6), cloud(9, 3, 7), 0.5

    def dual(cost: Tensor) -> float:
        n, epsilon = len(cost), blur**2
        f = torch.zeros(n, dtype=torch.float64)
        for _ in range(3000):
            g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon, 0) + epsilon * torch.tensor(float(n)).log()
            f = -epsilon * torch.logsumexp((g[None] - cost) / epsilon, 1) + epsilon * torch.tensor(float(n)).log()
        return float((f + g).mean())

    expected = dual(cost_of(x, y)) - 0.5 * dual(cost_of(x, x)) - 0.5 * dual(cost_of(y, y))
    assert float(sinkhorn_divergence(x, y, blur=blur)) == pytest.approx(expected, rel=1e-6)


def test_equal_clouds_are_at_zero_with_no_gradient() -> None:
    x = cloud(16, 8, 8, 5.0).requires_grad_()
    value = sinkhorn_divergence(x, x.detach()[torch.randperm(16, generator=torch.Generator().manual_seed(0))])
    value.backward()
    assert x.grad is not None
    assert abs(float(value.detach())) < 1e-9
    assert float(x.grad.abs().max()) < 1e-9


def test_symmetric_and_blind_to_order() -> None:
    x, y = cloud(12, 6, 9, 2.0), cloud(12, 6, 10, 2.0)
    value = float(sinkhorn_divergence(x, y))
    shuffled = x[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    assert float(sinkhorn_divergence(y, x)) == pytest.approx(value, rel=1e-6)
    assert float(sinkhorn_divergence(shuffled, y)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("blur", [0.05, 0.5, 3.0])
def test_never_negative(blur: float) -> None:
    for seed in range(6):
        x = cloud(10, 4, 20 + seed)
        y = x + 0.1 * cloud(10, 4, 40 + seed)
        assert float(sinkhorn_divergence(x, y, blur=blur)) > 0


def test_scales_as_a_squared_distance() -> None:
    x, y = cloud(8, 4, 11), cloud(8, 4, 12)
    small, large = sinkhorn_divergence(x, y, blur=0.1), sinkhorn_divergence(10 * x, 10 * y, blur=1.0)
    assert float(large) == pytest.approx(100 * float(small), rel=1e-9)


@pytest.mark.parametrize("blur", [0.5, 1.0])
def test_gradient_against_finite_differences(blur: float) -> None:
    x, y = cloud(6, 3, 13).requires_grad_(), cloud(7, 3, 14)
    sinkhorn_divergence(x, y, blur=blur).backward()
    assert x.grad is not None
    expected = torch.zeros_like(x)
    step = 1e-5
    with torch.no_grad():
        for i in range(6):
            for j in range(3):
                moved = torch.zeros_like(x)
                moved[i, j] = step
                up, down = sinkhorn_divergence(x + moved, y, blur=blur), sinkhorn_divergence(x - moved, y, blur=blur)
                expected[i, j] = (up - down) / (2 * step)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


def test_gradient_is_there_at_the_published_blur_on_unnormalised_features() -> None:
    """POT's default solver underflows here and leaves a plan, a loss and a gradient of zero."""
    x, y = cloud(16, 192, 15).float().requires_grad_(), (cloud(16, 192, 16) + 0.3).float()
    assert float(cost_of(x.detach(), y).min()) > 100  # so ε is a hundred-thousandth of the costs
    value = sinkhorn_divergence(x, y)
    value.backward()
    assert x.grad is not None
    assert float(value.detach()) > 100
    # At an optimal matching π of single points the gradient is (x − y_π)/n.
    plan = transport_plan(cost_of(x.detach().double(), y.double()), 0.0025)
    expected = (x.detach() - y[plan.argmax(1)]) / 16
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


def test_descending_the_gradient_moves_one_cloud_onto_the_other() -> None:
    x, y = cloud(16, 32, 17, 3.0).requires_grad_(), cloud(16, 32, 18, 3.0)
    first = float(sinkhorn_divergence(x.detach(), y))
    for _ in range(20):
        x.grad = None
        sinkhorn_divergence(x, y).backward()
        with torch.no_grad():
            assert x.grad is not None
            x -= 8.0 * x.grad
    assert float(sinkhorn_divergence(x.detach(), y)) < 1e-3 * first


def test_infinite_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        transport_plan(torch.tensor([[1.0, float("nan")]]), 0.1)
