"""One run of `continual`: a method folds one list of tasks in one order, and is scored. Results are kept as JSON."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench_data
from benchmarks.bench_data import Bench, settled_rss
from benchmarks.rivals.joint import JOINT
from benchmarks.rivals.table import CONTINUAL, module_digest, source_digest
from foldd.core.files import write_file
from foldd.daemon.memory import peak_rss_bytes, reset_peak
from foldd.fusion.alignment import Alignment, Mode
from foldd.fusion.method import head_of
from foldd.fusion.state import merged_weights

PLAIN = ("pretrained", "individual")
PICTURED = ("individual", "average", "otmf")  # their features are kept for a picture

Result = dict[str, Any]


class Store:
    """Results by what they were measured on: a file each, and one for features that a picture needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, bench: Bench, tasks: tuple[str, ...], method: str, order: int, heads: Mode = "frozen") -> Path:
        facts = {
            "base": bench.base.spec.digest, "split": bench.split, "tasks": [[t, bench.digests[t]] for t in tasks],
            "method": method, "order": order, "scoring": _digest(__file__, bench_data.__file__),
            "source": "" if method in PLAIN else source_digest(method, bench), "heads": heads,
            "heads_source": "" if heads == "frozen" else module_digest(Alignment.__module__),
        }  # fmt: skip
        short = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return self.folder / f"{bench.name}-{len(tasks)}-{bench.split}-{method}-{heads}-{order}-{short}.json"

    def read(self, path: Path, curves: bool) -> Result | None:
        """A result, if there is one that has what is asked for."""
        if not path.is_file():
            return None
        result: Result = json.loads(path.read_text())
        return result if result["curves"] or not curves else None

    def write(self, path: Path, result: Result, features: dict[str, np.ndarray]) -> None:
        if features:
            with path.with_suffix(".npz").open("wb") as file:
                np.savez_compressed(file, **features)  # type: ignore[arg-type]
        write_file(path, json.dumps(result, indent=1).encode() + b"\n")  # last: it says that the rest is whole


def measure(
    bench: Bench,
    tasks: tuple[str, ...],
    method: str,
    order: int,
    curves: bool,
    progress: Callable[[float], None],
    heads: Mode = "frozen",
) -> tuple[Result, dict[str, np.ndarray]]:
    """A run's result, and features for a picture where it has its place in one.

    The seconds and the memory of a fold are those of its heads too.

    The result: `final` and `own`, task → accuracy after the last fold and right after its own; `fold_seconds` and
    `fold_peak_bytes` of each fold (a joint merge is one). With `curves` also `table`, accuracy [generation][task so
    far] on a part of the images, and for the listed order `shift`, task → mean L1 distance of the final features from
    the task's own model's.
    """
    run = _Run(bench, tasks, method, order, curves, heads)
    if method in PLAIN:
        run.score_plain()
    elif method in JOINT:
        run.merge_jointly()
    else:
        run.fold_all(progress)
    return run.result, run.features


class _Run:
    def __init__(
        self, bench: Bench, tasks: tuple[str, ...], method: str, order: int, curves: bool, heads: Mode
    ) -> None:
        self.bench, self.tasks, self.method, self.order = bench, tasks, method, order
        self.alignment = Alignment(heads)
        self.heads = {task: head_of(bench.checkpoint(task)) for task in tasks}  # as they are by now
        self.features: dict[str, np.ndarray] = {}
        self.result: Result = {
            "method": method, "heads": heads, "order": list(tasks), "curves": curves, "final": {}, "own": {},
            "table": [], "shift": {}, "fold_seconds": [], "fold_peak_bytes": [],
        }  # fmt: skip

    def score_plain(self) -> None:
        for task in self.tasks:
            weights = self.bench.base.weights if self.method == "pretrained" else self.bench.individual(task)
            self._score_last(task, weights)

    def merge_jointly(self) -> None:
        base = self.bench.base
        with _Measured(self.bench, self.result):
            vector = JOINT[self.method](base, [self.bench.checkpoint(task) for task in self.tasks])
        weights = {name: weight + vector[name] for name, weight in base.weights.items()}
        for task in self.tasks:
            self._score_last(task, weights)

    def fold_all(self, progress: Callable[[float], None]) -> None:
        fold = CONTINUAL[self.method](self.bench)
        state = fold.init(self.bench.base)
        for number, task in enumerate(self.tasks):
            checkpoint = self.bench.checkpoint(task)
            with _Measured(self.bench, self.result):
                after, report = fold.fold(state, checkpoint, seed=self.order)
                state, _ = self.alignment.after_fold(state, checkpoint, after, report)
            del checkpoint, after
            self.heads |= state.heads
            self._score_fold(number, dict(merged_weights(state)))
            progress((number + 1) / len(self.tasks))

    def _score_fold(self, number: int, weights: dict[str, Any]) -> None:
        """Its own task, after the last fold all of them, and for curves a part of the others' images."""
        last, row = number == len(self.tasks) - 1, []
        for task in self.tasks[: number + 1]:
            places = self.bench.images[task].curve
            if last:
                hits = self._score_last(task, weights)[places]
            elif task == self.tasks[number]:
                hits = self._hits(task, weights)
                self.result["own"][task] = float(hits.mean())
                hits = hits[places]
            elif self.result["curves"]:
                hits = self._hits(task, weights, places)
            else:
                continue
            row.append(float(hits.mean()))
        if last:
            self.result["own"][task] = self.result["final"][task]
        if self.result["curves"]:
            self.result["table"].append(row)

    def _hits(self, task: str, weights: Any, places: np.ndarray | None = None) -> np.ndarray:
        return self.bench.hits(self.bench.features(weights, task, places), self.heads[task], task, places)

    def _score_last(self, task: str, weights: Any) -> np.ndarray:
        features = self.bench.features(weights, task)
        hits = self.bench.hits(features, self.heads[task], task)
        self.result["final"][task] = float(hits.mean())
        if self.result["curves"] and self.order == 0:
            own = self.bench.own_features[task]
            self.result["shift"][task] = float((features - own).abs().sum(1).mean())
            if self.method in PICTURED and task in (self.tasks[0], self.tasks[-1]):
                places = self.bench.images[task].curve
                self.features[f"{task}/features"] = features[places].numpy()
                self.features[f"{task}/labels"] = self.bench.images[task].y[places]
        return hits


class _Measured:
    """Seconds and peak memory of what is done inside, added to a result."""

    def __init__(self, bench: Bench, result: Result) -> None:
        self.bench, self.result = bench, result

    def __enter__(self) -> None:
        settled_rss()
        reset_peak()
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.result["fold_seconds"].append(time.perf_counter() - self.begun)
        self.result["fold_peak_bytes"].append(max(0, peak_rss_bytes() - self.bench.baseline_bytes))


def _digest(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
