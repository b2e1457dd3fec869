"""The four PACS domains under one frozen head: seven classes as photos, paintings, cartoons and sketches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_data import SCORE_BATCH, SPLITS, Bench, pixels
from benchmarks.report import say
from foldd.core.bundle import Checkpoint, Head, open_bundle, write_bundle
from foldd.fusion.batches import batches
from foldd.fusion.fisher import Logits, Parameters
from foldd.fusion.state import HeadTensors
from foldd.fusion.uowq import free_names, task_logits
from foldd.fusion.uowq_train import Samples

DOMAINS = ("photo", "art", "cartoon", "sketch")
CLASSES = 7
HEAD_SHOTS = 10  # a class and domain, for the class means
FINE_TUNING = {"images": 10_000, "batch": 64, "rate": 1.5e-4}  # AdamW, one cycle, as the bench's bundles
CALIBRATION = 64  # training images in a bundle
SCALES = tuple(float(s) for s in np.geomspace(0.5, 32, 25))  # of the logits: one is chosen on training images


class Pacs:
    """A base and all splits of the four domains, as tensors."""

    def __init__(self, data: Path, name: str, folder: Path) -> None:
        self.bench = Bench(data, name, tuple(f"pacs_{domain}" for domain in DOMAINS), "test", folder)
        self.base = self.bench.base
        self.bundles = folder.with_name(f"{folder.name}-bundles")  # for what is made here and not kept
        self._splits: dict[tuple[str, str], Samples] = {}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The base's trained parameters."""
        return {name: self.base.weights[name] for name in free_names(self.base)}

    def split(self, domain: str, split: str) -> Samples:
        if (domain, split) not in self._splits:
            assert split in SPLITS
            images = self.bench.load(f"pacs_{domain}", split)
            self._splits[domain, split] = Samples(pixels(images.x), torch.from_numpy(images.y))
        return self._splits[domain, split]

    def shots(self, domain: str, shots: int, seed: int) -> Samples:
        """Training images of a domain, so many of each class, or all where a class has fewer."""
        whole = self.split(domain, "train")
        random = np.random.RandomState(seed)
        order = torch.from_numpy(random.permutation(len(whole)))
        places = torch.cat([order[whole.labels[order] == c][:shots] for c in range(CLASSES)])
        return Samples(whole.inputs[places], whole.labels[places])

    def some(self, domain: str, count: int, seed: int) -> Samples:
        """So many training images of a domain, whatever their classes."""
        whole = self.split(domain, "train")
        places = torch.from_numpy(np.random.RandomState(seed).permutation(len(whole))[:count])
        return Samples(whole.inputs[places], whole.labels[places])

    def head(self, domains: Sequence[str]) -> HeadTensors:
        """A frozen head: directions from the mean of the unfolded base's features to each class's mean, 10 training
        images of each domain and class; their scale is the one of least loss on 300 training images a domain."""
        few = [self.shots(domain, HEAD_SHOTS, seed=0) for domain in domains]
        features, labels = self.features(self.base.weights, few)
        centre = features.mean(0)
        means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
        directions = F.normalize(means - centre, dim=1)
        features, labels = self.features(self.base.weights, [self.some(domain, 300, seed=1) for domain in domains])
        scores = (features - centre) @ directions.T
        unit = float(scores.std())
        scale = min(SCALES, key=lambda s: float(F.cross_entropy(s / unit * scores, labels))) / unit
        weight = scale * directions
        return HeadTensors(weight, -(weight @ centre))

    def logits(self, head: HeadTensors) -> Logits:
        """The network under a head, BatchNorm statistics as the base's, as a function of its trained parameters."""
        nothing = {name: torch.zeros_like(weight) for name, weight in self.base.weights.items()}
        return task_logits(self.base, nothing, head)[0]

    @torch.no_grad()
    def features(self, weights: Parameters, parts: Sequence[Samples]) -> tuple[Tensor, Tensor]:
        pieces = [piece for part in parts for piece in torch.split(part.inputs, SCORE_BATCH)]
        return torch.cat([self.base.features(weights, x) for x in pieces]), torch.cat([p.labels for p in parts])


@torch.no_grad()
def all_logits(logits: Logits, parameters: Parameters, samples: Samples) -> Tensor:
    return torch.cat([logits(parameters, x) for x in torch.split(samples.inputs, SCORE_BATCH)])


def hits(logits: Logits, parameters: Parameters, samples: Samples) -> np.ndarray:
    """Which images are decided rightly: bool [n]."""
    return (all_logits(logits, parameters, samples).argmax(1) == samples.labels).numpy()


def mean_loss(logits: Logits, parameters: Parameters, samples: Samples) -> float:
    return float(F.cross_entropy(all_logits(logits, parameters, samples), samples.labels))


def fine_tuned(pacs: Pacs, held_out: str, domain: str, cache: Path) -> Checkpoint:
    """A domain's bundle under the head of all domains but one: from the data folder, or made here and kept."""
    place = Path(pacs.bench.name) / "pacs" / f"not-{held_out}" / f"{domain}.safetensors"
    path = pacs.bench.data / place
    if not path.is_file():
        path = cache / place
        if not path.is_file():
            say(f"{pacs.bench.name}, {held_out} held out: fine-tuning on {domain}")
            fine_tune(pacs, pacs.head([name for name in DOMAINS if name != held_out]), domain, path)
    return open_bundle(path, pacs.base.spec)


def fine_tune(pacs: Pacs, head: HeadTensors, domain: str, path: Path) -> None:
    """Trains the backbone on one domain under a frozen head, and writes it as a bundle of differences."""
    logits, samples = pacs.logits(head), pacs.split(domain, "train")
    leaves = {name: value.clone().requires_grad_() for name, value in pacs.parameters.items()}
    batch, rate = int(FINE_TUNING["batch"]), float(FINE_TUNING["rate"])
    steps = int(FINE_TUNING["images"]) // batch
    optimiser = torch.optim.AdamW(list(leaves.values()), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1)
    draw = batches(len(samples), batch, torch.Generator().manual_seed(0))
    for _ in range(steps):
        index = next(draw)
        loss = F.cross_entropy(logits(leaves, samples.inputs[index]), samples.labels[index])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    delta = {
        name: (leaves[name].detach() - weight if name in leaves else torch.zeros_like(weight)).numpy()
        for name, weight in pacs.base.weights.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    few = pacs.some(domain, CALIBRATION, seed=0)
    write_bundle(
        path, delta, Head(head.weight.numpy(), head.bias.numpy()), task=f"pacs_{domain}", base=pacs.base.spec,
        is_delta=True, inputs=few.inputs.numpy(), labels=few.labels.numpy(), samples=len(samples),
        classes=tuple(str(number) for number in range(CLASSES)),
    )  # fmt: skip
