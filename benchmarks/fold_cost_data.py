"""Bases for what has a cost but no accuracy, of random weights; bundles of random task vectors and images for one."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.vit_b32 import INPUT_SHAPE, vit_b32
from foldd.base.load import capture
from foldd.base.store import open_base, store_base
from foldd.core.bundle import Head, write_bundle
from foldd.daemon.demo.data import BASE_CLASSES
from foldd.daemon.demo.data import INPUT_SHAPE as DEMO_SHAPE
from foldd.daemon.demo.network import HEAD, DemoNetwork

IMAGES, CLASSES, RANK = 64, 10, 16
SCALE = 0.01  # of a change beside the weights: about what fine-tuning does


def make_base(folder: Path) -> None:
    _store(folder, vit_b32(), INPUT_SHAPE)


def make_demo_base(folder: Path) -> None:
    """The demo's network, untrained: what it costs does not depend on what it knows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DemoNetwork(BASE_CLASSES)
    _store(folder, network, DEMO_SHAPE, head=HEAD)


def _store(folder: Path, network: torch.nn.Module, input_shape: tuple[int, ...], *, head: str = "") -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    store_base(folder, capture(network, input_shape), head=head)


def make_bundle(base_folder: Path, path: Path, number: int) -> None:
    """Odd numbers: full weights in float32, changed in every direction. Even: differences of rank 16 in float16."""
    warnings.simplefilter("ignore")
    base, random = open_base(base_folder), np.random.default_rng(number)
    low = number % 2 == 0

    def change(shape: tuple[int, ...]) -> np.ndarray:
        if low and len(shape) > 1 and shape[0] > RANK:
            flat = (shape[0], math.prod(shape[1:]))
            left, right = (random.standard_normal(size, np.float32) for size in ((flat[0], RANK), (RANK, flat[1])))
            return (left @ right).reshape(shape) / np.float32(RANK**0.5)
        return random.standard_normal(shape, np.float32)

    parameters = {}
    for name, weight in base.weights.items():
        delta = change(tuple(weight.shape)) * np.float32(SCALE * float(weight.std(correction=0)) + 1e-4)
        parameters[name] = delta.astype(np.float16) if low else weight.numpy() + delta
    head = Head(
        random.standard_normal((CLASSES, base.spec.features), np.float32), random.standard_normal(CLASSES, np.float32)
    )
    inputs = random.standard_normal((IMAGES, *INPUT_SHAPE), np.float32)
    write_bundle(path, parameters, head, task=path.stem, base=base.spec, is_delta=low, inputs=inputs)
