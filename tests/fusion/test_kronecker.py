"""Two Kronecker products at once, against the whole system of equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldd.fusion import kronecker
from foldd.fusion.kronecker import Term, solve_two


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(count: int, size: int, rank: int, floor: float, seed: int) -> Tensor:
    """[count, size, size], of a rank, plus a multiple of the identity."""
    x = random(count, size, rank, seed=seed)
    return x @ x.mT / rank + floor * torch.eye(size, dtype=torch.float64)


def terms(modes: int, outputs: int, inputs: int, rank: int) -> list[Term]:
    """Two groups; the second side knows nothing of most inputs."""
    shape = (2 * modes, outputs, inputs)
    return [
        Term(
            positive(2 * modes, inputs, r, floor, 10 * i),
            positive(2, outputs, rank, 0.1, 10 * i + 1),
            random(*shape, seed=10 * i + 2),
            random(*shape, seed=10 * i + 3),
        )
        for i, (r, floor) in enumerate([(inputs + 2, 1e-2), (rank, 0.0)])
    ]


def solved(sides: list[Term]) -> Tensor:
    return solve_two(*(Term(t.inputs.clone(), t.outputs.clone(), t.change, t.missed) for t in sides))


def whole(sides: list[Term]) -> Tensor:
    """The same by the system of all unknowns. Of a matrix by rows: B·X·A is (B ⊗ Aᵀ)·x."""
    answer = torch.zeros_like(sides[0].change)
    modes = len(answer) // len(sides[0].outputs)
    for i in range(len(answer)):
        systems = [torch.kron(t.outputs[i // modes], t.inputs[i].mT.contiguous()) for t in sides]
        right = sum(t.outputs[i // modes] @ (t.change[i] @ t.inputs[i] + t.missed[i]) for t in sides)
        answer[i] = torch.linalg.solve(sum(systems), right.reshape(-1)).reshape(answer[i].shape)
    return answer


@pytest.mark.parametrize("modes", [1, 3])
def test_it_is_the_solution_of_the_whole_system(modes: int) -> None:
    sides = terms(modes, 4, 7, 3)
    torch.testing.assert_close(solved(sides), whole(sides), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modes", [1, 3])
def test_inputs_by_their_root_are_the_same_inputs(modes: int) -> None:
    """Of the second side, three rows of seven numbers instead of 49; against the whole system."""
    one, two = terms(modes, 4, 7, 3)
    root = random(2 * modes, 3, 7, seed=20)
    expected = whole([one, Term(root.mT @ root, two.outputs, two.change, two.missed)])
    by_root = solved([one, Term(root, two.outputs, two.change, two.missed)])
    assert float((by_root - expected).norm()) < 1e-5 * float(expected.norm())


def test_a_model_that_both_sides_want_comes_out() -> None:
    sides = terms(2, 4, 7, 3)
    change = sides[0].change
    agreed = [Term(t.inputs, t.outputs, change, torch.zeros_like(change)) for t in sides]
    torch.testing.assert_close(solved(agreed), change, rtol=1e-5, atol=1e-5)


def test_what_only_one_side_knows_is_that_side_s() -> None:
    """Inputs of which the second side knows nothing keep the first one's answer, and the other way round."""
    a = (torch.diag(torch.tensor([1.0, 1, 1e-9])).double(), torch.diag(torch.tensor([0.0, 0, 1])).double())
    b = torch.eye(2, dtype=torch.float64)
    one, two = random(2, 3, seed=1), random(2, 3, seed=2)
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    got = solve_two(
        *(Term(x[None].clone(), b[None].clone(), c[None], zero) for x, c in zip(a, (one, two), strict=True))
    )
    torch.testing.assert_close(got[0, :, :2], one[:, :2])
    torch.testing.assert_close(got[0, :, 2], two[:, 2])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a matrix of a dozen rows were a wide one."""
    monkeypatch.setattr(kronecker, "EXACT", 8)


def test_outside_of_the_subspace_a_multiple_of_the_identity_is_exact(narrow: None) -> None:
    """Gradients in three directions of twelve, and the rest alike: nothing is lost."""
    directions = positive(2, 12, 3, 0.0, 8)
    sides = [
        Term(t.inputs, (2 - i) * directions + (2 + i) * 1e-3 * torch.eye(12), t.change, t.missed)
        for i, t in enumerate(terms(2, 12, 14, 11))
    ]
    expected = whole(sides)
    assert float((solved(sides) - expected).norm()) < 1e-3 * float(expected.norm())


def test_with_subspaces_it_is_the_minimum_of_what_they_measure(narrow: None) -> None:
    """Whatever is lost of the matrices: the answer is exact for those that stand for them."""
    sides = terms(2, 12, 14, 11)
    basis = kronecker._dominant(sides[0].outputs + sides[1].outputs, 4).double()
    inside = basis @ basis.mT
    stand_ins = []
    for t in sides:
        kept = inside @ t.outputs @ inside
        trace = (t.outputs - kept).diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        stand_ins.append(Term(t.inputs, kept + trace / 8 * (torch.eye(12) - inside), t.change, t.missed))
    expected = whole(stand_ins)
    assert float((solved(sides) - expected).norm()) < 1e-3 * float(expected.norm())
