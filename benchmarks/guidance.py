"""How to fine-tune so that checkpoints merge well: `make bench-guidance ARGS="--data …"`.

Four tasks are fine-tuned from the base on their training images with one thing of the recipe changed at a time, then
folded one by one, under heads that follow without labels, and scored on images that no model has seen. `individual` is
the mean accuracy of the models alone, `accuracy` that of the merge after the last fold, `gain` the share of what the
models gain over the unfolded base that the merge keeps, `norm` the mean norm of the task vectors as a share of the
base's. `value` is the changed setting; `scale` multiplies finished task vectors. Rows of `bundles` are the folder's
own, made with more images. `unfolded` merges nothing: the bare base under heads that follow each recipe's models.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_data import Bench, orders
from benchmarks.continual_run import Result, Store, measure
from benchmarks.fine_tuning import Recipe, fine_tuned, mean_norm
from benchmarks.report import add_data, finish, now, options, prepare_plots, say
from foldd.fusion.alignment import Mode

TASKS = ("gtsrb", "quickdraw", "signdigits", "fsdd_spec")  # signs, drawings, photographs, spectrograms
METHODS = ("otmf", "average", "unfolded")
HEADS: Mode = "aligned"  # as shipped
USUAL = Recipe()
CHANGES: dict[str, dict[float | str, Recipe]] = {
    "learning rate": {rate: replace(USUAL, learning_rate=1.5e-4 * rate) for rate in (0.25, 1, 2, 4)},
    "epochs": {epochs: replace(USUAL, epochs=epochs) for epochs in (1, 2, 5)},
    "scale": {scale: replace(USUAL, scale=scale) for scale in (0.5, 1, 2, 3)},
    "head": {"frozen": USUAL, "trained": replace(USUAL, trains_head=True)},
    "bundles": {scale: Recipe(epochs=0, scale=scale) for scale in (0.5, 1)},
}
FEW: dict[str, dict[float | str, Recipe]] = {
    "learning rate": {rate: CHANGES["learning rate"][rate] for rate in (0.25, 1, 4)},
    "bundles": {scale: CHANGES["bundles"][scale] for scale in (0.5, 1)},
}


@dataclass(frozen=True)
class Measured:
    """One recipe's models: how good alone, how far from the base, how good merged by each method in each order."""

    norm: float
    individual: Result
    merged: dict[str, list[Result]]


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    started, rows = now(), []
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary) / "cache"
        store = Store(cache / "results")
        for name in arguments.bases:
            bench = Bench(arguments.data, name, TASKS, arguments.split, Path(temporary) / name)
            pretrained = _mean(_stored(store, bench, TASKS, "pretrained", 0)["final"])
            changes = FEW if arguments.quick or name == "cnn" else CHANGES
            recipes = list(dict.fromkeys(recipe for each in changes.values() for recipe in each.values()))
            measured = {}
            for number, recipe in enumerate(recipes):
                say(f"{name}: {100 * number / len(recipes):.0f} % of {len(recipes)} recipes")
                measured[recipe] = _measure(store, bench, recipe, arguments.orders, cache / "models")
            rows += [
                {"base": name, "tasks": len(TASKS), "varied": varied, "value": value, "split": arguments.split} | row
                for varied, each in changes.items()
                for value, recipe in each.items()
                for row in _rows(measured[recipe], pretrained)
            ]
    finish("guidance", rows, arguments.json, started)
    if arguments.plots:
        from benchmarks.guidance_plot import draw

        draw(arguments.plots / "guidance.png", rows)
    return 0


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    add_data(parser, split="validation")
    parser.add_argument("--bases", type=lambda text: text.split(","), help="vit,cnn unless told; cnn with few recipes")
    parser.add_argument("--orders", type=int, help="task orders, the first as listed; 2 unless told")
    arguments = parser.parse_args()
    arguments.bases = arguments.bases or (["vit"] if arguments.quick else ["vit", "cnn"])
    arguments.orders = arguments.orders or (1 if arguments.quick else 2)
    prepare_plots(parser, arguments.plots, "matplotlib")
    return arguments


def _measure(store: Store, bench: Bench, recipe: Recipe, count: int, folder: Path) -> Measured:
    own = fine_tuned(bench, TASKS, recipe, folder)
    merged = {
        method: [_stored(store, own, tasks, method, order, HEADS) for order, tasks in enumerate(orders(TASKS, count))]
        for method in METHODS
    }
    return Measured(mean_norm(own, TASKS), _stored(store, own, TASKS, "individual", 0), merged)


def _stored(
    store: Store, bench: Bench, tasks: tuple[str, ...], method: str, order: int, heads: Mode = "frozen"
) -> Result:
    path = store.path(bench, tasks, method, order, heads)
    result = store.read(path, curves=False)
    if result is None:
        result, features = measure(bench, tasks, method, order, False, lambda _: None, heads)
        store.write(path, result, features)
    return result


def _rows(measured: Measured, pretrained: float) -> Iterator[dict[str, Any]]:
    """A row for each method of merging."""
    alone = _mean(measured.individual["final"])
    for method, runs in measured.merged.items():
        scores = [_mean(run["final"]) for run in runs]
        accuracy = float(np.mean(scores))
        losses = [run["final"][task] - run["own"][task] for run in runs for task in run["order"][:-1]]
        yield {
            "method": method, "norm": measured.norm, "pretrained": pretrained, "individual": alone,
            "accuracy": accuracy, "accuracy_std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            "gain": (accuracy - pretrained) / (alone - pretrained) if alone > pretrained else None,
            "bwt": float(np.mean(losses)), "orders": len(runs),
        }  # fmt: skip


def _mean(scores: dict[str, float]) -> float:
    return float(np.mean(list(scores.values())))


if __name__ == "__main__":
    sys.exit(main())
