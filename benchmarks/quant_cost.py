"""What a quantization costs: seconds and peak memory by base, and what effort buys.

Each quantization runs in a process of its own, as foldd's worker does it, from a base's folder. For the large base the
time of a few iterations is measured and nearest rounding as a whole: what more would take follows.

As a program (`python -m benchmarks.quant_cost FOLDER ITERATIONS`) it is that process and prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INPUTS = 64


def measure(folder: Path, iterations: int) -> dict[str, Any]:
    """Seconds, CPU seconds and peak RSS above the imports of one quantization to W8A8, histograms included."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quant_cost", str(folder), str(iterations)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cost_rows(bases: dict[str, tuple[Path, tuple[int, ...]]]) -> Iterator[dict[str, Any]]:
    """Rows for each base and its numbers of iterations."""
    for name, (folder, counts) in bases.items():
        for iterations in counts:
            yield {
                "base": name, "method": "shipped", "bits": "w8a8", "merged": None, "iterations": iterations,
                **measure(folder, iterations),
            }  # fmt: skip


def _main(folder: Path, iterations: int) -> None:
    warnings.simplefilter("ignore")
    import torch

    from foldd.base.store import open_base
    from foldd.core.base_spec import read_base_spec
    from foldd.daemon.memory import peak_rss_bytes, reset_peak, return_freed_memory, rss_bytes
    from foldd.daemon.quantizing import folded_weights
    from foldd.quantize.calibrate import choose_ranges, observe_network
    from foldd.quantize.hdrq import as_shipped

    baseline = rss_bytes()
    model_bytes = read_base_spec(folder / "base.json").float_bytes
    return_freed_memory(model_bytes)
    base = open_base(folder)
    inputs = torch.randn(INPUTS, *base.spec.input_shape, generator=torch.Generator().manual_seed(0))
    reset_peak()
    started, busy = time.monotonic(), time.process_time()
    weights = folded_weights(base, base.weights)
    ranges = choose_ranges(base.folded, observe_network(base.folded, weights, inputs), 8)
    as_shipped(8, 8, iterations).quantize(base.folded, weights, None, ranges, inputs, seed=0)
    print(
        json.dumps({
            "seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - busy,
            "peak_rss_bytes": peak_rss_bytes() - baseline, "model_bytes": model_bytes,
        })
    )  # fmt: skip


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
