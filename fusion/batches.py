"""Calibration inputs: whose are used, seeded mini-batches of them, and what a network makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.core.errors import BadCheckpoint
from foldd.fusion.state import MergeState, as_tensor

FORWARD_BATCH = 64  # inputs per teacher pass: bounds the activations, changes no result worth naming


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches [min(size, count)], without repetition until a shuffle is used up."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


@torch.no_grad()
def features_of(base: Base, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Features [n, width] of all inputs, without gradient, in pieces."""
    return torch.cat([base.features(weights, piece) for piece in torch.split(inputs, FORWARD_BATCH)])


def check_finite(task: str, *features: Tensor) -> None:
    """Raises BadCheckpoint `features-not-finite` where a feature is infinite or no number."""
    if not all(bool(tensor.isfinite().all()) for tensor in features):
        raise BadCheckpoint(
            "features-not-finite",
            f"{task}: the network's features on its calibration inputs are not finite.",
            why="the weights or the calibration inputs are far larger than the base's; half precision overflowed.",
            remedy="Check the fine-tuned model on its calibration inputs before packing it.",
        )


def calibration_sets(state: MergeState, checkpoint: Checkpoint) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """The previous task's inputs and the incoming one's, and what to warn of.

    Where the previous task left none, the incoming one's stand in: the merged model before the fold is a teacher on
    any inputs, if a worse one on strange ones.

    Raises:
        BadCheckpoint: `no-calibration` where the incoming task has none.
    """
    if checkpoint.inputs is None:
        raise BadCheckpoint(
            "no-calibration",
            f"{checkpoint.task} has no calibration inputs, and this method cannot fold without them.",
            why="the bundle was packed without them, or it is a plain checkpoint.",
            remedy="Pack it with about 64 unlabelled inputs, or choose a data-free method such as `average`.",
        )
    new = as_tensor(checkpoint.inputs)
    if state.calibration is not None:
        return (state.calibration, new), ()
    return (new, new), (f"{state.previous} left no calibration inputs; those of {checkpoint.task} stand in for them.",)
