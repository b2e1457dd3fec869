"""Tensors that a bundle stores as 8-bit integers and steps, read as the float32 values that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from foldd.core.errors import BadCheckpoint
from foldd.core.tensorfile import StoredTensor

CODES = "I8"


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """Codes in the file, `dtype` I8, with their step in memory: every reading but `stored` gives `codes · step`.

    Attributes:
        step: float32, [] for the tensor or [channels] along the first axis; finite and positive.
    """

    step: np.ndarray

    @classmethod
    def of(cls, codes: StoredTensor, step: np.ndarray) -> ScaledTensor:
        return cls(codes.name, codes.dtype, codes.shape, codes.start, codes._raw, step)

    @property
    def is_float(self) -> bool:
        return True

    def piece(self, start: int, stop: int) -> np.ndarray:
        codes = self.stored().reshape(-1)[start:stop]
        # A step beyond all reason gives inf, which verification then names.
        with np.errstate(over="ignore"):
            return np.asarray(codes * self.steps(start, start + codes.size), np.float32)

    def steps(self, start: int, stop: int) -> np.ndarray:
        """The steps of elements `start` … `stop` in order: float32, [] or [stop − start]."""
        if not self.step.ndim:
            return self.step
        each = max(1, self.size // max(1, len(self.step)))
        return np.asarray(self.step[np.arange(start, stop) // each])


def scaled(tensors: Mapping[str, StoredTensor], kind: str, label: str) -> dict[str, StoredTensor]:
    """The parameters of a bundle by their names, those with a step as what they stand for.

    Args:
        tensors: all of the file: `<kind>/<name>` and `step/<name>`.
        kind: `model` or `delta`.
        label: the file, for messages.

    Raises:
        BadCheckpoint: `step-without-codes`, `bad-step`. Codes without a step stay integers, as counters are.
    """
    parameters = {t.partition("/")[2]: tensor for t, tensor in tensors.items() if t.startswith(kind + "/")}
    for full, stored in tensors.items():
        if not full.startswith("step/"):
            continue
        name = full.removeprefix("step/")
        codes = parameters.get(name)
        if codes is None or codes.dtype != CODES:
            raise BadCheckpoint(
                "step-without-codes",
                f"{label} has {full}, but {kind}/{name} is {'missing' if codes is None else codes.dtype}.",
                why="only 8-bit integers, type I8, have a step.",
                remedy="Leave the step out, or pack the checkpoint with `foldd pack --quantize w8`.",
            )
        parameters[name] = ScaledTensor.of(codes, _checked(stored, codes.shape, label))
    return parameters


def _checked(stored: StoredTensor, shape: tuple[int, ...], label: str) -> np.ndarray:
    if stored.dtype != "F32" or stored.shape not in ((), shape[:1]):
        raise BadCheckpoint(
            "bad-step",
            f"{label}: {stored.name} is {stored.dtype} {list(stored.shape)}, expected F32 [] or {list(shape[:1])}.",
            why="there is one step for the tensor, or one for each of its channels, which are the first axis.",
        )
    step = stored.float32()
    if not (np.isfinite(step) & (step > 0)).all():
        raise BadCheckpoint("bad-step", f"{label}: {stored.name} holds a step that is not finite and positive.")
    return step
