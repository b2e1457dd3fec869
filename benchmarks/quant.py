"""Quantization: accuracy, merging after it, bytes and speed: `make bench-quant ARGS="--data …"`.

Parts, each a list of rows:
- `single`: each task's own model, quantized and scored on test images under its own head; the mean over tasks, and the
  mean difference to the float model on the same images. 64 calibration images, those of its bundle.
- `merged`: models that are quantized each by itself and then merged as integers; harmonic mean over their tasks.
- `device`: artifacts in onnxruntime: bytes, and CPU time of one inference beside the float artifact, interleaved.
- `ablation`: noise and pull, one after the other, at W3A3, merged (the paper's table 3).
- `effort`: accuracy by iterations, W4A8.
- `cost`: seconds and peak RSS of a quantization, the demo's and the large base too.

Methods other than `float` and onnxruntime's own `ort-static` share one frame (benchmarks/rivals/rounding.py); all that
learn have the same number of iterations a block. `shipped` is what foldd's artifacts are made by, `hdrq` the published
form on that frame: noise, and a pull to the base.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_data import CORE8
from benchmarks.fold_cost_data import make_base, make_demo_base
from benchmarks.quant_cost import cost_rows
from benchmarks.quant_merged import harmonic, merged_rows, merged_scores, paired
from benchmarks.quant_models import Cache, Subjects, quantizer
from benchmarks.quant_onnx import artifacts, device_rows, static_hits
from benchmarks.report import add_data, finish, now, options, prepare_plots, say
from foldd.core.bundle import Head
from foldd.quantize.hdrq import as_shipped

BITS = ("w8a8", "w8a4", "w4a8", "w6a6", "w4a4", "w3a3")
STATIC = "ort-static"  # of single models, at W8A8
METHODS = (STATIC, "minmax", "mse", "adaround", "qdrop", "hdrq", "shipped")
PARTS = ("device", "single", "merged", "ablation", "effort", "cost")
EFFORTS = (0, 20, 50, 100, 300)
COSTS = (0, 100)
LARGE_COSTS = (0, 1)  # iterations of the large base: what more takes follows
MERGED = {"cnn": ("art", "cartoon", "sketch"), "vit": ("mnist", "notmnist")}


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    started, rows = now(), []
    with tempfile.TemporaryDirectory() as temporary:
        cache = Cache(arguments.cache or Path(temporary) / "cache")
        for name in arguments.bases:
            folder = Path(temporary) / name
            for part in arguments.parts:
                say(f"{name} {part}")
                made = list(PART[part](arguments, name, folder, cache))
                rows += [{"part": part, **row} for row in made]
        if arguments.plots is not None:
            _plots(arguments, Path(temporary))
    finish("quant", rows, arguments.json, started)
    return 0


def _single(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    subjects = Subjects(arguments.data, name, arguments.tasks, arguments.split, folder)
    models = [subjects.subject(arguments.data / name / f"{task}.safetensors", task) for task in arguments.tasks]
    floats = [float(subjects.float_hits(model.weights, model).mean()) for model in models]
    yield {"base": name, "method": "float", "bits": "float", "merged": None, "accuracy": float(np.mean(floats))}
    for bits in arguments.bits:
        for method in arguments.methods:
            if method == STATIC and bits != "w8a8":
                continue
            how, widest = (None, False) if method == STATIC else quantizer(method, bits, arguments.iterations)
            scores = []
            for model in models:
                facts = {
                    "part": "single", "base": name, "method": method, "bits": bits, "task": model.name,
                    "split": arguments.split, "iterations": arguments.iterations if how and how.descent else 0,
                }  # fmt: skip

                def measure(model: Any = model, how: Any = how, widest: bool = widest) -> float:
                    inputs = subjects.draw(model, 0)
                    if how is None:
                        return float(static_hits(subjects, folder, model, inputs).mean())
                    quantized = subjects.quantize(how, model, inputs, 0, widest=widest)
                    return float(subjects.hits(quantized, model).mean())

                scores.append(cache.get(facts, measure))
            yield {
                "base": name, "method": method, "bits": bits, "merged": None, "accuracy": float(np.mean(scores)),
                **paired(scores, floats),
            }  # fmt: skip
            say(f"  {method} {bits}: {np.mean(scores):.4f}")


def _merged(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    subjects, models = _to_merge(arguments, name, folder)
    methods = [method for method in arguments.methods if method != STATIC]
    yield from merged_rows(
        subjects, models, methods, arguments.merged_bits, arguments.draws, arguments.iterations, cache
    )


def _to_merge(arguments: argparse.Namespace, name: str, folder: Path) -> tuple[Subjects, list[Any]]:
    domains, merged = name == "cnn", MERGED[name][: arguments.models]
    images = [f"pacs_{d}" if domains else d for d in merged]
    place = arguments.data / name / ("pacs/not-photo" if domains else "")
    subjects = Subjects(arguments.data, name, images, arguments.split, folder)
    return subjects, [subjects.subject(place / f"{m}.safetensors", i) for m, i in zip(merged, images, strict=True)]


def _ablation(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    subjects, models = _to_merge(arguments, name, folder)
    whole, _ = quantizer("hdrq", "w3a3", arguments.iterations)
    forms = {
        "neither": replace(whole, noise=False, pull=0.0),
        "noise": replace(whole, pull=0.0),
        "pull": replace(whole, noise=False),
        "noise and pull": whole,
    }
    reference: dict[str, list[float]] = {}
    for per_channel in (True, False):
        for form, how in forms.items():
            how = replace(how, per_channel=per_channel)
            facts = {"part": "ablation", "how": repr(how), "base": name, "split": arguments.split}
            runs = [merged_scores(subjects, models, how, False, d, cache, facts) for d in range(arguments.draws)]
            for rounding in runs[0]:
                values = [harmonic(run[rounding]) for run in runs]
                if form == "neither":
                    reference[rounding] = values
                yield {
                    "base": name, "method": form, "bits": "w3a3 " + ("channels" if per_channel else "tensor"),
                    "merged": None if rounding == "alone" else rounding,
                    "accuracy": float(np.mean(values)), "accuracy_std": float(np.std(values)),
                    "draws": arguments.draws, **paired(values, reference[rounding]),
                }  # fmt: skip


def _device(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    subjects = Subjects(arguments.data, name, arguments.tasks, arguments.split, folder)
    models = [subjects.subject(arguments.data / name / f"{task}.safetensors", task) for task in arguments.tasks]
    heads = {m.name: Head(m.head.weight.numpy(), m.head.bias.numpy()) for m in models}
    files = folder / "artifacts"
    files.mkdir(exist_ok=True)
    first = models[0]
    inputs = subjects.draw(first, 0)
    made = artifacts(subjects, folder, first, inputs, heads, arguments.iterations, files)
    yield from device_rows(name, made, subjects.draw(first, 1).numpy(), f"logits/{first.name}")


def _effort(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    tasks = arguments.tasks[:3]
    subjects = Subjects(arguments.data, name, tasks, arguments.split, folder)
    models = [subjects.subject(arguments.data / name / f"{task}.safetensors", task) for task in tasks]
    floats = [float(subjects.float_hits(model.weights, model).mean()) for model in models]
    for iterations in EFFORTS:
        how, scores, seconds = as_shipped(4, 8, iterations), [], []
        for model in models:
            started = time.process_time()
            quantized = subjects.quantize(how, model, subjects.draw(model, 0), 0)
            seconds.append(time.process_time() - started)
            scores.append(float(subjects.hits(quantized, model).mean()))
        yield {
            "base": name, "method": "shipped", "bits": "w4a8", "merged": None, "iterations": iterations,
            "accuracy": float(np.mean(scores)), "cpu_seconds": float(np.mean(seconds)), **paired(scores, floats),
        }  # fmt: skip


def _cost(arguments: argparse.Namespace, name: str, folder: Path, cache: Cache) -> Iterator[dict[str, Any]]:
    Subjects(arguments.data, name, arguments.tasks[:1], arguments.split, folder)  # leaves the base there
    bases = {name: (folder, COSTS)}
    if name == arguments.bases[-1]:  # once
        demo = folder.parent / "demo"
        make_demo_base(demo)
        bases["demo"] = (demo, COSTS)
        large = folder.parent / "vit-b32"
        make_base(large)
        bases["vit-b32"] = (large, LARGE_COSTS)
    yield from cost_rows(bases)


def _plots(arguments: argparse.Namespace, folder: Path) -> None:
    from benchmarks.quant_plots import draw_spread, draw_surfaces, loss_surface, noise_spread

    for name in arguments.bases:
        subjects, models = _to_merge(arguments, name, folder / f"{name}-plots")
        surfaces, spreads = {}, {}
        for method in ("qdrop", "hdrq"):
            how, _ = quantizer(method, "w4a8", arguments.iterations)
            quantized = [subjects.quantize(how, model, subjects.draw(model, 0), 0) for model in models[:2]]
            surfaces[method] = loss_surface(subjects, models[0], quantized[0])
            spreads[method] = noise_spread(subjects, models[:2], quantized)
        draw_surfaces(arguments.plots / f"loss-{name}.png", surfaces)
        draw_spread(arguments.plots / f"noise-{name}.png", spreads)


PART = {
    "single": _single, "merged": _merged, "ablation": _ablation, "device": _device, "effort": _effort, "cost": _cost,
}  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    add_data(parser, split="test")
    parser.add_argument("--bases", default="cnn,vit", type=_list)
    parser.add_argument("--parts", default=",".join(PARTS), type=_list, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--methods", default=",".join(METHODS), type=_list, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--bits", default=",".join(BITS), type=_list)
    parser.add_argument("--merged-bits", default="w4a4,w3a3", type=_list)
    parser.add_argument("--models", type=int, help="how many to merge; default: all there are")
    parser.add_argument("--tasks", default=",".join(CORE8), type=_list)
    parser.add_argument("--iterations", default=100, type=int, help="of reconstruction, a block")
    parser.add_argument("--draws", default=5, type=int, help="of calibration images, for what is merged")
    arguments = parser.parse_args()
    prepare_plots(parser, arguments.plots, "matplotlib")
    if arguments.quick:
        arguments.tasks, arguments.bits, arguments.draws, arguments.iterations = (
            list(CORE8[:2]),
            ["w8a8", "w4a8"],
            1,
            20,
        )
        arguments.merged_bits, arguments.methods = ["w4a4"], ["mse", "qdrop", "hdrq", "shipped"]
    return arguments


def _list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
