"""`foldd demo`: train, initialise, run the daemon, drop six bundles, ask the runtime after each, tell how it went.

No torch in this process, and nothing of the daemon or the runtime: everything is done by the real commands.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from foldd.core.errors import BadSetup
from foldd.daemon.commands.common import DAEMON_PACKAGES, require
from foldd.daemon.demo.box import Box, train
from foldd.daemon.demo.table import Cost, Results, accuracy_table, as_dict, cost_table, summary_table, verdict
from foldd.daemon.progress import Progress

FOLD_SECONDS = 300.0  # longest wait for one generation; a quiet box with two cores needs ten
START_SECONDS = 30.0
_MARK = ".foldd-demo"  # only a folder that holds this is ever cleared

_CONFIG = """\
# Written by `foldd demo`; the repository's config.toml explains every key.
[state]
directory = "state"

[base]
model = "input/base.pt2"
head = "fc" # its input is the feature output

[fold]
method = "otmf"
threads = 1 # so small a network gains nothing from more, and loses where others want the cores

[quantize]
format = "w8a8" # weights and activations in 8 bits: a quarter of the size

[intake]
settle_seconds = 0.2 # the demo drops whole files by rename
"""


def run(directory: Path) -> int:
    """The whole demo in a folder of its own.

    Returns:
        0, or 1 where the folded model is not better than the base or worse than plain averaging.

    Raises:
        BadSetup: `missing-extra`, `directory-taken`, `demo-running`.
        Unavailable: a step of the journey failed; the message says which.
    """
    require("demo", *DAEMON_PACKAGES, "sklearn")
    started = time.monotonic()
    _clear(directory)
    box, source = Box(directory), directory / "input"

    _say(f"1. Train a small base on the digits 0 to 4, and fine-tune a copy for each of six tasks ({source})")
    train(source)
    facts = json.loads((source / "baselines.json").read_text())

    _say(f"2. Set up a box for that base: foldd init --config {box.config}")
    box.config.write_text(_CONFIG)
    told = json.loads(box.foldd("init", "--json"))
    print(
        f"  base {told['base_digest'][:16]}…, {told['model_bytes'] / 1e3:.0f} kB in float32, "
        f"{told['features']} features, {told['seconds']:.1f} s"
    )

    _say(f"3. Run the daemon, drop one bundle after the other into {box.state / 'inbox'}, ask the runtime each time")
    folded, costs, idle_bytes = _fold_all(box, source, facts["tasks"])

    results = Results(
        tasks=tuple(task["name"] for task in facts["tasks"]),
        method=box.history()[-1]["method"],
        folded=folded,
        averaged=facts["averaged"],
        unfolded=facts["unfolded"],
        individual=facts["individual"],
    )
    _report(results, costs, idle_bytes)
    wrong = verdict(results)
    seconds = time.monotonic() - started
    measured = {"seconds": seconds, "idle_rss_bytes": idle_bytes, **as_dict(results, costs)}
    (directory / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
    _next_steps(box, directory)
    _say(f"{'Not as it should be' if wrong else 'Done'}, after {seconds:.0f} s.")
    for reason in wrong:
        print(f"foldd demo: {reason}.", file=sys.stderr)
    return 1 if wrong else 0


def _clear(directory: Path) -> None:
    """Makes the folder anew; one that is not the demo's own, or that a daemon works in, stays as it is."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not (directory / _MARK).exists():
            raise BadSetup(
                "directory-taken",
                f"{directory} exists and was not made by `foldd demo`.",
                remedy="Name a new one with --directory.",
            )
        if (directory / "state" / "ledger.sqlite3").exists() and (pid := Box(directory).status()["pid"]):
            raise BadSetup(
                "demo-running",
                f"A daemon is running in {directory} (process {pid}).",
                remedy=f"Stop it with `kill {pid}`, or name another folder with --directory.",
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _MARK).touch()


