"""BatchNorm's running mean and variance: moments of distributions, so they merge as moments do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from foldd.base.network import Base
from foldd.core.roles import Role

MEAN, VARIANCE = "running_mean", "running_var"


def merge_statistics(
    base: Base, merged: Mapping[str, Tensor], vector: Mapping[str, Tensor], count: float
) -> dict[str, Tensor]:
    """Statistics after `count` folded tasks and one more, as differences to the base (as the arguments are).

    Each task is one equally weighted part of a mixture. Its mean is the mean of the means; its variance, by the law
    of total variance, the mean of the variances plus the variance of the means:

        M' = M + (m − M)/(t+1),   V' = V + (v − V)/(t+1) + t/(t+1)² · (M − m)²

    Differences alone would not do: the variance of the means needs the means themselves. Written as steps from M and
    V, so that folding equal statistics changes not one bit. A statistic that is no running variance with a running
    mean beside it is averaged by count.

    Args:
        count: tasks in `merged`, or any weight of it beside the 1 of `vector`.
    """
    after: dict[str, Tensor] = {}
    for name in base.weights:
        if base.role(name) is not Role.STATISTIC:
            continue
        old, new = merged[name].double(), vector[name].double()
        value = next_mean(old, new, count)
        mean = name.removesuffix(VARIANCE) + MEAN
        if name.endswith(VARIANCE) and mean in base.weights:
            # The base's mean drops out of the difference of the two means.
            value = next_variance(old, new, merged[mean].double(), vector[mean].double(), count)
        after[name] = value.to(merged[name].dtype)
    return after


def next_mean(old: Tensor, new: Tensor, count: float) -> Tensor:
    """M' of `count` tasks' mean M and one more task's m."""
    return old + 1.0 / (count + 1) * (new - old)


def next_variance(old: Tensor, new: Tensor, old_mean: Tensor, new_mean: Tensor, count: float) -> Tensor:
    """V' of `count` tasks' variance V and one more task's v, with the means that belong to them."""
    share = 1.0 / (count + 1)
    return next_mean(old, new, count) + count * share**2 * (old_mean - new_mean) ** 2
