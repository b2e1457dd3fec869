"""What the offline methods on singular vectors share: matrices go one by one, whole; the rest is averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from foldd.fusion.matrices import FACTORED
from foldd.fusion.method import Progress
from foldd.fusion.offline.average import running_mean
from foldd.fusion.offline.contract import Models, Piece, elementwise, size_of, weight_names


def matrixwise(
    models: Models, combine: Callable[[list[Tensor]], Tensor], progress: Progress, *, vectors: bool
) -> Iterator[Piece]:
    """Merges matrices and convolutions, the latter as [out, in·height·width]; all else is the mean.

    Matrices of a single row or column count as vectors: they have no spectrum.

    Args:
        combine: matrices [m, n] of all models → the merged one; float32.
        vectors: `combine` works on task vectors.
    """
    names = weight_names(models)
    sides = {name: _sides(models.shape(name)) for name in names}
    matrices = [name for name in names if models.role(name) in FACTORED and min(sides[name]) > 1]
    plain = sorted(set(names) - set(matrices), key=str.encode)
    yield from elementwise(
        models, lambda _n, _s, parts: running_mean(parts), lambda _: None, vectors=False, names=plain
    )
    work = {name: size_of(models, name) * (min(sides[name]) + 100) for name in matrices}
    total, done = sum(work.values()), 0
    for name in matrices:
        size = size_of(models, name)
        parts = [models.weights(model, name, 0, size) for model in range(models.count)]
        if vectors:
            base = models.base(name, 0, size)
            parts = [part.sub_(base) for part in parts]
        merged = combine([part.view(sides[name]) for part in parts]).reshape(-1)
        yield Piece(name, 0, merged.add_(base) if vectors else merged)
        done += work[name]
        progress(done / total)


def matrix_workspace(sizes: Sequence[int], floats: int, doubles: int) -> int:
    """Bytes for so many float32 and float64 copies of the largest tensor."""
    return max(sizes, default=0) * (4 * floats + 8 * doubles)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    columns = 1
    for n in shape[1:]:
        columns *= n
    return (shape[0] if shape else 1), columns
