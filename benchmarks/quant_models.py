"""What `quant` quantizes and how it scores: a base's models, calibration draws, one quantization at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.bench_data import SCORE_BATCH, Bench, pixels
from benchmarks.rivals.rounding import quantizers
from foldd.base.network import Base
from foldd.core.bundle import Checkpoint, open_bundle
from foldd.core.files import write_file
from foldd.core.quantized import QuantizedModel
from foldd.daemon.quantizing import folded_weights
from foldd.fusion.method import head_of
from foldd.fusion.state import HeadTensors
from foldd.fusion.task_vector import task_vector
from foldd.quantize import hdrq, histogram, latent, reconstruct, steps
from foldd.quantize.calibrate import choose_ranges, observe_network
from foldd.quantize.hdrq import Hdrq
from foldd.quantize.simulate import simulated_features

CALIBRATION = 64  # training images of a draw, as a bundle has

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """One fine-tuned model: weights with the norms folded, its head, and the images that it is scored on."""

    name: str
    weights: dict[str, Tensor]
    head: HeadTensors
    images: str  # of bench.images
    bundled: Tensor | None  # its bundle's calibration inputs


class Subjects:
    """A base with the images of some tasks, and models of it."""

    def __init__(self, data: Path, name: str, tasks: Sequence[str], split: str, folder: Path) -> None:
        self.bench = Bench(data, name, tuple(tasks), split, folder)
        self.base: Base = self.bench.base
        self.theta = folded_weights(self.base, dict(self.base.weights))

    def subject(self, bundle: Path, images: str) -> Subject:
        checkpoint: Checkpoint = open_bundle(bundle, self.base.spec)
        vector = task_vector(self.base, checkpoint)
        weights = {name: weight + vector[name] for name, weight in self.base.weights.items()}
        inputs = None if checkpoint.inputs is None else torch.from_numpy(checkpoint.inputs)
        return Subject(bundle.stem, folded_weights(self.base, weights), head_of(checkpoint), images, inputs)

    def draw(self, subject: Subject, seed: int) -> Tensor:
        """Calibration inputs: the bundle's own for seed 0, other training images for others."""
        if seed == 0 and subject.bundled is not None:
            return subject.bundled
        train = self.bench.load(subject.images, "train")
        places = np.random.RandomState(seed).permutation(len(train.y))[:CALIBRATION]
        return pixels(train.x[places])

    def float_hits(self, weights: Weights, subject: Subject) -> np.ndarray:
        return self._hits(lambda x: self.base.folded.features(weights, x), subject)

    def hits(self, model: QuantizedModel, subject: Subject) -> np.ndarray:
        """Which images a quantized network decides rightly under a subject's head: bool [n]."""
        return self._hits(lambda x: simulated_features(self.base.folded, model, x), subject)

    def batches(self, subject: Subject) -> Iterator[Tensor]:
        """The images that a subject is scored on, as networks take them."""
        x = self.bench.images[subject.images].x
        return (pixels(x[i : i + SCORE_BATCH]) for i in range(0, len(x), SCORE_BATCH))

    @torch.no_grad()
    def _hits(self, features: Callable[[Tensor], Tensor], subject: Subject) -> np.ndarray:
        pieces = [features(batch) for batch in self.batches(subject)]
        return self.bench.hits(torch.cat(pieces), subject.head, subject.images)

    def quantize(
        self, how: Hdrq, subject: Subject, inputs: Tensor, seed: int, *, widest: bool = False
    ) -> QuantizedModel:
        ranges = {}
        if how.activation_bits is not None:
            seen = observe_network(self.base.folded, subject.weights, inputs)
            ranges = choose_ranges(self.base.folded, seen, how.activation_bits, widest=widest)
        return how.quantize(self.base.folded, subject.weights, self.theta, ranges, inputs, seed=seed)


def split_bits(bits: str) -> tuple[int, int]:
    """`w4a8` → 4, 8."""
    weights, _, activations = bits.removeprefix("w").partition("a")
    return int(weights), int(activations)


def quantizer(method: str, bits: str, iterations: int) -> tuple[Hdrq, bool]:
    """The quantizer of a row, and whether its ranges are the widest ones."""
    return quantizers(*split_bits(bits), iterations)[method], method == "minmax"


class Cache:
    """Measured numbers by what they were measured on: a file each, so that a long run can go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        sources = [m.__file__ for m in (histogram, hdrq, latent, reconstruct, steps)]
        sources += [str(Path(rivals.__file__).parent / "rounding.py"), __file__]
        text = "".join(Path(str(source)).read_text() for source in sources)
        self._source = hashlib.sha256(text.encode()).hexdigest()

    def get(self, facts: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured for these facts, now or before."""
        key = hashlib.sha256(json.dumps([facts, self._source], sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{key}.json"
        if path.is_file():
            return json.loads(path.read_text())["value"]
        value = measure()
        write_file(path, json.dumps({"facts": facts, "value": value}).encode() + b"\n")
        return value
