"""Fifty folds of one base in one worker: what grows? `make bench-growth`.

`tensor_bytes`: all tensors alive in the worker after the fold, the heads before and after it taken off (`head_bytes`:
weights and bias of each task). `state_bytes` and `artifact_bytes`: the merge state and the model, which may grow by a
head, its name and its output for each task. `directory_bytes`: base, blobs and generations on disk, as many as the
retention keeps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import finish, now, options, say
from foldd.base.load import capture
from foldd.base.store import store_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

NAMES_BYTES = 1000  # a task's name in tensors, nodes and outputs


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--folds", type=int, default=50)
    arguments = parser.parse_args()
    from networks import residual
    from simulator import Box

    folds, started, rows = 6 if arguments.quick else arguments.folds, now(), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store_base(root / "base", capture(residual(), (1, 8, 8)))
        box = Box(root / "box", root / "base")
        for number in range(1, folds + 1):
            box.drop(box.bundle(f"task{number:02d}", seed=number))
        box.start()
        try:
            for number in range(1, folds + 1):
                # All were dropped at once, so one worker folds them all; a report lies there for three folds.
                box.wait((box.layout.generation(number) / "report.json").exists, f"fold {number}")
                rows.append(_row(box, number))
                say(f"fold {number} of {folds}")
            box.wait_generation(folds)
            assert box.stop() == 0
        finally:
            box.kill()
    finish("growth", rows, arguments.json, started)
    second, last = rows[1], rows[-1]
    slack = NAMES_BYTES * (folds - 2)
    fine = last["tensor_bytes"] == second["tensor_bytes"] and all(
        0 <= last[key] - second[key] - (last["head_bytes"] - second["head_bytes"]) <= slack
        for key in ("state_bytes", "artifact_bytes")
    )
    say("nothing grew but heads" if fine else "something grew")
    return 0 if fine else 1


def _row(box: Any, number: int) -> dict[str, Any]:
    folder = box.layout.generation(number)
    report = json.loads((folder / "report.json").read_text())
    head = (3 * box.spec.features + 3) * 4
    heads = number * head
    alive = heads + (number - 1) * head  # heads follow the features: those before the fold are there beside those after
    kept = [box.layout.base, box.layout.blobs, box.layout.generations]
    return {
        "folds": number,
        "tensor_bytes": report["tensor_bytes"] - alive,
        "head_bytes": heads,
        "state_bytes": max(path.stat().st_size for path in box.layout.blobs.iterdir()),
        "artifact_bytes": (folder / "model.onnx").stat().st_size,
        "directory_bytes": sum(path.stat().st_size for top in kept for path in top.rglob("*") if path.is_file()),
        "peak_rss_bytes": report["peak_rss_bytes"],
    }


if __name__ == "__main__":
    sys.exit(main())
