"""LoRE-Merging's figure 1 and table, on real models: `make bench-lore ARGS="--data …"`.

Parts:
- `spectra`: how low the rank of a task vector is: the share of a matrix' squared singular values in the leading 5, 10
  and 20 % of its rank, the mean over matrices, for each task and for a matrix of independent noise of the same shapes.
- `tasks`: three models of different tasks, merged at once; each scored on its own test images under its own head.
- `run`: three checkpoints of one training run (after a third, two thirds and all of it), merged; one task.

`difference` is accuracy less that of `average` on the same images, `low` and `high` its 95 % interval by a paired
bootstrap over images. Two models are no case: there every selection of LoRE is plain averaging.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_data import Bench, pixels
from benchmarks.domains import METHODS, bootstrap_interval
from benchmarks.report import add_data, finish, now, options, prepare_plots, say
from benchmarks.rivals.finetune import one_cycle
from foldd.core.bundle import Head, open_bundle, write_bundle
from foldd.core.roles import Role
from foldd.fusion.method import head_of
from foldd.fusion.offline.bundles import merge_bundles
from foldd.fusion.offline.lore import OfflineLore
from foldd.fusion.task_vector import task_vector

LEADING = (0.05, 0.1, 0.2)
TASKS = ("mnist", "notmnist", "quickdraw")
RUN_TASK, EPOCHS = "signdigits", 6
MERGES = {
    **{name: METHODS[name] for name in ("average", "task-arithmetic", "ties", "dare")},
    **{f"lore-{select}": partial(merge_bundles, OfflineLore(select=select)) for select in ("sum", "mean", "ties")},
}


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    started, rows = now(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.bases:
            bench = Bench(arguments.data, name, (*TASKS, RUN_TASK), arguments.split, Path(folder) / name)
            rows += [{"part": "spectra", **row} for row in _spectra(bench, arguments.plots)]
            rows += [{"part": "tasks", **row} for row in _tasks(bench)]
            rows += [{"part": "run", **row} for row in _run(bench, Path(folder))]
    finish("lore", rows, arguments.json, started)
    return 0


def _spectra(bench: Bench, plots: Path | None) -> Iterator[dict[str, Any]]:
    """Energy shares by task; the curves are drawn where there is a folder for pictures."""
    curves: dict[str, np.ndarray] = {}
    generator = torch.Generator().manual_seed(0)
    for task in (*TASKS, "noise"):
        vector = None if task == "noise" else task_vector(bench.base, bench.checkpoint(task))
        spectra = []
        for name, weight in bench.base.weights.items():
            if bench.base.role(name) not in (Role.MATRIX, Role.CONVOLUTION) or weight.dim() < 2:
                continue
            matrix = torch.randn(weight.shape, generator=generator) if vector is None else vector[name]
            energy = torch.linalg.svdvals(matrix.flatten(1).double()).square()
            spectra.append((energy.cumsum(0) / energy.sum()).numpy())
        # Curves of matrices of different rank, on one axis: the share of the rank.
        grid = np.linspace(0, 1, 101)
        curves[task] = np.mean([np.interp(grid, np.linspace(0, 1, len(s) + 1), [0, *s]) for s in spectra], axis=0)
        yield {
            "base": bench.name, "method": task,
            **{f"energy_{100 * share:.0f}": float(np.interp(share, grid, curves[task])) for share in LEADING},
        }  # fmt: skip
    if plots is not None:
        _draw(plots / f"spectra-{bench.name}.png", curves)


def _draw(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.6))
    for name, curve in curves.items():
        axis.plot(np.linspace(0, 1, len(curve)), curve, label=name, linestyle="--" if name == "noise" else "-")
    axis.set(xlabel="leading share of the rank", ylabel="share of the energy")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tasks(bench: Bench) -> Iterator[dict[str, Any]]:
    checkpoints = [bench.checkpoint(task) for task in TASKS]
    heads = {task: head_of(bench.checkpoint(task)) for task in TASKS}

    def score(vector: Mapping[str, Tensor]) -> list[np.ndarray]:
        weights = {name: weight + vector[name] for name, weight in bench.base.weights.items()}
        return [bench.hits(bench.features(weights, task), heads[task], task) for task in TASKS]

    alone = [bench.hits(bench.own_features[task], heads[task], task) for task in TASKS]
    nothing = {name: torch.zeros_like(weight) for name, weight in bench.base.weights.items()}
    yield from _rows(bench.name, {"pretrained": score(nothing), "individual": alone}, score, checkpoints, bench)


def _run(bench: Bench, folder: Path) -> Iterator[dict[str, Any]]:
    """Three checkpoints of one run under the task's frozen head."""
    say(f"{bench.name}: training {RUN_TASK}")
    paths = _train(bench, folder)
    checkpoints = [open_bundle(path, bench.base.spec) for path in paths]
    head = head_of(checkpoints[0])

    def score(vector: Mapping[str, Tensor]) -> list[np.ndarray]:
        weights = {name: weight + vector[name] for name, weight in bench.base.weights.items()}
        return [bench.hits(bench.features(weights, RUN_TASK), head, RUN_TASK)]

    single = {f"checkpoint {i + 1}": score(task_vector(bench.base, c)) for i, c in enumerate(checkpoints)}
    yield from _rows(bench.name, single, score, checkpoints, bench)


