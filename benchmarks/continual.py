"""Accuracy of continual merging on real tasks, foldd's methods and rivals: `make bench-continual ARGS="--data …"`.

Bundles are folded one by one, in this process, in seeded orders (0: as listed), and scored on images that no model has
seen, under their heads as they came (`frozen`), or as foldd moves them after each fold: `aligned`, without labels, or
`tuned`, with the labels of each bundle's calibration images. `accuracy` is the mean over tasks after the last fold,
then over orders; `bwt` the mean over all tasks but the last of (accuracy at the end − right after its own fold);
`gain` the share of what the individual models gain over the unfolded base; `worst_task` the least that any task in any
order gains over the same merge with frozen heads. `seconds` is the mean of a fold from the second on, `peak_rss_bytes`
that of the largest fold, both with heads. Methods named `joint-…` see all models at once: one merge, for reference;
`continual-finetuning` uses the labels of the training images.

Settings are chosen on `--split validation`; the test images are for the last word.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.bench_data import ALL12, Bench, orders, task_list
from benchmarks.continual_run import PLAIN, Result, Store, measure
from benchmarks.report import add_data, finish, now, options, prepare_plots, say
from benchmarks.rivals.joint import JOINT
from benchmarks.rivals.table import METHODS
from foldd.core.errors import FolddError
from foldd.fusion.alignment import Mode

QUICK = {"bases": ["vit"], "tasks": [8], "orders": 1, "methods": ["average", "opcm", "otmf"]}
HEADS: tuple[Mode, ...] = get_args(Mode)
FULL = {"bases": ["vit", "cnn"], "tasks": [8, len(ALL12)], "orders": 5, "methods": list(METHODS)}


@dataclass(frozen=True)
class Job:
    base: str
    tasks: int
    method: str
    order: int
    heads: Mode = "frozen"

    @property
    def kind(self) -> tuple[str, int, str, Mode]:
        return self.base, self.tasks, self.method, self.heads


@dataclass
class Clock:
    """Progress in percent, and the time left, by what other runs of the same method took."""

    jobs: list[Job]
    taken: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def say(self, done: int, part: float = 0.0) -> None:
        """After `done` jobs and a part of the next."""
        costs = [self._cost(job) for job in self.jobs]
        past = sum(costs[:done]) + (part * costs[done] if done < len(costs) else 0.0)
        total = sum(costs)
        left = f", about {_minutes(total - past)} left" if self.taken else ""
        name = " ".join(map(str, self.jobs[min(done, len(costs) - 1)].__dict__.values()))
        say(f"{100 * past / total if total else 100:3.0f} %{left}: {name}")

    def _cost(self, job: Job) -> float:
        known = self.taken.get((job.base, job.method)) or [
            seconds for (_, method), each in self.taken.items() for seconds in each if method == job.method
        ]
        known = known or [seconds for each in self.taken.values() for seconds in each] or [1.0]
        return float(np.mean(known)) * job.tasks


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    started, results, failed = now(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.cache or Path(folder) / "results")
        clock = Clock(_jobs(arguments))
        done = 0
        for name in arguments.bases:
            lists = {count: task_list(arguments.data, name, count) for count in arguments.tasks}
            longest = lists[max(lists)]
            bench = Bench(arguments.data, name, longest, arguments.split, Path(folder) / name)
            shuffled = {count: orders(tasks, arguments.orders) for count, tasks in lists.items()}
            for job in [job for job in clock.jobs if job.base == name]:
                tasks = shuffled[job.tasks][job.order]
                path = store.path(bench, tasks, job.method, job.order, job.heads)
                result = store.read(path, bool(arguments.plots))
                if result is None:
                    clock.say(done)
                    begun = time.perf_counter()
                    try:
                        result, features = measure(
                            bench, tasks, job.method, job.order, bool(arguments.plots), lambda _: None, job.heads
                        )
                        store.write(path, result, features)
                    except (FolddError, OSError, RuntimeError, ValueError, AssertionError):
                        say(traceback.format_exc())
                        failed.append(job)
                    clock.taken[job.base, job.method].append((time.perf_counter() - begun) / job.tasks)
                done += 1
                if result is not None:
                    results[job] = result | {"features": str(path.with_suffix(".npz"))}
            del bench
            gc.collect()
        clock.say(done)
        rows = [
            row
            for kind in dict.fromkeys(job.kind for job in clock.jobs)
            if (row := summary(kind, results, arguments.split))
        ]
        finish("continual", rows, arguments.json, started)
        if arguments.plots:
            from benchmarks.plots import draw_all

            # The pictures know a method by its name alone: they show the first of the heads.
            first = arguments.heads[0]
            shifts = draw_all(
                arguments.plots, {j: r for j, r in results.items() if j.heads == first or _plain(j.method)}
            )
            finish("continual", shifts, arguments.plots / "feature_shift.json", started)
    for job in failed:
        say(f"not measured: {job}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    add_data(parser, split="test")
    parser.add_argument("--bases", type=lambda text: text.split(","), help="factories in networks.py: vit,cnn")
    parser.add_argument("--tasks", type=lambda text: [int(n) for n in text.split(",")], help="how many: 8,12")
    parser.add_argument("--orders", type=int, help="task orders, the first as listed; 5 unless told")
    parser.add_argument("--methods", type=lambda text: text.split(","), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--heads", type=lambda text: text.split(","), default=["frozen"], help=f"of {', '.join(HEADS)}")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.methods = [name for name in dict.fromkeys(arguments.methods) if name not in PLAIN]
    if unknown := [name for name in arguments.methods if name not in METHODS]:
        parser.error(f"there is no method {', '.join(unknown)}; there are {', '.join((*PLAIN, *METHODS))}")
    if not set(arguments.heads) <= set(HEADS):
        parser.error(f"--heads is of {', '.join(HEADS)}")
    if min(*arguments.tasks, 2) < 2 or arguments.orders < 1:
        parser.error("at least 2 tasks and 1 order")
    prepare_plots(parser, arguments.plots, "matplotlib", "sklearn")
    return arguments


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Orders outside methods, so that every method is known early, and with it the time left."""
    return [
        Job(base, tasks, method, order, heads)
        for base in arguments.bases
        for order in range(arguments.orders)
        for tasks in arguments.tasks
        for method in (*PLAIN, *arguments.methods)
        if order == 0 or not _plain(method)
        for heads in (["frozen"] if _plain(method) else arguments.heads)
    ]


