"""`tsv-m` and its pure function against a float64 transcription with library decompositions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from foldd.base.network import Base
from foldd.core.base_spec import TensorSpec
from foldd.core.roles import Role
from foldd.fusion.matrices import polar_factor, svd
from foldd.fusion.state import MergeState
from foldd.fusion.task_vector import task_vector
from foldd.fusion.tsv_m import TsvM, tsv_merge


def plain_tsv(vectors: list[np.ndarray], ranks: list[int]) -> np.ndarray:
    us, ss, vs = [], [], []
    for vector, rank in zip(vectors, ranks, strict=True):
        u, s, vh = np.linalg.svd(vector.astype(np.float64), full_matrices=False)
        us.append(u[:, :rank])
        ss.append(s[:rank])
        vs.append(vh[:rank])

    def polar(matrix: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(matrix, full_matrices=False)
        return np.asarray(u @ vh)

    return np.asarray(polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.vstack(vs)))


def matrices(shape: tuple[int, int], count: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


@pytest.mark.parametrize("shape", [(24, 24), (40, 15), (15, 40)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_joint_merge_against_the_transcription(shape: tuple[int, int], count: int) -> None:
    vectors = matrices(shape, count)
    expected = plain_tsv([v.numpy() for v in vectors], [min(shape) // count] * count)
    np.testing.assert_allclose(tsv_merge(vectors).numpy(), expected, rtol=0, atol=1e-5)


def test_joint_merge_knows_no_order() -> None:
    a, b, c = matrices((12, 9), 3)
    torch.testing.assert_close(tsv_merge([a, b, c]), tsv_merge([c, a, b]), rtol=0, atol=1e-5)
    torch.testing.assert_close(tsv_merge([8 * a, 8 * b]), 8 * tsv_merge([a, b]), rtol=0, atol=1e-5)


def test_tasks_that_do_not_meet_are_summed() -> None:
    """Low-rank tasks with orthogonal rows and columns: nothing to make orthogonal, nothing to cut."""
    left, right = (torch.linalg.qr(m).Q for m in matrices((10, 6), 2))
    a, b = left[:, :3] @ right[:, :3].T * 2, left[:, 3:] @ right[:, 3:].T
    torch.testing.assert_close(tsv_merge([a, b]), a + b, rtol=0, atol=1e-5)


def test_the_same_task_twice_stays_that_task() -> None:
    """Its vectors are side by side twice; a library's polar factor would fill the gap with arbitrary ones."""
    left, right = matrices((10, 2), 2)
    vector = left @ right.T
    torch.testing.assert_close(tsv_merge([vector, vector]), vector, rtol=1e-5, atol=1e-5)


def test_without_rank_to_share_it_is_the_mean() -> None:
    vectors = matrices((2, 9), 3)
    torch.testing.assert_close(tsv_merge(vectors), (vectors[0] + vectors[1] + vectors[2]) / 3)


@pytest.mark.parametrize("shape", [(30, 30), (30, 12), (12, 30), (5, 1), (1, 1)])
def test_svd_and_polar_factor(shape: tuple[int, int]) -> None:
    (matrix,) = matrices(shape, 1)
    u, s, v = svd(matrix)
    rank = min(shape)
    torch.testing.assert_close(u * s @ v.T, matrix.double(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=1e-9)
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    library_u, _, library_vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(polar_factor(matrix).numpy(), library_u @ library_vh, rtol=0, atol=1e-8)


def test_svd_leaves_zero_directions_out() -> None:
    left, right = matrices((14, 3), 2)
    assert svd(left @ right.T).s.shape == (3,)  # the product is rounded to float32
    empty = svd(torch.zeros(4, 6))
    assert [part.shape for part in empty] == [(4, 0), (0,), (6, 0)]


def fold_all(method: TsvM, base: Base, checkpoints: list[Any]) -> MergeState:
    state = method.init(base)
    for checkpoint in checkpoints:
        state, _ = method.fold(state, checkpoint, seed=0)
    return state


def ranks(method: TsvM, smaller: int, count: int) -> list[int]:
    if not method.by_count:
        return [smaller // 2] * 2
    incoming = max(1, smaller // (count + 1))
    return [min(count * incoming, smaller - incoming), incoming]


@pytest.mark.parametrize("method", [TsvM(), TsvM(alpha=0.4), TsvM(by_count=True)], ids=repr)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_folds_against_the_transcription(method: TsvM, net: str, make: Any, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(net)
    checkpoints = [make(base, f"t{i}", i) for i in range(4)]
    vectors = [task_vector(base, c) for c in checkpoints]
    for total in (2, 3, 4):
        state = fold_all(method, base, checkpoints[:total])
        for name in base.weights:
            arrays = [v[name].double().numpy() for v in vectors[:total]]
            if base.role(name) in (Role.MATRIX, Role.CONVOLUTION):
                flat = [array.reshape(len(array), -1) for array in arrays]
                expected = flat[0]
                for count, new in enumerate(flat[1:], start=1):
                    expected = plain_tsv([expected, new], ranks(method, min(new.shape), count))
                expected = method.alpha * expected.reshape(arrays[0].shape)
            elif base.role(name) is Role.STATISTIC:
                continue
            else:
                expected = method.alpha * np.mean(arrays, axis=0)
            np.testing.assert_allclose(state.merged[name].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_count", [False, True])
def test_two_tasks_are_the_joint_merge(by_count: bool, cnn: Base, make: Any) -> None:
    checkpoints = [make(cnn, f"t{i}", i) for i in range(2)]
    vectors = [task_vector(cnn, c) for c in checkpoints]
    state = fold_all(TsvM(by_count=by_count), cnn, checkpoints)
    joint = tsv_merge([v["stem.weight"].reshape(4, 27) for v in vectors]).reshape(4, 3, 3, 3)
    assert torch.equal(state.merged["stem.weight"], joint)
    torch.testing.assert_close(state.merged["bn.weight"], (vectors[0]["bn.weight"] + vectors[1]["bn.weight"]) / 2)


def test_a_single_row_is_the_mean_by_count(mlp: Base, make: Any) -> None:
    tensors = {**mlp.spec.tensors, "position": TensorSpec((1, 6), Role.MATRIX)}
    base = replace(mlp, spec=msgspec.structs.replace(mlp.spec, tensors=tensors))
    checkpoints = [make(base, f"t{i}", i) for i in range(4)]
    mean = torch.stack([task_vector(base, c)["position"] for c in checkpoints]).mean(0)
    for method in (TsvM(), TsvM(by_count=True)):
        torch.testing.assert_close(fold_all(method, base, checkpoints).merged["position"], mean)
