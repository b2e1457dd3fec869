"""Killing the daemon and its worker, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from simulator import Box

from foldd.core.digests import sha256_file
from foldd.core.manifest import verify_manifest
from foldd.core.signatures import read_public

TASKS = ("t1", "t2", "t3", "t4", "t5", "t6")


def drop_all(box: Box) -> None:
    """Six checkpoints, in the inbox before the daemon starts, so that their order is fixed."""
    for number, task in enumerate(TASKS):
        box.drop(box.bundle(task, seed=number))
        stamp = 1_000_000_000 + number
        os.utime(box.layout.inbox / f"{task}.safetensors", (stamp, stamp))


def violations(box: Box) -> list[str]:
    """What is wrong with a state directory right after a crash: nothing that devices see may be half-made."""
    wrong = []
    rows = box.generations()
    if [row.generation for row in rows] != list(range(1, len(rows) + 1)):
        wrong.append(f"generations {[row.generation for row in rows]}")
    if box.layout.current.is_symlink():
        folder = box.layout.current.resolve()
        try:
            key = read_public(box.layout.keys / "daemon.pub")
            manifest = verify_manifest((folder / "manifest.json").read_bytes(), [key])
            if sha256_file(folder / "model.onnx") != manifest.artifact.sha256:
                wrong.append(f"{folder.name}: artifact and manifest differ")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a violation
            wrong.append(f"{folder.name}: {error}")
    return wrong


def finished(box: Box) -> list[str]:
    """What is wrong at the end: every checkpoint folded once, in order, and nothing left lying about."""
    wrong = violations(box)
    rows = box.generations()
    if [row.task for row in rows] != list(TASKS):
        wrong.append(f"folded {[row.task for row in rows]}")
    if [a.state for a in box.arrivals()] != ["folded"] * len(TASKS):
        wrong.append(f"arrivals {[(a.name, a.state) for a in box.arrivals()]}")
    left = [e.name for e in box.layout.work.iterdir() if e.name != "incoming"]
    left += [e.name for e in box.layout.inbox.iterdir()]
    if left:
        wrong.append(f"left over: {left}")
    kept = box.config.settings.retention.generations
    if len(list(box.layout.generations.iterdir())) > kept or len(list(box.layout.blobs.iterdir())) > 2:
        wrong.append("orphans among generations or blobs")
    return wrong


@dataclass
class Outcome:
    """One run with kills: what broke, and the digest of the final merge state."""

    kills: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    digest: str = ""


def all_folded(box: Box) -> bool:
    return len(box.generations()) >= len(TASKS) and box.generations()[-1].published


def undisturbed(box: Box) -> str:
    drop_all(box)
    box.start()
    box.wait(lambda: all_folded(box), "six folds", seconds=300)
    box.stop()
    assert finished(box) == []
    return box.generations()[-1].state_sha256


def killed_at_random(box: Box, seed: int, trials: int, longest_s: float) -> Outcome:
    """Kills the supervisor or the worker at random moments until all is folded or `trials` are used up."""
    chance, outcome = random.Random(seed), Outcome()
    drop_all(box)
    box.start()
    while len(outcome.kills) < trials and not all_folded(box):
        until = time.monotonic() + chance.uniform(0, longest_s)
        while time.monotonic() < until and not all_folded(box):
            time.sleep(0.01)
        assert box.process is not None
        worker = box.worker_pid()
        if worker is not None and chance.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            outcome.kills.append("worker")
        else:
            box.kill()
            outcome.kills.append("supervisor")
            outcome.violations += violations(box)
            box.start()
    box.wait(lambda: all_folded(box), "six folds", seconds=300)
    outcome.violations += [] if box.stop() == 0 else ["the daemon did not stop cleanly"]
    outcome.violations += finished(box)
    outcome.digest = box.generations()[-1].state_sha256
    return outcome


def crash_points_taken(box: Box) -> set[str]:
    return {Path(marker).name.removeprefix(".crashed-at-") for marker in box.layout.root.glob(".crashed-at-*")}
