"""`foldd merge` beside mergekit on the same random files: seconds and peak memory of whole processes.

Three models and their base as .safetensors, float32, shaped like a language model. Each merge is a process of its own,
from start to exit, and the tools take turns, so that a busy machine is unfair to both. Files are in the page cache for
both. foldd also digests all inputs and syncs its output to the disk; mergekit does neither.

mergekit lives in an environment of its own, made beforehand: `python -m venv DIR`, `DIR/bin/pip install mergekit`, with
torch of the same version. Without `--mergekit DIR/bin/python` only foldd is measured. Both compute in float32. mergekit
trims `ties` within each tensor, foldd over the whole model, as published, for which it reads the models three times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.report import finish, now, options, say
from foldd.core.tensorwriter import Entry, TensorWriter

MODELS = 3
# foldd's name and options → mergekit's method, parameters of the merge, parameters of each model
PAIRS: dict[str, tuple[list[str], str, dict[str, Any], dict[str, Any]]] = {
    "average": ([], "linear", {}, {"weight": 1.0}),
    "task-arithmetic": (["scaling=0.3"], "task_arithmetic", {"lambda": 0.3}, {"weight": 1.0}),
    "ties": (["density=0.2"], "ties", {"normalize": True}, {"weight": 1.0, "density": 0.2}),
    "dare": (["drop=0.5", "scaling=0.3"], "dare_linear", {"lambda": 0.3, "normalize": False},
             {"weight": 1.0, "density": 0.5}),
}  # fmt: skip
SAME = ("average", "task-arithmetic")  # both tools mean the same by them: results are compared
HIDDEN, VOCABULARY = 1024, 32_000


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--bytes", type=int, default=10**9, help="size of a model (default: 1 GB)")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="interpreter of mergekit's environment")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of both tools; 0: as they choose")
    parser.add_argument("--directory", type=Path, help="where to put the files (default: a temporary folder)")
    arguments = parser.parse_args()
    started = now()
    size, repetitions = (10**8, 1) if arguments.quick else (arguments.bytes, arguments.repetitions)
    if arguments.mergekit is not None and not arguments.mergekit.exists():
        say(f"There is no {arguments.mergekit}.")
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        rows = _measure(Path(folder), size, repetitions, arguments.threads, arguments.mergekit)
    finish("merge_speed", rows, arguments.json, started)
    return 0


def _measure(folder: Path, size: int, repetitions: int, threads: int, mergekit: Path | None) -> list[dict[str, Any]]:
    paths = _models(folder, size)
    tools = ["foldd"] if mergekit is None else ["foldd", "mergekit"]
    runs: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for repetition in range(repetitions):
        for method in PAIRS:
            outputs = {}
            for tool in tools if repetition % 2 == 0 else reversed(tools):
                output = folder / f"{tool}-{method}.safetensors"
                command = _command(tool, method, paths, output, mergekit)
                seconds, cpu, peak = _run(command, folder, threads)
                outputs[tool] = output
                runs.setdefault((tool, method), []).append((seconds, cpu, peak))
                say(f"{method}, {tool}: {seconds:.1f} s, {cpu:.1f} s of processor, {peak / 1e6:.0f} MB")
            if method in SAME and len(outputs) == 2 and repetition == 0:
                _compare(*(_only_file(path) for path in outputs.values()))
            for output in outputs.values():
                subprocess.run(["rm", "-r", output], check=True)
    rows = []
    for (tool, method), measured in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        seconds, cpu, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        own = runs["foldd", method]
        row = {
            "tool": tool, "method": method, "bytes": paths[0].stat().st_size, "models": MODELS, "threads": threads,
            "seconds": seconds, "cpu_seconds": cpu,
            "peak_rss_bytes": peak, "repetitions": repetitions,
            "seconds_ratio": statistics.median(b / a for (a, _, _), (b, _, _) in zip(own, measured, strict=True)),
            "peak_rss_ratio": statistics.median(b / a for (_, _, a), (_, _, b) in zip(own, measured, strict=True)),
        }  # fmt: skip
        rows.append(row)
    return rows


def _models(folder: Path, size: int) -> list[Path]:
    """The base and the models, written tensor by tensor."""
    per_layer = 12 * HIDDEN**2
    vocabulary = min(VOCABULARY, size // 4 // HIDDEN // 4)
    layers = max(1, round((size / 4 - vocabulary * HIDDEN) / per_layer))
    entries = {"embed.weight": Entry("F32", (vocabulary, HIDDEN)), "norm.weight": Entry("F32", (HIDDEN,))}
    for layer in range(layers):
        for name, shape in (("qkv", (3 * HIDDEN, HIDDEN)), ("out", (HIDDEN, HIDDEN)),
                            ("up", (4 * HIDDEN, HIDDEN)), ("down", (HIDDEN, 4 * HIDDEN))):  # fmt: skip
            entries[f"layers.{layer}.{name}.weight"] = Entry("F32", shape)
    paths = []
    for model in range(MODELS + 1):
        path = folder / ("base.safetensors" if model == 0 else f"model{model}.safetensors")
        writer = TensorWriter(path, entries, {"format": "pt"})
        for number, (name, entry) in enumerate(entries.items()):
            values = torch.randn(entry.shape, generator=torch.Generator().manual_seed(number))
            if model:
                generator = torch.Generator().manual_seed(number + 10_000 * model)
                values.add_(torch.randn(entry.shape, generator=generator), alpha=0.01)
            writer.write(name, 0, values.view(-1).view(torch.uint8).numpy().data)
        writer.finish({"format": "pt"})
        paths.append(path)
        say(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, {layers} layers")
    return paths


def _command(tool: str, method: str, paths: list[Path], output: Path, mergekit: Path | None) -> list[str]:
    own, name, whole, each = PAIRS[method]
    base, *models = paths
    if tool == "foldd":
        inputs = models if method == "average" else paths
        given = [part for option in own for part in ("--option", option)]
        command = [sys.executable, "-m", "foldd.daemon.cli", "merge", *map(str, inputs), "--method", method, *given]
        return [*command, "-o", str(output)]
    assert mergekit is not None
    config: dict[str, Any] = {
        "merge_method": name, "dtype": "float32", "parameters": whole,
        "models": [{"model": str(path), "parameters": each} for path in models],
    }  # fmt: skip
    if method != "average":
        config["base_model"] = str(base)
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    return [str(mergekit.parent / "mergekit-pytorch"), str(path), str(output), "--quiet"]


# A small process starts the tool: the kernel counts the memory of whoever starts a process as that process' own peak.
_LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=2)
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    seconds, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print(os.waitstatus_to_exitcode(status), seconds, cpu, usage.ru_maxrss * 1024, file=file)
"""


def _run(command: list[str], folder: Path, threads: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and high-water mark of memory of one process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if "mergekit" in command[0]:
        environment.pop("PYTHONPATH", None)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    said = folder / "usage"
    launch = [sys.executable, "-S", "-c", _LAUNCHER, str(said), *command]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=True)
    status, seconds, cpu, peak = said.read_text().split()
    if int(status):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return float(seconds), float(cpu), int(peak)


def _only_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.safetensors"))


def _compare(one: Path, other: Path) -> None:
    """Stops where the tools' results differ by more than rounding."""
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        shared = set(a.keys()) & set(b.keys())
        worst = max(float((a.get_tensor(name) - b.get_tensor(name)).abs().max()) for name in shared)
    if worst > 1e-5 or not shared:
        raise SystemExit(f"{one.name} and {other.name} differ by {worst:g}.")
    say(f"both tools' results agree to {worst:.1e}")


if __name__ == "__main__":
    sys.exit(main())
