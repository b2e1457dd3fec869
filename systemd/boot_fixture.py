"""What the boot test folds: a tiny base network, a handful of bundles for it, and a batch to ask the runtime about.

    python boot_fixture.py FOLDER [COUNT]

writes base.pt2, task1.safetensors … taskN.safetensors and batch.npy. The weights are random: the boot test is about
services, not about accuracy.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from foldd.base.load import capture, load_program
from foldd.base.store import store_base
from foldd.core.bundle import Head, write_bundle
from foldd.core.roles import Role
from foldd.core.tensorfile import open_tensors

INPUT_SHAPE = (1, 12, 12)
FEATURES = 24
CLASSES = 4
HEAD = "head"


def make_base() -> nn.Module:
    torch.manual_seed(7)
    body = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    network = nn.Sequential(*body, nn.Linear(128, FEATURES), nn.ReLU())
    network.add_module(HEAD, nn.Linear(FEATURES, CLASSES))
    return network.eval()


def make(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(capture(make_base(), INPUT_SHAPE), folder / "base.pt2")
    with tempfile.TemporaryDirectory() as place:
        stored = Path(place)
        base = store_base(stored, load_program(str(folder / "base.pt2")), head=HEAD)
        weights = {
            name: tensor.float32() for name, tensor in open_tensors(stored / "weights.safetensors").tensors.items()
        }
        kept = [name for name, spec in base.canonical.items() if spec.role is not Role.COUNTER]
        for number in range(1, count + 1):
            random = np.random.default_rng(number)
            tuned = {
                name: weights[name] * (1 + 0.02 * random.standard_normal(weights[name].shape, np.float32))
                for name in kept
            }
            head = Head(random.standard_normal((CLASSES, FEATURES), np.float32), np.zeros(CLASSES, np.float32))
            inputs = random.standard_normal((32, *INPUT_SHAPE), np.float32)
            path = folder / f"task{number}.safetensors"
            write_bundle(path, tuned, head, task=f"task{number}", base=base, inputs=inputs, samples=100)
    np.save(folder / "batch.npy", np.zeros((2, *INPUT_SHAPE), np.float32))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8)