def _fold_all(box: Box, source: Path, tasks: list[dict[str, Any]]) -> tuple[list[list[float]], list[Cost], int]:
    """Accuracies after each generation, what each fold cost, and the idle supervisor's memory in bytes."""
    folded: list[list[float]] = []
    costs: list[Cost] = []
    with box.daemon() as process:
        box.wait(process, lambda facts: facts["state"] == "idle", seconds=START_SECONDS)
        for number, task in enumerate(tasks, start=1):
            progress = Progress()
            box.drop(_pack(box, source / task["name"], task))
            box.wait(
                process,
                lambda facts, number=number: facts["generation"] == number,  # type: ignore[misc]
                seconds=FOLD_SECONDS,
                show=lambda facts, task=task, progress=progress: _show(progress, task, facts),  # type: ignore[misc]
            )
            known = [entry["name"] for entry in tasks[:number]]
            folded.append([_accuracy(box, source / name, name, number) for name in known])
            costs.append(_cost(box, number))
            shares = "  ".join(f"{name} {100 * share:.0f}" for name, share in zip(known, folded[-1], strict=True))
            progress.done(f"generation {number}: {task['name']} folded in {costs[-1].seconds:.1f} s | {shares} %")
        idle = box.wait(process, lambda facts: facts["state"] == "idle", seconds=START_SECONDS)
    return folded, costs, int(idle["rss_bytes"])


def _pack(box: Box, source: Path, task: dict[str, Any]) -> Path:
    """The task's bundle, made by `foldd pack` outside the inbox."""
    bundle = source / f"{task['name']}.safetensors"
    box.foldd(
        "pack", str(source / "weights.safetensors"), "--output", str(bundle), "--head",
        str(source / "head.safetensors"), "--calibration", str(source / "calibration.npy"),
        "--samples", str(task["samples"]), "--classes", ",".join(task["classes"]),
    )  # fmt: skip
    return bundle


def _show(progress: Progress, task: dict[str, Any], facts: dict[str, Any]) -> None:
    folding = facts.get("folding") or {}
    progress.update(folding.get("fraction") or 0.0, f"{task['name']}: {folding.get('stage') or 'settling'}")


def _accuracy(box: Box, source: Path, task: str, generation: int) -> float:
    """Share of held-back test images that the runtime answers rightly."""
    answers = box.infer(task, source / "test.npy", generation=generation).argmax(1)
    return float((answers == np.load(source / "test_labels.npy")).mean())


def _cost(box: Box, generation: int) -> Cost:
    row = next(row for row in box.history() if row["generation"] == generation)
    # Now, while it is current: the daemon keeps the last few generations only.
    artifact = box.state / "current" / "model.onnx"
    return Cost(generation, row["task"], row["seconds"], row["peak_rss_bytes"], artifact.stat().st_size)


def _report(results: Results, costs: list[Cost], idle_bytes: int) -> None:
    _say("Accuracy on held-back test images, %; `averaged` is the plain mean of all task vectors")
    print(*accuracy_table(results), sep="\n")
    _say("In the end")
    print(*summary_table(results), sep="\n")
    _say("What each fold cost")
    print(*cost_table(costs), sep="\n")
    print(f"  The idle daemon takes {idle_bytes / 1e6:.0f} MB.")


def _next_steps(box: Box, directory: Path) -> None:
    _say("Look at next")
    print(
        f"  foldd status --config {box.config}",
        f"  foldd history --config {box.config}",
        f"  {box.state / 'current' / 'model.onnx'}      the model that devices run",
        f"  {box.state / 'current' / 'manifest.json'}   what they trust, signed",
        f"  {box.state}   the daemon's whole state",
        f"  {box.log}   what the daemon said",
        f"  {directory / 'results.json'}   these tables as JSON",
        f"  foldd run --config {box.config}   starts it again; drop more into {box.state / 'inbox'}",
        sep="\n",
    )


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
