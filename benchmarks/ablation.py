"""What each part of a fold brings: `make bench-ablation ARGS="--data …"`.

Parts of `otmf-paper` as its authors took them away (α from 0 to 1, masks off, head tuning, biased Sinkhorn), then parts
of `otmf`: each alone, all together, its weights and `drift` along their ranges, fewer calibration inputs. Everything is
folded as in `continual`, on its first eight tasks: the published method under frozen heads, `otmf` under heads that
follow without labels, as it is shipped. `change` is the accuracy minus that of the unchanged method (`otmf` or
`otmf-paper`) in the same order, mean and standard deviation over orders: the spread that a part has to exceed.

Rows with `heads` = `tuned` use the labels of the calibration inputs; no other does. The `bwt` of those of the published
method counts what the tuning gives a task after its own fold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_data import CORE8, Bench, orders, task_list
from benchmarks.continual import Clock, Job, summary
from benchmarks.continual_run import PLAIN, Result, Store, measure
from benchmarks.report import add_data, finish, now, options, prepare_plots, say
from benchmarks.rivals.table import CONTINUAL
from benchmarks.rivals.variants import BiasedPaper, FewInputs, HeadTuning, Steady
from foldd.fusion.alignment import Mode
from foldd.fusion.method import FoldMethod
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.state import as_tensor, merged_weights

Maker = Callable[[Bench], FoldMethod]
ALPHAS = [step / 10 for step in range(11)]
INCOMING = [0.03, 0.07, 0.15, 0.3, 0.6, 1.0]
CONVOLUTIONS, STEADY = [0.3, 1.2], [0.07, 0.25, 1.0]
DRIFT = [0.0, 0.2, 0.5, 1.0]
PREVIOUS = [0.0, 0.5, 1.0, 2.0]
INPUTS = [8, 16, 32, 64]


def _setting(field: str, value: float) -> tuple[str, Maker]:
    """`otmf` with one setting changed; `otmf` itself where that is its own."""
    default = getattr(Otmf(), field)
    name = "otmf" if value == default else f"otmf-{field}-{value:g}"
    return name, lambda _: replace(Otmf(), **{field: value})


def _alpha(alpha: float, steps: int) -> tuple[str, Maker]:
    method = OtmfPaper(alpha=alpha, steps=steps)
    if method == OtmfPaper():
        return "otmf-paper", lambda _: method
    return f"{'otmf-paper' if steps else 'masks-off'}-alpha-{alpha:g}", lambda _: method


def _tuned(inner: FoldMethod) -> Maker:
    def make(bench: Bench) -> FoldMethod:
        def labelled(task: str) -> tuple[torch.Tensor, torch.Tensor]:
            checkpoint = bench.checkpoint(task)
            assert checkpoint.inputs is not None, "the bench's bundles all carry inputs"
            assert checkpoint.labels is not None, "the bench's bundles all carry labels"
            return as_tensor(checkpoint.inputs), as_tensor(checkpoint.labels)

        return HeadTuning(inner, labelled)

    return make


PAPER, MASKS_OFF = OtmfPaper(), OtmfPaper(steps=0)
SHIPPED = Otmf()
# Part → its variants. The unchanged method comes first where a part's changes are to it.
PARTS: dict[str, dict[str, Maker]] = {
    "plain": {name: CONTINUAL[name] for name in ("unfolded", "average")},
    "paper": {
        "otmf-paper": lambda _: PAPER,
        "masks-off-alpha-0.8": lambda _: MASKS_OFF,
        "otmf-paper-biased": lambda _: BiasedPaper(),
        "otmf-paper-tuned": _tuned(PAPER),
        "masks-off-tuned": _tuned(MASKS_OFF),
    },
    "alpha": dict(_alpha(alpha, PAPER.steps) for alpha in ALPHAS[::2]),
    "alpha-between": dict(_alpha(alpha, PAPER.steps) for alpha in ALPHAS[1::2]),
    "alpha-masks-off": dict(_alpha(alpha, 0) for alpha in ALPHAS),
    "otmf": {
        "otmf": lambda _: SHIPPED,
        **dict(_setting(field, 0.0) for field in ("student", "previous", "drift")),
        **dict([_setting("damping", 1.0)]),
        **dict(_setting("incoming", value) for value in (0.4, 1.0)),
        "otmf-regmean": lambda _: Steady(student=0.0, previous=0.0, damping=1.0, drift=0.0, incoming=1.0),
    },
    "convolutions": {
        **{f"otmf-steady-{value:g}": (lambda v: lambda _: Steady(incoming=v))(value) for value in STEADY},
        **dict(_setting("incoming_convolution", value) for value in CONVOLUTIONS),
    },
    "heads": {"otmf": lambda _: SHIPPED},
    "ridge": dict(_setting("ridge", SHIPPED.ridge * factor) for factor in (0.1, 1.0, 10.0)),
    "incoming": dict(_setting("incoming", value) for value in INCOMING),
    "drift": dict(_setting("drift", value) for value in DRIFT),
    "previous": dict(_setting("previous", value) for value in PREVIOUS),
    "inputs": {f"otmf-inputs-{count}": (lambda n: lambda _: FewInputs(n))(count) for count in INPUTS},
}


@dataclass(frozen=True)
class Share:
    """A part of the whole: what is measured on which base in how many orders, and under which heads."""

    base: str
    part: str
    orders: int
    heads: Mode = "frozen"

    def job(self, method: str, order: int) -> Job:
        return Job(self.base, len(CORE8), method, order, self.heads)


QUICK = [Share("vit", "plain", 1, "aligned"), Share("vit", "otmf", 1, "aligned")]
FULL = [
    Share("vit", "plain", 3, "aligned"), Share("vit", "otmf", 3, "aligned"), Share("cnn", "plain", 3, "aligned"),
    Share("cnn", "otmf", 3, "aligned"), Share("cnn", "convolutions", 3, "aligned"),
    Share("vit", "heads", 1), Share("vit", "heads", 1, "tuned"),
    Share("vit", "inputs", 2, "aligned"), Share("vit", "ridge", 1, "aligned"), Share("vit", "incoming", 1, "aligned"),
    Share("vit", "drift", 1, "aligned"), Share("vit", "previous", 1, "aligned"),
    Share("vit", "plain", 1), Share("vit", "paper", 1), Share("vit", "alpha-masks-off", 1), Share("vit", "alpha", 1),
    Share("vit", "alpha-between", 1), Share("cnn", "plain", 1), Share("cnn", "paper", 1),
    Share("cnn", "alpha-masks-off", 1), Share("cnn", "alpha", 1),
]  # fmt: skip


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    # The table of methods is where a run looks its method up, and a result's digest too.
    for variants in PARTS.values():
        CONTINUAL.update(variants)
    started, results = now(), {}
    plan = [share for share in (QUICK if arguments.quick else FULL) if share.base in arguments.bases]
    plan = [share for share in plan if not arguments.parts or share.part in arguments.parts]
    jobs = list(dict.fromkeys(_jobs(plan)))
    with tempfile.TemporaryDirectory() as folder:
        store, clock = Store(arguments.cache or Path(folder) / "results"), Clock(jobs)
        done = 0
        for name in dict.fromkeys(share.base for share in plan):
            tasks = task_list(arguments.data, name, len(CORE8))
            bench = Bench(arguments.data, name, tasks, arguments.split, Path(folder) / name)
            shuffled = orders(tasks, max(share.orders for share in plan))
            for job in [job for job in jobs if job.base == name]:
                clock.say(done)
                done += 1
                results[job] = _measured(bench, shuffled[job.order], job, store, clock)
    rows = [row for share in plan for row in _rows(share, results, arguments.split)]
    finish("ablation", rows, arguments.json, started)
    if arguments.plots:
        from benchmarks.ablation_plot import draw

        draw(arguments.plots / "ablation.png", rows)
    return 0


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    add_data(parser, split="validation")
    parser.add_argument("--bases", type=lambda text: text.split(","), default=["vit", "cnn"])
    parser.add_argument("--parts", type=lambda text: text.split(","), help=f"of {', '.join(PARTS)}; all unless told")
    arguments = parser.parse_args()
    if not set(arguments.bases) <= {"vit", "cnn"}:
        parser.error("--bases is vit, cnn or both")
    if unknown := set(arguments.parts or ()) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    prepare_plots(parser, arguments.plots, "matplotlib")
    return arguments


def _jobs(plan: list[Share]) -> Iterator[Job]:
    for share in plan:
        for method in PLAIN:
            yield Job(share.base, len(CORE8), method, 0)
        for order in range(share.orders):
            for method in PARTS[share.part]:
                yield share.job(method, order)


def _measured(bench: Bench, tasks: tuple[str, ...], job: Job, store: Store, clock: Clock) -> Result:
    path = store.path(bench, tasks, job.method, job.order, job.heads)
    result = store.read(path, curves=False)
    if result is None:
        begun = time.perf_counter()
        if job.method.endswith("-tuned"):
            result = _measure_tuned(bench, tasks, job)
        else:
            result, _ = measure(bench, tasks, job.method, job.order, False, lambda _: None, job.heads)
        store.write(path, result, {})
        clock.taken[job.base, job.method].append((time.perf_counter() - begun) / job.tasks)
        say(f"{job.method}, {job.heads} heads, order {job.order}: {np.mean(list(result['final'].values())):.4f}")
    return result


def _measure_tuned(bench: Bench, tasks: tuple[str, ...], job: Job) -> Result:
    """A run as `measure` gives it, under the heads of the state instead of the bundles'."""
    method = CONTINUAL[job.method](bench)
    assert isinstance(method, HeadTuning)
    state, own, seconds = method.init(bench.base), {}, []

    def score(task: str) -> float:
        hits = bench.hits(bench.features(merged_weights(state), task), state.heads[task], task)
        return float(hits.mean())

    for task in tasks:
        begun = time.perf_counter()
        state, _ = method.fold(state, bench.checkpoint(task), seed=job.order)
        if task == tasks[-1]:
            state = method.tune(state, task, seed=job.order)
        seconds.append(time.perf_counter() - begun)
        own[task] = score(task)
    return {
        "method": job.method, "order": list(tasks), "curves": False, "final": {task: score(task) for task in tasks},
        "own": own, "table": [], "shift": {}, "fold_seconds": seconds, "fold_peak_bytes": [],
    }  # fmt: skip