def _plain(method: str) -> bool:
    """Whether nothing is folded one after the other, so that there are no orders, and heads have nothing to follow."""
    return method in (*PLAIN, *JOINT)


def summary(kind: tuple[str, int, str, Mode], results: Mapping[Job, Result], split: str) -> dict[str, Any] | None:
    """The runs of a base, a number of tasks, a method and its heads in all orders as one row; None: there are none."""
    base, tasks, method, heads = kind
    runs = [result for job, result in results.items() if job.kind == kind]
    if not runs:
        return None
    scores = [_mean(run["final"].values()) for run in runs]
    low, high = (
        _mean(results[job]["final"].values()) if (job := Job(base, tasks, plain, 0)) in results else None
        for plain in PLAIN
    )
    accuracy = _mean(scores)
    gain = (accuracy - low) / (high - low) if low is not None and high is not None and high != low else None
    losses = [_mean(run["final"][t] - run["own"][t] for t in run["order"][:-1]) for run in runs if run["own"]]
    # The first fold takes the task vector as it is; a joint merge has only one.
    seconds = [s for run in runs for s in (run["fold_seconds"][1:] or run["fold_seconds"])]
    peaks = [peak for run in runs for peak in run["fold_peak_bytes"]]
    return {
        "base": base, "tasks": tasks, "method": method, "heads": heads, "split": split,
        "accuracy": accuracy, "accuracy_std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None, "gain": gain,
        "bwt": _mean(losses) if losses else None, "worst_task": _worst(kind, results), "orders": len(runs),
        "seconds": _mean(seconds) if seconds else None, "peak_rss_bytes": max(peaks, default=None),
    }  # fmt: skip


def _worst(kind: tuple[str, int, str, Mode], results: Mapping[Job, Result]) -> float | None:
    """The smallest change of a task's accuracy against frozen heads in the same order; None where there is none."""
    changes = [
        accuracy - results[frozen]["final"][task]
        for job, result in results.items()
        if job.kind == kind and job.heads != "frozen" and (frozen := replace(job, heads="frozen")) in results
        for task, accuracy in result["final"].items()
    ]
    return min(changes, default=None)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
