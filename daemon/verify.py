"""Are a checkpoint's numbers sound? Its form was checked when it was opened; here every value is looked at, in slices.

safetensors loads a file of the right length that is full of zeros, or whose tail was never written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.core.tensorfile import StoredTensor
from foldd.fusion.task_vector import norm, task_vector

_WEIGHTS = {Role.MATRIX, Role.CONVOLUTION, Role.EMBEDDING}


def verify_values(checkpoint: Checkpoint, role: Callable[[str], Role], base: Callable[[str], np.ndarray]) -> None:
    """Looks at every value of a checkpoint.

    Args:
        role, base: of a tensor's name: its role, and the base's own values.

    Raises:
        BadCheckpoint: `not-finite`, `all-zero`, `negative-variance`.
    """
    alive = False
    for name, tensor in checkpoint.parameters.items():
        zero = _look_at(tensor, checkpoint.task)
        alive |= not zero
        # A frozen layer has a difference of zero; weights that are all zero were never written.
        if zero and not checkpoint.is_delta and role(name) in _WEIGHTS:
            raise _all_zero(checkpoint, name)
        # By convention: of a pair of statistics, the variance is the one that its name says.
        if role(name) is Role.STATISTIC and name.endswith("running_var"):
            variance = tensor.float32() + (base(name) if checkpoint.is_delta else 0)
            if variance.min(initial=0) < 0:
                raise BadCheckpoint(
                    "negative-variance",
                    f"{checkpoint.task}: {name} holds {variance.min():.3g}, and no variance is negative.",
                    why="statistics were averaged or extrapolated as if they were weights, or the file is damaged.",
                    remedy="Save the model's own running statistics, as training left them.",
                )
    if not alive:
        raise _all_zero(checkpoint, "every parameter")
    for name, array in (
        ("head/weight", checkpoint.head.weight),
        ("head/bias", checkpoint.head.bias),
        ("calibration/inputs", checkpoint.inputs),
    ):
        if array is None:
            continue
        if not np.isfinite(array).all():
            raise _not_finite(checkpoint.task, name)
        if name != "head/bias" and not array.any():
            raise _all_zero(checkpoint, name)


def verify_change(checkpoint: Checkpoint, base: Base, limit: float) -> None:
    """Is the task vector of a size that fine-tuning makes? One that is not ruins every task, and no gate may see it.

    Args:
        limit: of its norm, in norms of the base; 0: none.

    Raises:
        BadCheckpoint: `diverged`, `missing-tensors`.
    """
    change, own = norm(base, task_vector(base, checkpoint)), norm(base, base.weights)
    if limit and change > limit * own:
        raise BadCheckpoint(
            "diverged",
            f"{checkpoint.task} is {change / own:.3g} times as far from the base as the base is large; the limit is "
            f"{limit:g}.",
            why="the fine-tuning diverged, its weights were scaled, or it began from another base.",
            remedy="Fine-tune with a lower learning rate; a task vector is usually a few percent of the base. "
            "gate.change is the limit.",
        )


def _look_at(tensor: StoredTensor, task: str) -> bool:
    """Whether all values are zero; raises where one is not finite."""
    zero = True
    for piece in tensor.slices():
        if not np.isfinite(piece).all():
            raise _not_finite(task, tensor.name)
        zero = zero and not piece.any()
    return zero


def _not_finite(task: str, name: str) -> BadCheckpoint:
    return BadCheckpoint(
        "not-finite",
        f"{task}: {name} holds NaN or infinity.",
        why="the fine-tuning diverged, or half precision overflowed.",
        remedy="Check the training loss; save an earlier checkpoint.",
    )


def _all_zero(checkpoint: Checkpoint, name: str) -> BadCheckpoint:
    return BadCheckpoint(
        "all-zero",
        f"{checkpoint.task}: {name} is all zero.",
        why="the file has its right length, but its content was never written.",
        remedy="Copy the file again from where it was made.",
    )
