"""The demo's data: scikit-learn's 1,797 real handwritten digits, and six tasks made of them.

Three tasks are new label sets over the images as they are, three are shifts of the images. They were fixed by
looking at the gap between the unfolded base and a fine-tuned model on validation images; no merge was looked at
to choose them. The base is trained on the digits 0 to 4 only, so every task has something to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

SEED = 0
TRAIN, VALIDATION = 1000, 300  # images; the other 497 are the test split
CALIBRATION = 64  # images of the training split that go into a bundle, without labels
BASE_CLASSES = 5  # the base learns 0, 1, 2, 3, 4
INPUT_SHAPE = (1, 16, 16)
NOISE = 0.3  # standard deviation, where a full stroke of the pen is 1

DIGITS = tuple(str(n) for n in range(10))
_LOOPS = np.array([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])  # closed loops in each digit as it is usually written


@dataclass(frozen=True)
class Split:
    """images: [n, 1, 16, 16] float32, the pen about 1 and paper about 0; labels: [n] int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class TaskData:
    name: str
    about: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class _Task:
    name: str
    about: str
    classes: tuple[str, ...] = DIGITS
    image: Callable[[np.ndarray], np.ndarray] = lambda images: images
    label: Callable[[np.ndarray], np.ndarray] = lambda digits: digits
    keep: Callable[[np.ndarray], np.ndarray] = lambda digits: digits >= 0


def _noisy(images: np.ndarray) -> np.ndarray:
    noise: np.ndarray = np.random.default_rng(SEED + 1).normal(0.0, NOISE, images.shape)
    return np.asarray(images + noise)


# In the order in which they are folded: label sets and shifts in turn.
_TASKS = (
    _Task("parity", "even or odd", ("even", "odd"), label=lambda d: d % 2),
    _Task("mirrored", "digits seen in a mirror", image=lambda x: x[:, :, ::-1]),
    _Task("loops", "closed loops in the digit", ("none", "one", "two"), label=lambda d: _LOOPS[d]),
    _Task("inverted", "white chalk on a blackboard", image=lambda x: 1.0 - x),
    _Task("five-to-nine", "digits the base has never seen", DIGITS[5:], label=lambda d: d - 5, keep=lambda d: d >= 5),
    _Task("noisy", "digits through a bad sensor", image=_noisy),
)
TASK_NAMES = tuple(task.name for task in _TASKS)


def split_indices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `load_digits` for training, validation and test; disjoint, and the same for every task and the base."""
    order = np.random.default_rng(SEED).permutation(len(load_digits().target))
    train, validation, test = np.split(order, [TRAIN, TRAIN + VALIDATION])
    return train, validation, test


def base_data() -> TaskData:
    """What the base is trained on: the digits 0 to 4 of the same splits."""
    known = _Task("base", "the digits 0 to 4", DIGITS[:BASE_CLASSES], keep=lambda d: d < BASE_CLASSES)
    return _make(known)


def task_data() -> tuple[TaskData, ...]:
    """The six tasks, in the order in which they are folded."""
    return tuple(_make(task) for task in _TASKS)


def _make(task: _Task) -> TaskData:
    digits = load_digits()
    kept, labels = task.keep(digits.target), task.label(digits.target)
    images = task.image(digits.images / 16.0)  # transformed before they are split: noise does not depend on the split

    def split(rows: np.ndarray) -> Split:
        rows = rows[kept[rows]]
        # Each pixel becomes 2 × 2: three resolutions of a convolutional network need more than 8 × 8.
        large = images[rows].repeat(2, axis=1).repeat(2, axis=2)[:, None]
        return Split(np.ascontiguousarray(large, np.float32), labels[rows].astype(np.int64))

    train, validation, test = map(split, split_indices())
    return TaskData(task.name, task.about, task.classes, train, validation, test)
