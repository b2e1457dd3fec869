"""UOWQ on PACS: few-shot targets with three source domains, adapters, and all domains at once.

Every part gives rows for one target, seed and so on; `benchmarks.uowq` puts them together. Tuning samples are training
images; accuracy is on test images. Times are processor seconds of one thread, so that other work does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.pacs import DOMAINS, Pacs, hits, mean_loss
from foldd.base.network import Base
from foldd.fusion.fisher import Logits, Parameters
from foldd.fusion.matrices import as_matrix, is_factored
from foldd.fusion.transfer_weights import TransferWeights, effective_dimension
from foldd.fusion.uowq_train import Samples, Source, TransferTraining, source_weights, train_target, train_tasks

RANK = 8  # of the adapters
TRAINING = TransferTraining(epochs=3, batch=32, learning_rate=1.5e-4)  # the rate was chosen on validation images
ADAPTER_RATE = 3e-3  # of the adapters, which start at zero

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Setting:
    """What is trained, from where, and as which function: the whole network, or adapters beside it."""

    logits: Logits
    parameters: Parameters
    training: TransferTraining


class Study:
    """One base with its settings; source models are trained once for each target and seed."""

    def __init__(self, pacs: Pacs, source_samples: int, training: TransferTraining = TRAINING) -> None:
        self.pacs, self.training = pacs, training
        self._sources = cache(self._train_sources)
        self.source_samples = source_samples

    def few_shot(self, target: str, shots: int, seed: int, *, half: bool = False, adapters: bool = False) -> list[Row]:
        """All methods on one target: rows with accuracy, and for UOWQ the last weights and shares."""
        count = self.source_samples // 2 if half else self.source_samples
        setting, sources, dimension = self._sources(target, seed, count, adapters)
        samples, test = self.pacs.shots(target, shots, seed), self.pacs.split(target, "test")
        same: Row = {
            "part": "lora" if adapters else "few-shot", "base": self.pacs.bench.name, "target": target, "shots": shots,
            "seed": seed, "source_samples": len(sources[0].samples),
        }  # fmt: skip
        rows = []
        for method, used, changes, fixed in _methods(len(sources), dimension):
            if (half or adapters) and method in ("uowq-static", "uowq-static-aic"):
                continue
            if half and not method.startswith("uowq"):
                continue
            training = replace(setting.training, **changes)
            begun = time.process_time()
            found = train_target(
                setting.logits, setting.parameters, samples, sources if used else [], training, seed=seed, fixed=fixed
            )
            seconds = time.process_time() - begun
            accuracy = float(hits(setting.logits, found.parameters, test).mean())
            weights = found.weights[-1] if found.weights else None
            rows.append(
                same | {"method": method, "accuracy": accuracy, "cpu_seconds": seconds} | _shown(weights, target)
            )
            if changes.get("dimension"):
                rows[-1]["dimension"] = round(dimension, 1)
        return rows

    def overhead(self, target: str, shots: int, seed: int) -> list[Row]:
        """Training on all samples alike, and one computation of the weights, in turn: what dynamic weights add."""
        setting, sources, _ = self._sources(target, seed, self.source_samples, False)
        samples = self.pacs.shots(target, shots, seed)
        seconds: dict[str, list[float]] = {"training": [], "weights": []}
        for _ in range(3):
            begun = time.process_time()
            train_target(
                setting.logits, setting.parameters, samples, sources, replace(setting.training, epochs=1), seed=seed,
                fixed=[1.0] * len(sources),
            )  # fmt: skip
            middle = time.process_time()
            source_weights(setting.logits, setting.parameters, samples, sources)
            seconds["training"].append((middle - begun) * setting.training.epochs)
            seconds["weights"].append((time.process_time() - middle) * (setting.training.epochs - 1))
        train, weigh = (sorted(values)[1] for values in seconds.values())
        return [
            {
                "part": "overhead", "base": self.pacs.bench.name, "target": target, "shots": shots,
                "source_samples": len(sources[0].samples), "cpu_seconds": train, "weights_cpu_seconds": weigh,
                "overhead_percent": 100 * weigh / train,
            }
        ]  # fmt: skip

    def multi_task(self, seed: int) -> Iterator[Row]:
        """Algorithm 2 on the four domains, beside every domain alone and all domains alike."""
        head = self.pacs.head(DOMAINS)
        setting = Setting(self.pacs.logits(head), self.pacs.parameters, self.training)
        tasks = [self.pacs.some(domain, self.source_samples, seed) for domain in DOMAINS]
        alone = train_tasks(setting.logits, setting.parameters, tasks, setting.training, seed=seed, fixed=0.0)
        dimension = self._dimension(setting, DOMAINS, tasks, alone.parameters)
        runs: list[tuple[str, Any, float | None]] = [
            ("alike", 0.0, 1.0), ("uowq-dynamic", 0.0, None), ("uowq-dynamic-aic", dimension, None),
        ]  # fmt: skip
        for method, used, fixed in [("alone", 0.0, 0.0), *runs]:
            training = replace(setting.training, dimension=used)
            found = (
                alone
                if method == "alone"
                else train_tasks(setting.logits, setting.parameters, tasks, training, seed=seed, fixed=fixed)
            )
            for domain, parameters, weights in zip(DOMAINS, found.parameters, found.weights, strict=True):
                yield {
                    "part": "multi-task", "base": self.pacs.bench.name, "target": domain, "seed": seed,
                    "source_samples": self.source_samples, "method": method,
                    "accuracy": float(hits(setting.logits, parameters, self.pacs.split(domain, "test")).mean()),
                    **_shown(weights if fixed is None else None, domain),
                    **({"dimension": round(used, 1)} if used else {}),
                }  # fmt: skip

    def _train_sources(self, target: str, seed: int, count: int, adapters: bool) -> tuple[Setting, list[Source], float]:
        """The setting under a head made from the sources, their models, and how many dimensions these use."""
        names = [domain for domain in DOMAINS if domain != target]
        logits, parameters = self.pacs.logits(self.pacs.head(names)), self.pacs.parameters
        setting = Setting(logits, parameters, self.training)
        if adapters:
            setting = lora(self.pacs.base, setting)
        samples = [self.pacs.some(name, count, seed) for name in names]
        trained = [
            train_target(setting.logits, setting.parameters, one, [], setting.training, seed=seed).parameters
            for one in samples
        ]
        sources = [Source(one, parameters) for one, parameters in zip(samples, trained, strict=True)]
        return setting, sources, self._dimension(setting, names, samples, trained)

    def _dimension(
        self, setting: Setting, names: Sequence[str], samples: Sequence[Samples], trained: Sequence[Parameters]
    ) -> float:
        """The mean over sources of the effective dimension: loss on validation images less that on their own."""
        found = [
            effective_dimension(
                len(one),
                mean_loss(setting.logits, parameters, one),
                mean_loss(setting.logits, parameters, self.pacs.split(name, "validation")),
            )
            for name, one, parameters in zip(names, samples, trained, strict=True)
        ]
        return sum(found) / len(found)


def lora(base: Base, setting: Setting) -> Setting:
    """Adapters of rank 8 at every matrix and convolution, W + BA with B = 0 at the start; all else stays."""
    generator = torch.Generator().manual_seed(0)
    frozen = dict(setting.parameters)
    adapters: dict[str, Tensor] = {}
    names = [name for name in frozen if is_factored(base, name)]
    for name in names:
        rows, columns = as_matrix(frozen[name]).shape
        adapters[f"{name}/a"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        adapters[f"{name}/b"] = torch.zeros(rows, RANK)

    def logits(parameters: Parameters, inputs: Tensor) -> Tensor:
        whole = {
            name: weight + (parameters[f"{name}/b"] @ parameters[f"{name}/a"]).view(weight.shape)
            for name, weight in frozen.items()
            if f"{name}/b" in parameters
        }
        return setting.logits({**frozen, **whole}, inputs)

    return Setting(logits, adapters, replace(setting.training, learning_rate=ADAPTER_RATE))


def _methods(sources: int, dimension: float) -> list[tuple[str, bool, dict[str, Any], list[float] | None]]:
    """Name, whether sources are used, changed settings, fixed weights. `aic`: d is estimated, not counted."""
    return [
        ("target-only", False, {}, None),
        ("all-equal", True, {}, [1.0] * sources),
        ("uowq-static", True, {"dynamic": False}, None),
        ("uowq-dynamic", True, {}, None),
        ("uowq-static-aic", True, {"dynamic": False, "dimension": dimension}, None),
        ("uowq-dynamic-aic", True, {"dimension": dimension}, None),
    ]


def _shown(weights: TransferWeights | None, target: str) -> Row:
    """Weights and shares by source domain, as text."""
    if weights is None:
        return {}
    names = [domain for domain in DOMAINS if domain != target]
    return {
        "weights": " ".join(f"{name}={w:.4f}" for name, w in zip(names, weights.weights, strict=True)),
        "shares": " ".join(f"{name}={s:.4f}" for name, s in zip(names, weights.shares, strict=True)),
    }