def _rows(share: Share, results: dict[Job, Result], split: str) -> Iterator[dict[str, Any]]:
    """The part's variants, each with its change against the unchanged method in the same orders."""
    count = len(CORE8)
    if share.part == "plain":
        yield from ({"part": share.part} | _required(Job(share.base, count, m, 0), results, split) for m in PLAIN)
    for method in PARTS[share.part]:
        own = {job: results[job] for job in (share.job(method, order) for order in range(share.orders))}
        plain = {job: result for job, result in results.items() if job.method in PLAIN}
        row = _required(next(iter(own)), own | plain, split)
        if method.endswith("-tuned"):
            row["heads"] = "tuned"
        reference = "otmf-paper" if share.part.startswith(("paper", "alpha")) else "otmf"
        changes = [
            _accuracy(result) - _accuracy(results[other])
            for job, result in own.items()
            if (other := replace(job, method=reference)) in results
        ]
        row["change"] = float(np.mean(changes)) if changes and share.part != "plain" else None
        row["change_std"] = float(np.std(changes, ddof=1)) if row["change"] is not None and len(changes) > 1 else None
        yield {"part": share.part} | row


def _required(job: Job, results: dict[Job, Result], split: str) -> dict[str, Any]:
    row = summary(job.kind, results, split)
    assert row is not None, "every run of the plan was measured"
    return row


def _accuracy(result: Result) -> float:
    return float(np.mean(list(result["final"].values())))


if __name__ == "__main__":
    sys.exit(main())
