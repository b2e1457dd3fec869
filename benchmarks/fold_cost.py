"""What a fold costs: seconds, memory and state of every method: `make bench-fold-cost`.

`--part model`: a base with CLIP ViT-B/32's vision shapes, 87.5 M parameters, random weights and random task vectors.
`--part bench`: the bases of `--data`, with accuracy on test images. `--part opcm`: its projection, by factorisation.

Each method folds in a process of its own, from file to file as foldd's worker does, and the methods take turns fold by
fold, so that other load on the machine meets all of them. `seconds` is the median of the folds from the second on (the
first takes the vector as it is), `seconds_low` and `seconds_high` the spread, `cpu_seconds` the median of user and
system time. `peak_rss_bytes` is the largest fold's high-water mark minus what was resident after the imports;
`activation_bytes` what running the network costs by itself, without masks, moments or copies of weights, on the same
inputs; `peak_per_model` = (peak − activations) / `model_bytes`; `drift_bytes` the last fold's peak minus the second's.

`otmf-paper` and `otmf-naive` take 100 steps a fold. With fewer (`--steps`) their seconds are multiplied up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_data import Bench, task_list
from benchmarks.fold_cost_data import make_base, make_bundle
from benchmarks.opcm_cost import opcm_rows
from benchmarks.report import finish, now, options, say
from foldd.core.tensorfile import open_tensors
from foldd.daemon.methods import METHODS
from foldd.daemon.pipeline import read_state
from foldd.fusion.state import MergeState, merged_weights

STEPS = 100
DESCENDING = ("otmf-paper", "otmf-naive")
PARTS = ("model", "bench", "opcm")

Answer = dict[str, Any]


class Worker:
    """A method's process and what it answered."""

    def __init__(self, base: Path, method: str, folder: Path, arguments: argparse.Namespace) -> None:
        steps = {"steps": arguments.steps} if method in DESCENDING else {}
        self.method, self.folder, self.scale = method, folder, STEPS / arguments.steps if steps else 1.0
        command = [sys.executable, "-m", "benchmarks.fold_cost_worker", str(base), method, json.dumps(steps)]
        self._process = subprocess.Popen(
            [*command, str(arguments.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers: list[Answer] = []
        self.state: Path | None = None

    def fold(self, bundle: Path) -> Answer:
        target = self.folder / f"{self.method}-{len(self.answers) + 1}.safetensors"
        answer = self._ask({"bundle": str(bundle), "state": self.state and str(self.state), "target": str(target)})
        if self.state is not None:
            self.state.unlink()
        self.state = target
        self.answers.append(answer)
        return answer

    def row(self, base: str, model_bytes: int, bundle: Path, accuracy: float | None) -> dict[str, Any]:
        activations = self._ask({"activations": str(bundle)})["activation_bytes"]
        self.close()
        later = self.answers[1:]
        seconds = [answer["seconds"] * self.scale for answer in later]
        peaks = [answer["peak_rss_bytes"] for answer in later]
        return {
            "base": base, "method": self.method, "model_bytes": model_bytes, "seconds": statistics.median(seconds),
            "seconds_low": min(seconds), "seconds_high": max(seconds),
            "cpu_seconds": statistics.median(answer["cpu_seconds"] for answer in later) * self.scale,
            "peak_rss_bytes": max(peaks), "activation_bytes": activations,
            "peak_per_model": (max(peaks) - activations) / model_bytes, "drift_bytes": peaks[-1] - peaks[0],
            "state_bytes": self.answers[-1]["state_bytes"], "folds": len(self.answers), "accuracy": accuracy,
        }  # fmt: skip

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, order: dict[str, Any]) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: Answer = json.loads(self._process.stdout.readline() or "{}")
        if not answer:
            raise RuntimeError(f"The process of {self.method} ended with status {self._process.wait()}.")
        return answer


def main() -> int:
    arguments = _arguments()
    started, rows = now(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "model" in arguments.part:
            rows += _model_rows(folder / "model", arguments)
        if "bench" in arguments.part:
            for base in arguments.bases.split(","):
                rows += _bench_rows(base, folder / base, arguments)
        if "opcm" in arguments.part:
            torch.set_num_threads(arguments.threads)
            rows += opcm_rows(1 if arguments.quick else 5)
    finish("fold_cost", rows, arguments.json, started)
    return 0


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder of bases, bundles and images, for the part `bench`")
    parser.add_argument("--part", type=lambda text: text.split(","), help="of model,bench,opcm; all unless told")
    parser.add_argument("--bases", default="vit,cnn")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="for the part `model`")
    parser.add_argument("--folds", type=int, help="for the part `model`; 6 unless told, 2 for methods that descend")
    parser.add_argument("--steps", type=int, help="of the methods that descend; 100 unless told")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    known = (*METHODS, "otmf-naive")
    arguments.methods = arguments.methods or (["average", "otmf", "otmf-naive"] if arguments.quick else list(known))
    arguments.folds = arguments.folds or (2 if arguments.quick else 6)
    arguments.steps = arguments.steps or (2 if arguments.quick else STEPS)
    arguments.part = arguments.part or [part for part in PARTS if part != "bench" or arguments.data]
    if unknown := [name for name in arguments.methods if name not in known]:
        parser.error(f"there is no method {', '.join(unknown)}; there are {', '.join(known)}")
    if unknown := [part for part in arguments.part if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if "bench" in arguments.part and not arguments.data:
        parser.error("the part `bench` needs --data")
    if arguments.folds < 2 or arguments.steps < 1:
        parser.error("at least 2 folds and 1 step")
    return arguments


def _model_rows(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    folder.mkdir()
    say("making the base and its bundles")
    _apart(make_base, folder / "base")
    bundles = [folder / f"task{number}.safetensors" for number in range(1, arguments.folds + 1)]
    for number, bundle in enumerate(bundles, 1):
        _apart(make_bundle, folder / "base", bundle, number)
    workers = [Worker(folder / "base", method, folder, arguments) for method in arguments.methods]
    for number, bundle in enumerate(bundles, 1):
        for worker in workers:
            if number <= 2 or worker.method not in DESCENDING:
                _say(worker, worker.fold(bundle), number)
    size = sum(4 * tensor.size for tensor in open_tensors(folder / "base" / "weights.safetensors").tensors.values())
    return [worker.row("vit-b32", size, bundles[1], None) for worker in workers]


def _bench_rows(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    tasks = task_list(arguments.data, name, 3 if arguments.quick else 8)
    bench = Bench(arguments.data, name, tasks, "test", folder)
    bundles = [arguments.data / name / f"{task}.safetensors" for task in tasks]
    workers = [Worker(folder, method, folder, arguments) for method in ("otmf", *DESCENDING)]
    for number, bundle in enumerate(bundles, 1):
        for worker in workers:
            _say(worker, worker.fold(bundle), number)
    size = sum(4 * weight.numel() for weight in bench.base.weights.values())
    torch.set_num_threads(arguments.threads)
    rows = []
    for worker in workers:
        assert worker.state is not None
        rows.append(worker.row(name, size, bundles[1], _accuracy(bench, read_state(bench.base, worker.state))))
    return rows


def _accuracy(bench: Bench, state: MergeState) -> float:
    weights = dict(merged_weights(state))
    hits = [bench.hits(bench.features(weights, task), head, task).mean() for task, head in state.heads.items()]
    return float(statistics.fmean(hits))


def _say(worker: Worker, answer: Answer, number: int) -> None:
    seconds, peak = answer["seconds"] * worker.scale, answer["peak_rss_bytes"] / 1e6
    say(f"fold {number}: {worker.method} {seconds:.1f} s, {peak:.0f} MB")


def _apart(work: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own: what it leaves in memory is no part of a fold."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError("The base or a bundle could not be made; the reason stands above.")


if __name__ == "__main__":
    sys.exit(main())
