"""One base with its bundles and images, from a folder as `--data` names it, and how well a network does on them.

networks.py               a factory for each base
<base>/base.safetensors   the pre-trained weights
<base>/<task>.safetensors the bundles
data/<task>.npz           x_train, y_train, x_val, y_val, x_test, y_test: uint8 [n, height, width, 3], labels [n]
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import multiprocessing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldd.base.load import load_program
from foldd.base.network import Base
from foldd.base.store import open_base, store_base
from foldd.core.bundle import Checkpoint, open_bundle
from foldd.core.digests import sha256_file
from foldd.daemon.memory import rss_bytes
from foldd.fusion.state import HeadTensors
from foldd.fusion.task_vector import task_vector

CORE8 = ("mnist", "gtsrb", "notmnist", "quickdraw", "chars74k", "rsscn7", "signdigits", "fsdd_spec")
ALL12 = (*CORE8, "flowers", "bloodcells", "smiles", "catsdogs")
SPLITS = {"validation": "val", "test": "test", "train": "train"}
SCORE_BATCH = 256
CURVE_IMAGES = 200  # per task, for what is scored after every fold: enough for a curve, and no hours of scoring

Weights = Mapping[str, Tensor]


def task_list(data: Path, base: str, count: int) -> tuple[str, ...]:
    """The first `count` tasks of the bench's lists, or of a folder of other tasks, by name.

    Raises:
        FileNotFoundError: there are fewer.
    """

    def there(task: str) -> bool:
        return (data / base / f"{task}.safetensors").is_file() and (data / "data" / f"{task}.npz").is_file()

    known = ALL12[:count]
    if len(known) == count and all(there(task) for task in known):
        return known
    found = sorted(path.stem for path in (data / base).glob("*.safetensors") if there(path.stem))
    if len(found) < count:
        raise FileNotFoundError(f"{data / base} has {len(found)} bundles with images in {data / 'data'}, not {count}.")
    return tuple(found[:count])


def orders(tasks: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """As listed, and then seeded shuffles."""
    random = np.random.RandomState(0)
    shuffled = [tuple(tasks[i] for i in random.permutation(len(tasks))) for _ in range(count - 1)]
    return [tasks, *shuffled]


def pixels(stored: np.ndarray) -> Tensor:
    """uint8 [n, height, width, 3] → what the networks take: float32 [n, 3, height, width]."""
    scaled = (torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    return scaled.contiguous()


@dataclass(frozen=True, eq=False)
class Images:
    """A split of a task: uint8 [n, height, width, 3] and labels [n]. A quarter of the memory of float32."""

    x: np.ndarray
    y: np.ndarray

    @property
    def curve(self) -> np.ndarray:
        """Places of the images that stand for all of them in curves, evenly spread."""
        return np.unique(np.linspace(0, len(self.y) - 1, min(CURVE_IMAGES, len(self.y))).astype(int))


class Bench:
    """A base, its bundles and one split of images.

    Attributes:
        baseline_bytes: resident memory before the base was opened, with all code imported that opens one.
    """

    def __init__(self, data: Path, name: str, tasks: tuple[str, ...], split: str, folder: Path) -> None:
        self.data, self.name, self.split = data, name, split
        self.images = {task: self.load(task, split) for task in tasks}
        shape = self.images[tasks[0]].x.shape
        # In a process of its own: the exporter's modules and memory are no part of a fold.
        worker = multiprocessing.get_context("spawn").Process(
            target=_store, args=(data, name, (shape[3], shape[1], shape[2]), folder)
        )
        worker.start()
        worker.join()
        if worker.exitcode != 0:
            raise RuntimeError(f"The base {name} could not be captured; the reason stands above.")
        _open(folder)
        self.baseline_bytes = settled_rss()
        self.base: Base = _open(folder)

    def load(self, task: str, split: str) -> Images:
        stored = np.load(self.data / "data" / f"{task}.npz")
        return Images(stored[f"x_{SPLITS[split]}"], stored[f"y_{SPLITS[split]}"].astype(np.int64))

    def checkpoint(self, task: str) -> Checkpoint:
        """A bundle, opened anew, so that its mapped pages go when its user is done."""
        return open_bundle(self.data / self.name / f"{task}.safetensors", self.base.spec)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Task → of its bundle and its images."""
        return {
            task: hashlib.sha256(
                "".join(
                    sha256_file(self.data / path) for path in (f"{self.name}/{task}.safetensors", f"data/{task}.npz")
                ).encode()
            ).hexdigest()
            for task in self.images
        }

    def individual(self, task: str) -> dict[str, Tensor]:
        """The weights of a task's own model."""
        vector = task_vector(self.base, self.checkpoint(task))
        return {name: weight + vector[name] for name, weight in self.base.weights.items()}

    @cached_property
    def own_features(self) -> dict[str, Tensor]:
        """Task → features of its own model on its images."""
        return {task: self.features(self.individual(task), task) for task in self.images}

    @torch.no_grad()
    def features(self, weights: Weights, task: str, places: np.ndarray | None = None) -> Tensor:
        """Features [n, width] on a task's images, or on some of them."""
        x = self.images[task].x if places is None else self.images[task].x[places]
        pieces = [x[start : start + SCORE_BATCH] for start in range(0, len(x), SCORE_BATCH)]
        return torch.cat([self.base.features(weights, pixels(piece)) for piece in pieces])

    def hits(self, features: Tensor, head: HeadTensors, task: str, places: np.ndarray | None = None) -> np.ndarray:
        """Which images are decided rightly: bool [n]."""
        y = self.images[task].y if places is None else self.images[task].y[places]
        return head.logits(features).argmax(1).numpy() == y


def settled_rss() -> int:
    """Resident memory without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return rss_bytes()


def _open(folder: Path) -> Base:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's loader warns of its own deprecations
        return open_base(folder)


def _store(data: Path, name: str, shape: tuple[int, ...], folder: Path) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    program = load_program(
        f"{data / 'networks.py'}:{name}", weights=data / name / "base.safetensors", input_shape=shape
    )
    store_base(folder, program)
