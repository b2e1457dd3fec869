"""Bundles folded in order through the real daemon, scored by onnxruntime: `make bench-core8 ARGS="--data …"`.

Beside the fold stand the unfolded base under each task's head, the individual models, and plain averaging. Scores
are on test images (`x_test`, scaled as (x / 255 - 0.5) / 0.25) that nothing was chosen on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.report import finish, now, options, say
from foldd.base.load import load_program
from foldd.base.store import open_base, store_base
from foldd.core.bundle import Checkpoint, open_bundle
from foldd.fusion.task_vector import task_vector

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
CORE8 = ("mnist", "gtsrb", "notmnist", "quickdraw", "chars74k", "rsscn7", "signdigits", "fsdd_spec")


def images(data: Path, task: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """[n, 3, 32, 32] float32 and labels [n]."""
    stored = np.load(data / "data" / f"{task}.npz")
    scaled = (stored[f"x_{split}"].astype(np.float32) / 255 - 0.5) / 0.25
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), stored[f"y_{split}"]


@torch.no_grad()
def accuracy(
    base: Any, weights: dict[str, torch.Tensor], checkpoint: Checkpoint, x: np.ndarray, y: np.ndarray
) -> float:
    features = torch.cat([base.features(weights, piece) for piece in torch.split(torch.from_numpy(x), 256)])
    logits = features @ torch.from_numpy(checkpoint.head.weight).T + torch.from_numpy(checkpoint.head.bias)
    return float((logits.argmax(1).numpy() == y).mean())


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of bases, bundles and images")
    parser.add_argument("--bases", default="cnn,vit")
    parser.add_argument("--methods", default="otmf")
    parser.add_argument("--heads", default="aligned", choices=["frozen", "aligned", "tuned"])
    parser.add_argument("--split", default="test", choices=["test", "val"])
    arguments = parser.parse_args()
    from simulator import Box

    torch.set_num_threads(2)
    tasks = CORE8[:3] if arguments.quick else CORE8
    started, rows = now(), []
    for name in arguments.bases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            root, data = Path(folder), arguments.data
            program = load_program(
                f"{data}/networks.py:{name}", weights=data / name / "base.safetensors", input_shape=(3, 32, 32)
            )
            store_base(root / "base", program)
            base = open_base(root / "base")
            test = {task: images(data, task, arguments.split) for task in tasks}
            opened = {task: open_bundle(data / name / f"{task}.safetensors", base.spec) for task in tasks}
            vectors = {task: task_vector(base, opened[task]) for task in tasks}
            mean = {n: sum(vectors[t][n] for t in tasks) / len(tasks) for n in base.weights}

            def score(task: str, vector: dict[str, torch.Tensor] | None) -> float:
                weights = {n: w if vector is None else w + vector[n] for n, w in base.weights.items()}  # noqa: B023
                return accuracy(base, weights, opened[task], *test[task])  # noqa: B023

            plain = {
                "pretrained": [score(t, None) for t in tasks],
                "individual": [score(t, vectors[t]) for t in tasks],
                "average": [score(t, mean) for t in tasks],  # type: ignore[arg-type]
            }
            for method, scores in plain.items():
                rows.append(_row(name, method, tasks, scores, plain))
            for method in arguments.methods.split(","):
                box = Box(
                    root / method, root / "base", fold={"method": method, "threads": 2}, heads={"mode": arguments.heads}
                )
                table = _folded(box, data / name, tasks, test)
                history = box.history()
                final, own = table[-1], [table[i][i] for i in range(len(tasks))]
                bwt = float(np.mean([final[i] - own[i] for i in range(len(tasks) - 1)]))
                row = _row(name, method, tasks, final, plain) | {
                    "heads": arguments.heads,
                    "bwt": bwt,
                    "seconds": float(np.mean([sum(h["seconds"].values()) - h["seconds"]["settle"] for h in history])),
                    "peak_rss_bytes": max(h["peak_rss_bytes"] for h in history),
                    "bytes": (box.layout.current / "model.onnx").stat().st_size,
                }
                rows.append(row)
    finish("core8", rows, arguments.json, started)
    return 0


def _folded(box: Any, bundles: Path, tasks: tuple[str, ...], test: dict[str, Any]) -> list[list[float]]:
    """Accuracy [generation][task so far], from the artifact in onnxruntime."""
    table = []
    box.start()
    try:
        for number, task in enumerate(tasks, 1):
            box.drop(bundles / f"{task}.safetensors")
            box.wait_generation(number)
            session = onnxruntime.InferenceSession(box.layout.current / "model.onnx")
            scores = []
            for known in tasks[:number]:
                x, y = test[known]
                scores.append(float((session.run([f"logits/{known}"], {"input": x})[0].argmax(1) == y).mean()))
            table.append(scores)
            say(f"generation {number}: " + " ".join(f"{t} {s:.3f}" for t, s in zip(tasks, scores, strict=False)))
        assert box.stop() == 0
    finally:
        box.kill()
    return table


def _row(
    base: str, method: str, tasks: tuple[str, ...], scores: list[float], plain: dict[str, list[float]]
) -> dict[str, Any]:
    mean, low, high = (float(np.mean(s)) for s in (scores, plain["pretrained"], plain["individual"]))
    each = {task: round(score, 4) for task, score in zip(tasks, scores, strict=True)}
    row = {"base": base, "method": method, "tasks": len(tasks), "accuracy": mean, "gain": (mean - low) / (high - low)}
    return row | each


if __name__ == "__main__":
    sys.exit(main())
