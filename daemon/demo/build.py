"""Trains the demo's base and tasks and writes what a user would have: `python -m foldd.daemon.demo.build FOLDER`.

A process of its own, so that the journey needs no torch. In FOLDER: `base.pt2`, `baselines.json`, and for each task a
folder with `weights.safetensors`, `head.safetensors`, `calibration.npy`, `test.npy` and `test_labels.npy`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from foldd.daemon.demo.data import BASE_CLASSES, CALIBRATION, INPUT_SHAPE, SEED, Split, TaskData, base_data, task_data
from foldd.daemon.demo.network import DemoNetwork
from foldd.daemon.demo.train import Head, accuracy, averaged, backbone, fine_tune, nearest_class_mean, train_base
from foldd.daemon.progress import Progress

# Tensors this small gain nothing from a second thread, and lose a lot where another process wants the core.
THREADS = 1
_BASE_SHARE = 0.5  # of the time, about; only for the progress display


def build(folder: Path, split: str = "test") -> None:
    """Trains everything and writes it to the folder.

    Args:
        split: whose images the baselines are measured on, `test` or `validation`.
    """
    torch.set_num_threads(THREADS)
    started, progress = time.monotonic(), Progress()
    known, tasks = base_data(), task_data()
    base = train_base(
        *_tensors(known.train), classes=BASE_CLASSES, seed=SEED,
        report=lambda done: progress.update(_BASE_SHARE * done, "the base, on the digits 0 to 4"),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    export(base, folder / "base.pt2")
    heads: list[Head] = []
    tuned: list[DemoNetwork] = []
    for number, task in enumerate(tasks):

        def report(done: float, task: TaskData = task, number: int = number) -> None:
            share = (1 - _BASE_SHARE) * (number + done) / len(tasks)
            progress.update(_BASE_SHARE + share, f"{task.name}: {task.about}")

        images, labels = _tensors(task.train)
        heads.append(nearest_class_mean(base, images, labels))
        tuned.append(fine_tune(base, heads[-1], images, labels, seed=SEED + number, report=report))
        _write_task(folder / task.name, task, tuned[-1], heads[-1])
    progress.done(f"a base and {len(tasks)} fine-tuned tasks in {time.monotonic() - started:.0f} s")
    held_back = [_tensors(getattr(task, split)) for task in tasks]
    rows = baselines(base, tuned, heads, held_back)
    facts = {
        "split": split,
        "tasks": [
            {"name": t.name, "about": t.about, "classes": list(t.classes), "samples": len(t.train.labels)}
            for t in tasks
        ],
        **rows,
    }  # fmt: skip
    (folder / "baselines.json").write_text(json.dumps(facts, indent=1) + "\n")


def baselines(
    base: DemoNetwork, tuned: list[DemoNetwork], heads: list[Head], held_back: list[tuple[Tensor, Tensor]]
) -> dict[str, list[float] | list[list[float]]]:
    """Accuracies beside which a fold is judged, tasks in order.

    Returns:
        `unfolded` and `individual`: one share per task; `averaged`: after t tasks, the plain mean of the first t task
        vectors on each of them, so that it can forget as a fold can.
    """
    steps: list[list[float]] = []
    for count in range(1, len(tuned) + 1):
        network = averaged(base, tuned[:count])
        steps.append([accuracy(network, head, *images) for head, images in zip(heads[:count], held_back, strict=False)])
    return {
        "unfolded": [accuracy(base, head, *images) for head, images in zip(heads, held_back, strict=True)],
        "individual": [
            accuracy(network, head, *images) for network, head, images in zip(tuned, heads, held_back, strict=True)
        ],
        "averaged": steps,
    }


def export(base: DemoNetwork, path: Path) -> None:
    """Writes the base as a `torch.export` archive with a free batch, as `foldd init` takes it."""
    example = torch.zeros(2, *INPUT_SHAPE)
    program = torch.export.export(base, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


def _write_task(folder: Path, task: TaskData, network: DemoNetwork, head: Head) -> None:
    folder.mkdir(exist_ok=True)
    save_file(backbone(network), folder / "weights.safetensors")
    save_file({"weight": head[0].contiguous(), "bias": head[1].contiguous()}, folder / "head.safetensors")
    np.save(folder / "calibration.npy", task.train.images[:CALIBRATION])
    np.save(folder / "test.npy", task.test.images)
    np.save(folder / "test_labels.npy", task.test.labels)


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(split.images), torch.from_numpy(split.labels)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m foldd.daemon.demo.build")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="of the baselines")
    arguments = parser.parse_args(argv)
    build(arguments.folder, arguments.split)
    return 0


if __name__ == "__main__":
    sys.exit(main())
