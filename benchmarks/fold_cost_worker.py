"""One method's process in `fold_cost`: folds what it is told, from file to file as foldd's worker does, and counts.

Arguments: the base's folder, the method, its options as JSON, threads. A line of JSON on standard input for each fold:
`bundle`, `state` (a file or null), `target` (the state after the fold); or `activations`: a bundle. Answers are lines
of JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_data import settled_rss
from benchmarks.rivals.naive import OtmfNaive
from foldd.base.network import Base
from foldd.base.store import open_base
from foldd.base.walk import Lane
from foldd.core.base_spec import read_base_spec
from foldd.core.bundle import open_bundle
from foldd.core.roles import Role
from foldd.daemon.memory import peak_rss_bytes, reset_peak, return_freed_memory, rss_bytes
from foldd.daemon.methods import METHODS
from foldd.daemon.pipeline import read_state, tensor_bytes, write_state
from foldd.fusion.method import FoldMethod
from foldd.fusion.otmf import BACKWARD_BATCH, Otmf
from foldd.fusion.state import empty_state


def main(arguments: list[str]) -> int:
    warnings.simplefilter("ignore")  # torch's loader warns of its own deprecations
    folder, name, options = Path(arguments[0]), arguments[1], json.loads(arguments[2])
    method: FoldMethod = (OtmfNaive if name == "otmf-naive" else METHODS[name])(**options)
    torch.set_num_threads(int(arguments[3]))
    # These and what is said to glibc as the worker.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.mkldnn.deterministic = True  # type: ignore[assignment]
    baseline = rss_bytes()
    return_freed_memory(read_base_spec(folder / "base.json").float_bytes)
    base = open_base(folder)
    for line in sys.stdin:
        order = json.loads(line)
        if "activations" in order:
            answer: dict[str, Any] = {"activation_bytes": _activations(method, base, Path(order["activations"]))}
        else:
            answer = _fold(method, base, order, baseline)
        print(json.dumps(answer), flush=True)
    return 0


def _fold(method: FoldMethod, base: Base, order: dict[str, Any], baseline: int) -> dict[str, Any]:
    resident = settled_rss()
    reset_peak()
    checkpoint = open_bundle(Path(order["bundle"]), base.spec)
    state = empty_state(base)
    if order["state"]:
        state = read_state(base, Path(order["state"]))
    begun, busy = time.perf_counter(), time.process_time()
    new, report = method.fold(state, checkpoint, seed=1)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    peak = peak_rss_bytes()
    target = Path(order["target"])
    write_state(new, target)
    return {
        "seconds": seconds, "cpu_seconds": busy, "peak_rss_bytes": max(0, peak - baseline),
        "saved_peak_bytes": max(0, peak_rss_bytes() - baseline), "resident_bytes": max(0, resident - baseline),
        "state_bytes": target.stat().st_size, "tensor_bytes": tensor_bytes(), "agreement": dict(report.agreement),
    }  # fmt: skip


def _activations(method: FoldMethod, base: Base, bundle: Path) -> int:
    """What running the network costs by itself: the passes that the method makes, on the same inputs, through weights
    that are there already, and nothing done with what comes out."""
    inputs = open_bundle(bundle, base.spec).inputs
    if not method.needs_calibration or inputs is None:
        return 0
    images, weights = torch.from_numpy(inputs), dict(base.weights)
    both = torch.cat([images, images])
    before = settled_rss()
    reset_peak()
    if isinstance(method, Otmf):
        base.walker.gradients(weights, images[:BACKWARD_BATCH], lambda features: features.sum(), lambda *_: None)
        for _ in base.walker.walk([Lane(weights, images), Lane(weights, both), Lane(weights, both)]):
            pass
    else:
        for name, weight in weights.items():
            if base.role(name) is not Role.STATISTIC:
                weight.requires_grad_().register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
        base.features(weights, images[: getattr(method, "batch", len(images))]).sum().backward()  # type: ignore[no-untyped-call]
    return max(0, peak_rss_bytes() - before)


def _drop(leaf: Tensor) -> None:
    leaf.grad = None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
