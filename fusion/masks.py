"""The masked merge θ = θ⁰ + a·m_pre·τ_pre + b·m_post·τ_post, and its gradient at the memory of one weight copy.

The masks never enter autograd. The merged weights are the leaves; as soon as backward has a weight's gradient g, it is
reduced to the masks' (∂L/∂m_pre = a·g·τ_pre, summed over what shares a mask value) and freed. So neither a product
per mask nor a gradient of the whole model is ever held: one copy of the weights, one tensor's gradient, the masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role

Shape = tuple[int, ...]
Take = Callable[[str, Tensor], None]  # gets a tensor's name and its mask's gradient


def factor_shapes(base: Base, name: str, *, channels: bool) -> tuple[Shape, ...]:
    """The shapes of the factors whose product is a tensor's mask; each broadcasts over the tensor.

    Args:
        channels: one value per output channel, and for matrices and convolutions one per input channel as well,
            instead of one per element. Matrices and convolutions are [out, in, …]; an embedding [tokens, width] has
            its channels last; biases and norms are all channels.
    """
    shape, role = tuple(base.weights[name].shape), base.role(name)
    if not channels or not shape:
        return (shape,)
    axes = {Role.EMBEDDING: (len(shape) - 1,), Role.MATRIX: (0, 1), Role.CONVOLUTION: (0, 1)}.get(role, (0,))
    return tuple(tuple(size if i == axis else 1 for i, size in enumerate(shape)) for axis in axes if axis < len(shape))


class MaskedMerge:
    """Merged weights under two trainable masks.

    Attributes:
        pre, post: the factors of all masks, flat float tensors [values], ones at first. Their `.grad` is filled by
            `backward` and belongs to the caller's optimiser.
        weights: canonical name → merged weight, leaves of autograd but for the statistics, which are never masked.
    """

    def __init__(
        self,
        base: Base,
        pre: Mapping[str, Tensor],
        post: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        *,
        channels: bool,
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Takes the two task vectors, the merged statistics as differences to the base, and (a, b)."""
        self._base, self._vectors, self._statistics, self._scale = base, (pre, post), dict(statistics), scale
        self._sides: tuple[Tensor, ...] = ()
        self._take: Take | None = None
        self._places: dict[str, list[tuple[slice, Shape]]] = {}
        self.weights = {name: torch.empty_like(weight).copy_(weight) for name, weight in base.weights.items()}
        count = 0
        for name, leaf in self.weights.items():
            if base.role(name) is Role.STATISTIC:
                continue
            self._places[name] = []
            for shape in factor_shapes(base, name, channels=channels):
                size = torch.Size(shape).numel()
                self._places[name].append((slice(count, count + size), shape))
                count += size
            hook = _reducer(weakref.ref(self), name)
            leaf.requires_grad_().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        dtype = next(iter(base.weights.values())).dtype
        self.pre, self.post = torch.ones(count, dtype=dtype), torch.ones(count, dtype=dtype)

    @torch.no_grad()
    def reset(self, pre: float, post: float) -> None:
        """Sets every mask to a constant, by its first factor; the others become one."""
        for side, value in ((self.pre, pre), (self.post, post)):
            side.fill_(1.0)
            for places in self._places.values():
                side[places[0][0]] = value

    @property
    def masked(self) -> tuple[str, ...]:
        """The names that have masks: all but the statistics."""
        return tuple(self._places)

    def factors(self, side: Tensor, name: str) -> list[Tensor]:
        """One tensor's factors within `pre`, `post` or a tensor like them: views."""
        return [side[place].view(shape) for place, shape in self._places[name]]

    def mask(self, side: Tensor, name: str) -> Tensor:
        """One tensor's mask, the product of its factors: it broadcasts over the tensor."""
        return _product(self.factors(side, name))

    @torch.no_grad()
    def fill(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sets the weights to θ⁰ + vector, statistics included: a teacher, without a second copy of the weights."""
        for name, weight in self.weights.items():
            weight.copy_(self._base.weights[name]).add_(vector[name])
        return self.weights

    @torch.no_grad()
    def rebuild(self) -> dict[str, Tensor]:
        """Sets the weights to the masked merge at the present masks."""
        for name, weight in self.weights.items():
            weight.copy_(self._vector(name, self.pre, self.post)).add_(self._base.weights[name])
        return self.weights

    def backward(self, loss: Tensor, *sides: Tensor) -> None:
        """Fills `.grad` of the given sides (`pre`, `post`) from a loss on `weights`; the others' becomes None."""
        self._sides, self._take = sides, None
        for side in (self.pre, self.post):
            side.grad = torch.zeros_like(side) if any(side is s for s in sides) else None
        loss.backward()  # type: ignore[no-untyped-call]

    def backward_by_tensor(self, loss: Tensor, side: Tensor, take: Take) -> None:
        """Hands the gradient of one side (`pre` or `post`) over tensor by tensor, as soon as it is known.

        What `take` does to that tensor's mask meanwhile changes no other gradient: a whole one is never held. For masks
        of one factor, per element.
        """
        self._sides, self._take = (side,), take
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def write_merged(self, target: Mapping[str, Tensor]) -> None:
        """Writes the merged task vector under the present masks into tensors that are there."""
        for name, tensor in target.items():
            tensor.copy_(self._vector(name, self.pre, self.post))

    @torch.no_grad()
    def merged(self, pre: Tensor, post: Tensor) -> dict[str, Tensor]:
        """The merged task vector under the given masks, fresh tensors in the base's order and type."""
        return {
            name: torch.empty_like(weight).copy_(self._vector(name, pre, post)) for name, weight in self.weights.items()
        }

    def _vector(self, name: str, pre: Tensor, post: Tensor) -> Tensor:
        if name not in self._places:
            return self._statistics[name]
        (tau_pre, tau_post), (a, b) = self._vectors, self._scale
        total = tau_pre[name] * (a * self.mask(pre, name))
        return total.addcmul_(tau_post[name], b * self.mask(post, name))

    def reduce(self, name: str, leaf: Tensor) -> None:
        """Turns a weight's gradient into its masks' and lets it go."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            return
        for side, vector, scale in zip((self.pre, self.post), self._vectors, self._scale, strict=True):
            if not any(side is s for s in self._sides):
                continue
            if self._take is not None:
                self._take(name, gradient.mul_(vector[name]).mul_(scale))
                continue
            if side.grad is None:
                continue
            product = (gradient * vector[name]).mul_(scale)
            factors = self.factors(side, name)
            for i, (place, shape) in enumerate(self._places[name]):
                others = factors[:i] + factors[i + 1 :]
                part = product * _product(others) if others else product
                side.grad[place] = part.sum_to_size(shape).reshape(-1)


def _reducer(owner: weakref.ref[MaskedMerge], name: str) -> Callable[[Tensor], None]:
    """A hook that does not own what it serves: torch keeps hooks where Python's collector does not look, and every
    fold would leave its copies of the model behind."""

    def hook(leaf: Tensor) -> None:
        masked = owner()
        if masked is not None:
            masked.reduce(name, leaf)

    return hook


def _product(factors: list[Tensor]) -> Tensor:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result
