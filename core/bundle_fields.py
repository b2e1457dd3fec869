"""What a bundle holds beside its parameters, checked as it is read: head, calibration set, task, classes, samples."""

from __future__ import annotations

import json

import numpy as np

from foldd.core.base_spec import TASK_PATTERN
from foldd.core.errors import BadCheckpoint
from foldd.core.tensorfile import TensorFile

MAX_CLASSES = 100_000
MAX_CALIBRATION_SAMPLES = 4096
MAX_CLASS_NAMES_BYTES = 256 * 1024


def read_head(file: TensorFile, weight: str, bias: str, features: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight [classes, features] and bias [classes], float32; a bias that is not there is zero.

    Raises:
        BadCheckpoint: `no-head`, `wrong-head`.
    """
    if weight not in file.tensors:
        raise BadCheckpoint(
            "no-head", f"{name} has no {weight}.", remedy="Pack the task's classifier with the weights."
        )
    w = file.tensors[weight]
    if len(w.shape) != 2 or w.shape[1] != features or not 1 <= w.shape[0] <= MAX_CLASSES or not w.is_float:
        raise BadCheckpoint(
            "wrong-head",
            f"{name}: {weight} is {w.dtype} {list(w.shape)}, expected float [classes, {features}].",
            why="the head belongs to another feature output.",
        )
    if bias not in file.tensors:
        return w.float32(), np.zeros(w.shape[0], np.float32)
    b = file.tensors[bias]
    if b.shape != (w.shape[0],) or not b.is_float:
        raise BadCheckpoint("wrong-head", f"{name}: {bias} is {b.dtype} {list(b.shape)}, expected [{w.shape[0]}].")
    return w.float32(), b.float32()


def read_calibration(
    file: TensorFile, input_shape: tuple[int, ...], classes: int, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Calibration inputs [n, *input_shape], float32, and labels [n], int64, where there are any.

    Raises:
        BadCheckpoint: `wrong-calibration`, `too-much-calibration`.
    """
    inputs, labels = file.tensors.get("calibration/inputs"), file.tensors.get("calibration/labels")
    if inputs is None:
        return None, None
    if inputs.shape[1:] != input_shape or not inputs.is_float or not inputs.shape[0]:
        raise BadCheckpoint(
            "wrong-calibration",
            f"{name}: calibration/inputs is {inputs.dtype} {list(inputs.shape)}, "
            f"expected float [n, {', '.join(map(str, input_shape))}].",
            remedy="Store calibration inputs as the network sees them, after preprocessing.",
        )
    if inputs.shape[0] > MAX_CALIBRATION_SAMPLES:
        raise BadCheckpoint(
            "too-much-calibration",
            f"{name} has {inputs.shape[0]} calibration inputs, the limit is {MAX_CALIBRATION_SAMPLES}.",
            remedy="64 are enough.",
        )
    if labels is None:
        return inputs.float32(), None
    if labels.shape != inputs.shape[:1] or labels.is_float:
        raise BadCheckpoint(
            "wrong-calibration",
            f"{name}: calibration/labels is {labels.dtype} {list(labels.shape)}, expected integers "
            f"[{inputs.shape[0]}].",
            why="they belong to other inputs, or are one-hot.",
            remedy="Store one class number an input, or leave the labels out: they are optional.",
        )
    values = labels.stored().astype(np.int64)
    if values.min() < 0 or values.max() >= classes:
        wrong = values.min() if values.min() < 0 else values.max()
        raise BadCheckpoint(
            "wrong-calibration",
            f"{name}: a calibration label is {wrong}, and the head has classes 0…{classes - 1}.",
            why="the labels count from 1, or are those of another task or of the whole data set.",
            remedy="Number them as the head's rows, or leave the labels out: they are optional.",
        )
    return inputs.float32(), values


def checked_task(task: str, name: str) -> str:
    """The name of a task. Raises BadCheckpoint `bad-task-name`."""
    if not TASK_PATTERN.fullmatch(task):
        raise BadCheckpoint(
            "bad-task-name",
            f"{name}: {task!r} cannot name a task.",
            remedy="Use letters, digits, '.', '_' and '-', at most 64 of them, a letter or digit first.",
        )
    return task


def read_samples(text: str | None, name: str) -> int | None:
    """`foldd.samples`. Raises BadCheckpoint `bad-metadata`."""
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) == 0:
        raise BadCheckpoint(
            "bad-metadata",
            f"{name}: foldd.samples is {text[:40]!r}, expected a positive integer.",
            why="it was written by hand; it stands for the number of training samples.",
            remedy="Write it in digits, or leave it out.",
        )
    return int(text)


def read_classes(text: str | None, count: int, name: str) -> tuple[str, ...] | None:
    """`foldd.classes`, one name for each of the head's rows. Raises BadCheckpoint `bad-metadata`."""
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, str) for n in names):
        raise BadCheckpoint(
            "bad-metadata",
            f"{name}: foldd.classes must be a JSON list of {count} strings, one for each row of the head.",
            why="the names are another task's, or were not written as JSON.",
            remedy="Name each class once, or leave foldd.classes out; classes are then numbered.",
        )
    try:
        size = sum(len(n.encode()) + 3 for n in names)
    except UnicodeEncodeError as error:
        raise BadCheckpoint(
            "bad-metadata",
            f"{name}: a class name is no valid text: {error.reason}.",
            why="it was read from a file in another encoding.",
            remedy="Write class names in UTF-8, or leave foldd.classes out; classes are then numbered.",
        ) from error
    if size > MAX_CLASS_NAMES_BYTES:
        raise BadCheckpoint(
            "bad-metadata",
            f"{name}: class names of {size} bytes, the limit is {MAX_CLASS_NAMES_BYTES}.",
            why="they travel with every manifest.",
            remedy="Leave foldd.classes out; classes are then numbered.",
        )
    return tuple(names)


def some(names: list[str]) -> str:
    """The first few of some names, for a sentence."""
    shown = ", ".join(repr(n) for n in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
