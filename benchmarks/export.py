"""Patching the skeleton against exporting again, interleaved: `make bench-export`.

On the tests' small networks, or with `--data` on a folder's bases (`networks.py` with factories `cnn` and `vit`).
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import ExportedProgram

from benchmarks.report import finish, now, options, say
from foldd.base.batch_norm import fold_norms
from foldd.base.load import capture, load_program
from foldd.base.skeleton import export_skeleton
from foldd.base.store import open_base, open_skeleton, store_base
from foldd.core.bundle import Head
from foldd.export.artifact import build_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def _bases(data: Path | None) -> dict[str, Callable[[], ExportedProgram]]:
    if data is None:
        import networks

        makers = (networks.residual, networks.attention)
        return {make.__name__: lambda make=make: capture(make(), (1, 8, 8)) for make in makers}  # type: ignore[misc]

    def load(name: str) -> ExportedProgram:
        weights = data / name / "base.safetensors"
        return load_program(f"{data / 'networks.py'}:{name}", weights=weights, input_shape=(3, 32, 32))

    return {name: lambda name=name: load(name) for name in ("cnn", "vit")}  # type: ignore[misc]


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--data", type=Path, help="folder of bases")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    started, rows = now(), []
    for name, load in _bases(arguments.data).items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            program = load()
            store_base(root / "base", program)
            base = open_base(root / "base")
            skeleton, rules = open_skeleton(root / "base")
            head = Head(torch.ones(10, base.spec.features).numpy(), torch.zeros(10).numpy())
            patching, exporting = [], []
            for repetition in range(3 if arguments.quick else arguments.repetitions):
                say(f"{name}: {repetition + 1}")
                begun = time.perf_counter()
                weights = fold_norms({n: t.numpy() for n, t in base.weights.items()}, rules)
                build_artifact(skeleton, weights, {"task": head}, root / "model.onnx", metadata={})
                patched = time.perf_counter()
                export_skeleton(program)
                patching.append(patched - begun)
                exporting.append(time.perf_counter() - patched)
            ratios = [b / a for a, b in zip(patching, exporting, strict=True)]
            rows.append(
                {
                    "base": name,
                    "model_bytes": base.spec.float_bytes,
                    "patch_seconds": statistics.median(patching),
                    "export_seconds": statistics.median(exporting),
                    "ratio": statistics.median(ratios),
                    "ratio_least": min(ratios),
                    "ratio_most": max(ratios),
                }
            )
    finish("export", rows, arguments.json, started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