def _rows(
    base: str,
    known: Mapping[str, list[np.ndarray]],
    score: Callable[[Mapping[str, Tensor]], list[np.ndarray]],
    checkpoints: list[Any],
    bench: Bench,
) -> Iterator[dict[str, Any]]:
    scores = dict(known)
    for name, merge in MERGES.items():
        scores[name] = score(merge(bench.base, checkpoints))
        say(f"{base}: {name} {np.mean([hit.mean() for hit in scores[name]]):.4f}")
    for name, hits in scores.items():
        yield {
            "base": base, "method": name, "accuracy": float(np.mean([hit.mean() for hit in hits])),
            **_difference(hits, scores["average"]),
        }  # fmt: skip


def _difference(hits: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float]:
    """Mean over tasks of accuracy less the reference's on the same images, with its interval."""
    differences = [hit - other.astype(float) for hit, other in zip(hits, reference, strict=True)]
    low, high = bootstrap_interval(differences)
    return {"difference": float(np.mean([d.mean() for d in differences])), "low": low, "high": high}


def _train(bench: Bench, folder: Path) -> list[Path]:
    base, images, source = bench.base, bench.load(RUN_TASK, "train"), bench.checkpoint(RUN_TASK)
    inputs, labels, head = pixels(images.x), torch.from_numpy(images.y), head_of(source)
    weights = {name: weight.clone() for name, weight in base.weights.items()}
    trained = [weights[name].requires_grad_() for name in weights if base.role(name) is not Role.STATISTIC]
    optimiser = torch.optim.AdamW(trained, lr=1.5e-4)
    paths: list[Path] = []

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(base.features(weights, inputs[index])), labels[index])

    def keep(fraction: float) -> None:
        if fraction >= (len(paths) + 1) / 3 - 1e-9:
            paths.append(folder / f"{bench.name}-run-{len(paths)}.safetensors")
            delta = {name: (weight.detach() - base.weights[name]).numpy() for name, weight in weights.items()}
            write_bundle(
                paths[-1], delta, Head(head.weight.numpy(), head.bias.numpy()), task=RUN_TASK, base=base.spec,
                is_delta=True, inputs=source.inputs,
            )  # fmt: skip

    one_cycle(optimiser, loss_of, len(inputs), epochs=EPOCHS, batch=64, seed=0, progress=keep)
    return paths


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    add_data(parser, split="test")
    parser.add_argument("--bases", default="cnn,vit", type=lambda text: text.split(","))
    arguments = parser.parse_args()
    prepare_plots(parser, arguments.plots, "matplotlib")
    if arguments.quick:
        arguments.bases = arguments.bases[:1]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
