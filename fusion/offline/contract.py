"""What an offline method is: N models go in side by side, the merged model comes out in pieces.

Nothing here holds a model. Tensors are read piece by piece as flat float32, so that an elementwise method needs the
same few megabytes whatever it merges, and a spectral one a few times its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from foldd.base.network import Base
from foldd.core.errors import BadSetup
from foldd.core.roles import Role
from foldd.fusion.method import Progress
from foldd.fusion.state import HeadTensors
from foldd.fusion.statistics import MEAN, VARIANCE, next_mean, next_variance

PIECE = 1 << 19  # elements: 2 MiB a model stay in a processor's cache while they are merged


class Piece(NamedTuple):
    """A run of one merged tensor: `values` are its elements start … start + len(values), flat float32."""

    name: str
    start: int
    values: Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `fisher`, `regmean` and `uowq` need beside weights: the captured base, and of each model head, inputs and
    count of training samples, None where it does not tell."""

    network: Base
    heads: Sequence[HeadTensors]
    inputs: Sequence[Tensor]  # [n, *input_shape]
    samples: Sequence[int | None]


class Models(Protocol):
    """N models of one architecture, and their base where there is one.

    Attributes:
        count: N, at least 1.
        names: floating-point tensors that all of them have, statistics included, in name order.
        has_base: θ⁰ can be read.
        calibration: None but for models that came as foldd bundles with inputs, beside a foldd base.
    """

    count: int
    names: Sequence[str]
    has_base: bool
    calibration: Calibration | None

    def role(self, name: str) -> Role: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def base(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start … stop of θ⁰'s tensor: fresh, flat, float32."""
        ...

    def weights(self, model: int, name: str, start: int, stop: int) -> Tensor:
        """The same of one model."""
        ...


class OfflineMethod(Protocol):
    """A frozen strategy that merges N models; equal models, options and thread count give equal bits.

    Attributes:
        needs_base: it works on task vectors θ_i − θ⁰.
        needs_calibration: see `Calibration`.
        is_elementwise: it merges each element by itself, in small pieces.
    """

    name: ClassVar[str]
    needs_base: ClassVar[bool]
    needs_calibration: ClassVar[bool]
    is_elementwise: ClassVar[bool]

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        """The merged tensors but for statistics, each whole, in any order."""
        ...

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        """Bytes it holds at a time, about, for tensors of these many elements and `count` models."""
        ...


def merge(method: OfflineMethod, models: Models, progress: Progress) -> Iterator[Piece]:
    """All merged tensors: what the method gives, and BatchNorm's statistics merged as moments."""
    progress(0.0)
    yield from _moments(models)
    yield from method.merge(models, progress)
    progress(1.0)


def weight_names(models: Models) -> list[str]:
    """All names but statistics."""
    return [name for name in models.names if models.role(name) is not Role.STATISTIC]


def size_of(models: Models, name: str) -> int:
    count = 1
    for n in models.shape(name):
        count *= n
    return count


def spans(models: Models, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of all pieces of some tensors."""
    for name in names:
        size = size_of(models, name)
        for start in range(0, size, PIECE):
            yield name, start, min(start + PIECE, size)


def elementwise(
    models: Models,
    combine: Callable[[str, int, list[Tensor]], Tensor],
    progress: Progress,
    *,
    vectors: bool,
    names: Sequence[str] | None = None,
    begin: float = 0.0,
) -> Iterator[Piece]:
    """Merges piece by piece.

    Args:
        combine: (name, start, pieces of each model) → merged piece; it may overwrite what it gets.
        vectors: the pieces are task vectors, and so is the result; otherwise weights.
        names: all but statistics where None.
        begin: progress that was made before.
    """
    names = weight_names(models) if names is None else names
    total, done = sum(size_of(models, name) for name in names), 0
    for name, start, stop in spans(models, names):
        parts = [models.weights(model, name, start, stop) for model in range(models.count)]
        if vectors:
            base = models.base(name, start, stop)
            merged = combine(name, start, [part.sub_(base) for part in parts]).add_(base)
        else:
            merged = combine(name, start, parts)
        yield Piece(name, start, merged)
        done += stop - start
        progress(begin + (1 - begin) * done / total)


def elementwise_workspace(count: int) -> int:
    return 4 * PIECE * (2 * count + 4)


def require_share(method: str, option: str, value: float, *, low: float, high: float, open_high: bool = False) -> None:
    """Checks an option's range.

    Raises:
        BadSetup: `bad-option`.
    """
    if not (low <= value <= high) or (open_high and value == high):
        end = ")" if open_high else "]"
        raise BadSetup(
            "bad-option", f"{method}: {option} is {value}, it must lie in [{low:g}, {high:g}{end}.",
            remedy=f"Give --option {option}=NUMBER in that range.",
        )  # fmt: skip


def require_choice(method: str, option: str, value: str, choices: Sequence[str]) -> None:
    """Checks an option that is one of a few words.

    Raises:
        BadSetup: `bad-option`.
    """
    if value not in choices:
        raise BadSetup("bad-option", f"{method}: {option} is {value!r}, it must be one of {', '.join(choices)}.")


def _moments(models: Models) -> Iterator[Piece]:
    """Running means and variances of an equal mixture of all models (see fusion.statistics)."""
    for name in models.names:
        if models.role(name) is not Role.STATISTIC:
            continue
        size = size_of(models, name)
        value = models.weights(0, name, 0, size).double()
        mean_name = name.removesuffix(VARIANCE) + MEAN
        is_variance = name.endswith(VARIANCE) and mean_name in models.names
        mean = models.weights(0, mean_name, 0, size).double() if is_variance else None
        for model in range(1, models.count):
            new = models.weights(model, name, 0, size).double()
            if mean is None:
                value = next_mean(value, new, model)
                continue
            new_mean = models.weights(model, mean_name, 0, size).double()
            value = next_variance(value, new, mean, new_mean, model)
            mean = next_mean(mean, new_mean, model)
        yield Piece(name, 0, value.float())
