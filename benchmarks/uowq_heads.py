"""`[heads] weighting` on PACS: three domains folded one after another, heads tuned with and without borrowed samples.

For each held-out domain three models were fine-tuned, each on one of the other domains, under one frozen head made from
these three. They are folded one after another; after the last fold each domain is scored under its own head.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

from benchmarks.pacs import DOMAINS, Pacs, fine_tuned
from foldd.fusion.alignment import Alignment, Weighting
from foldd.fusion.average import Average
from foldd.fusion.method import FoldMethod
from foldd.fusion.otmf import Otmf
from foldd.fusion.state import MergeState, merged_weights

FOLDS: dict[str, FoldMethod] = {"average": Average(), "otmf": Otmf()}
WEIGHTINGS: tuple[Weighting, ...] = ("none", "uowq")

Row = dict[str, Any]


def orders(held_out: str) -> list[tuple[str, ...]]:
    return list(permutations(domain for domain in DOMAINS if domain != held_out))


def rows(pacs: Pacs, cache: Path, held_out: str, fold: str, order: tuple[str, ...], split: str = "test") -> list[Row]:
    """A row for each weighting, with the accuracy after the last fold: the mean over domains, and each."""
    found = []
    for weighting in WEIGHTINGS:
        alignment, method = Alignment("tuned", weighting=weighting), FOLDS[fold]
        state, weights = method.init(pacs.base), []
        for domain in order:
            checkpoint = fine_tuned(pacs, held_out, domain, cache)
            after, report = method.fold(state, checkpoint, seed=0)
            state, report = alignment.after_fold(state, checkpoint, after, report)
            weights += [f"{report.task}: {task}={weight:.3f}" for task, weight in report.source_weights.items()]
        accuracy = {domain: _accuracy(pacs, state, domain, split) for domain in order}
        found.append(
            {
                "part": "heads", "base": pacs.bench.name, "held_out": held_out, "fold": fold, "order": " ".join(order),
                "split": split, "method": weighting, "accuracy": sum(accuracy.values()) / len(accuracy), **{
                    f"accuracy_{domain}": value for domain, value in accuracy.items()
                },
                "weights": "; ".join(weights),
            }
        )  # fmt: skip
    return found


def _accuracy(pacs: Pacs, state: MergeState, domain: str, split: str) -> float:
    features, labels = pacs.features(merged_weights(state), [pacs.split(domain, split)])
    return float((state.heads[f"pacs_{domain}"].logits(features).argmax(1) == labels).float().mean())
