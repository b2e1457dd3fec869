"""Two Kronecker products at once, against the whole system of equations."""

from __future__ import annotations

import torch
from torch import Tensor

from foldd.fusion.kronecker import solve_two


def positive(size: int, rank: int, floor: float, seed: int) -> Tensor:
    """[2, size, size], of a rank, plus a multiple of the identity."""
    x = torch.randn(2, size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / rank + floor * torch.eye(size, dtype=torch.float64)


def test_it_is_the_solution_of_the_whole_system() -> None:
    a, b = (positive(7, 9, 1e-3, 1), positive(7, 3, 0.0, 2)), (positive(4, 6, 0.1, 3), positive(4, 2, 0.1, 4))
    right = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = solve_two((a[0].clone(), b[0].clone()), (a[1], b[1]), right.clone())
    for group in range(2):
        # Of a matrix by rows: B·X·A is (B ⊗ Aᵀ)·x.
        system = sum(torch.kron(y[group], x[group].mT.contiguous()) for x, y in zip(a, b, strict=True))
        expected = torch.linalg.solve(system, right[group].reshape(-1)).reshape(4, 7)
        torch.testing.assert_close(got[group], expected, rtol=1e-4, atol=1e-4)


def test_without_outer_matrices_it_is_least_squares() -> None:
    a, eye = (positive(6, 8, 1e-3, 1), positive(6, 8, 0.0, 2)), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    right = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = solve_two((a[0].clone(), eye.clone()), (a[1], eye), right.clone())
    torch.testing.assert_close(got, right @ torch.linalg.inv(a[0] + a[1]), rtol=1e-5, atol=1e-5)


def test_what_only_one_side_knows_is_that_side_s() -> None:
    """Inputs and outputs of which the second pair knows nothing keep the first pair's answer."""
    a = (torch.diag(torch.tensor([1.0, 1, 1e-9])).double(), torch.diag(torch.tensor([0.0, 0, 1])).double())
    b = torch.eye(2, dtype=torch.float64)
    one, two = (torch.randn(2, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    right = one @ a[0] + two @ a[1]
    got = solve_two((a[0][None].clone(), b[None].clone()), (a[1][None], b[None]), right[None])[0]
    torch.testing.assert_close(got[:, :2], one[:, :2])
    torch.testing.assert_close(got[:, 2], two[:, 2])
