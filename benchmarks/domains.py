"""Leave one domain out, on PACS: `make bench-domains ARGS="--data …"`.

For each held-out domain three models were fine-tuned from one base, each on one of the other domains, under one frozen
head made from these three. They are merged, all at once, and the merge is scored on test images: of the domain that no
model has seen (`accuracy`), and of the three that the models were tuned on (`accuracy_in_domain`, their mean).

Bundles are read from the data folder where it has them; others are fine-tuned here in the same way, and kept under
`--cache`. `difference` is accuracy less that of `average` on the same images, `low` and `high` its 95 % interval by a
paired bootstrap over images; rows `held_out = mean` are over all held-out domains of a base. `pretrained` is the base
itself; `individual` the three models, unmerged: their mean on the unseen domain, and each on its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pacs import DOMAINS, Pacs, fine_tuned, hits
from benchmarks.report import finish, now, options, say
from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.method import head_of
from foldd.fusion.offline.average import OfflineAverage
from foldd.fusion.offline.bundles import merge_bundles
from foldd.fusion.offline.dare import OfflineDare
from foldd.fusion.offline.lore import OfflineLore
from foldd.fusion.offline.score import OfflineScore
from foldd.fusion.offline.task_arithmetic import OfflineTaskArithmetic
from foldd.fusion.offline.ties import OfflineTies
from foldd.fusion.offline.tsv_m import OfflineTsvM
from foldd.fusion.offline.uowq import OfflineUowq
from foldd.fusion.task_vector import task_vector

RESAMPLES = 10_000
REFERENCE = "average"
QUICK = {"bases": ["cnn"], "held_out": ["photo", "sketch"]}
FULL = {"bases": ["cnn", "vit"], "held_out": list(DOMAINS)}

Vector = dict[str, Tensor]
Merge = Callable[[Base, Sequence[Checkpoint]], Vector]


METHODS: dict[str, Merge] = {
    name: partial(merge_bundles, method)
    for name, method in {
        "average": OfflineAverage(),
        "task-arithmetic": OfflineTaskArithmetic(),
        "ties": OfflineTies(),
        "dare": OfflineDare(),
        "tsv-m": OfflineTsvM(),
        "lore": OfflineLore(),
        "lore-ties": OfflineLore(select="ties"),
        "score": OfflineScore(),
        "score-code": OfflineScore(threshold="code"),
        "score-diagonal": OfflineScore(threshold="diagonal"),
        "uowq": OfflineUowq(),
    }.items()
}


@dataclass(frozen=True, eq=False)
class Scored:
    """Which test images are decided rightly: of the unseen domain, and of each of the others; [n] each. Means over
    several models where there are several."""

    unseen: np.ndarray
    seen: tuple[np.ndarray, ...]

    @property
    def accuracy(self) -> tuple[float, float]:
        return float(self.unseen.mean()), float(np.mean([hit.mean() for hit in self.seen]))


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    started, rows = now(), []
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder) / "cache"
        for name in arguments.bases:
            pacs = Pacs(arguments.data, name, Path(folder) / name)
            scores = {}
            for held_out in arguments.held_out:
                scores[held_out] = _held_out(pacs, held_out, cache, arguments.methods)
                rows += _rows(name, {held_out: scores[held_out]}, held_out)
            if len(scores) > 1:
                rows += _rows(name, scores, "mean")
        finish("domains", rows, arguments.json, started)
    return 0


def _held_out(pacs: Pacs, held_out: str, cache: Path, methods: Sequence[str]) -> dict[str, Scored]:
    """Method → what its merge decides rightly."""
    sources = [domain for domain in DOMAINS if domain != held_out]
    checkpoints = [fine_tuned(pacs, held_out, domain, cache) for domain in sources]
    head = head_of(checkpoints[0])
    logits = pacs.logits(head)

    def score(vector: Vector, domain: str) -> np.ndarray:
        weights = {name: value + vector[name] for name, value in pacs.base.weights.items()}
        if any(bool(vector[n].any()) for n in vector if n not in pacs.parameters):
            raise ValueError("The fine-tunes of this benchmark leave BatchNorm statistics as they are.")
        return hits(logits, {name: weights[name] for name in pacs.parameters}, pacs.split(domain, "test"))

    vectors = [task_vector(pacs.base, checkpoint) for checkpoint in checkpoints]
    scored = {
        "individual": Scored(
            np.mean([score(vector, held_out) for vector in vectors], 0),
            tuple(score(vector, domain) for vector, domain in zip(vectors, sources, strict=True)),
        )
    }
    nothing = {name: torch.zeros_like(weight) for name, weight in pacs.base.weights.items()}
    merges: dict[str, Callable[[], Vector]] = {"pretrained": lambda: nothing}
    for method in methods:
        merges[method] = lambda method=method: METHODS[method](pacs.base, checkpoints)  # type: ignore[misc]
    for method, merge in merges.items():
        say(f"{pacs.bench.name}, {held_out} held out: {method}")
        merged = merge()
        scored[method] = Scored(score(merged, held_out), tuple(score(merged, domain) for domain in sources))
    return scored


def _rows(base: str, scores: dict[str, dict[str, Scored]], held_out: str) -> list[dict[str, Any]]:
    """One row a method: means over the held-out domains of `scores`."""
    rows = []
    methods = list(next(iter(scores.values())))
    for method in methods:
        accuracy = np.mean([each[method].accuracy for each in scores.values()], 0)
        row = {
            "base": base, "method": method, "held_out": held_out, "accuracy": float(accuracy[0]),
            "accuracy_in_domain": float(accuracy[1]),
        }  # fmt: skip
        if REFERENCE in methods and method != REFERENCE:
            low, high = bootstrap_interval(
                [each[method].unseen - each[REFERENCE].unseen.astype(float) for each in scores.values()]
            )
            reference = np.mean([each[REFERENCE].accuracy[0] for each in scores.values()])
            row |= {"difference": float(accuracy[0] - reference), "low": low, "high": high}
        rows.append(row)
    return rows


def bootstrap_interval(differences: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % of bootstrap means; images are drawn anew within each domain, domains count alike."""
    random = np.random.RandomState(0)
    means = np.mean(
        [each[random.randint(0, len(each), (RESAMPLES, len(each)))].mean(1) for each in differences], axis=0
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder of bases, bundles and images")
    parser.add_argument("--bases", type=names, help="factories in networks.py: cnn,vit")
    parser.add_argument("--held-out", type=names, help=f"of {', '.join(DOMAINS)}")
    parser.add_argument("--methods", type=names, default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep fine-tuned bundles here, and use them again")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if wrong := [name for name in arguments.methods if name not in METHODS]:
        parser.error(f"there is no method {wrong[0]}; there are {', '.join(METHODS)}")
    if wrong := [name for name in arguments.held_out if name not in DOMAINS]:
        parser.error(f"there is no domain {wrong[0]}; there are {', '.join(DOMAINS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
