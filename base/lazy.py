"""Tensors by name that are made when they are asked for, and held by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Name → tensor, read or computed anew with each access: a model that costs the memory of one tensor at a time.

    Who needs a tensor twice keeps it for so long.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        """Takes the names in their order, and what makes the tensor of a name: fresh, or never to be changed."""
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def over(top: Mapping[str, Tensor], below: Mapping[str, Tensor]) -> Lazy:
    """The tensors of `below`, but those of `top` where it has them."""
    return Lazy([*below, *(name for name in top if name not in below)], lambda n: top[n] if n in top else below[n])
