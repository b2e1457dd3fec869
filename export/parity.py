"""Does the artifact compute in onnxruntime what torch computed?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from foldd.core.errors import Refused

BATCH = 64  # inputs at a time: activations must not grow with the calibration set


def run_artifact(
    model: Path, inputs: np.ndarray, outputs: list[str], *, threads: int = 1, optimised: bool = True
) -> dict[str, np.ndarray]:
    """Output name → array, from onnxruntime's CPU provider.

    Args:
        inputs: [n, …] float32.
        optimised: as a device runs it; otherwise node by node as the file says, which is what a quantized artifact
            means: integer kernels differ from that by a code here and there (onnxruntime #25259, #32132).
    """
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    pieces = [session.run(outputs, {"input": inputs[start : start + BATCH]}) for start in range(0, len(inputs), BATCH)]
    return {name: np.concatenate([piece[i] for piece in pieces]) for i, name in enumerate(outputs)}


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |actual − expected| / max |expected|; infinite where either is not finite."""
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0))
    difference = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))
    return difference / scale if scale > 0 else difference


def signal_to_noise(actual: np.ndarray, expected: np.ndarray) -> float:
    """10·log₁₀(Σ expected² / Σ (actual − expected)²), in dB; infinite where they are equal.

    Minus infinity where either holds values that are not finite.
    """
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("-inf")
    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(actual.astype(np.float64) - expected).sum())
    if noise == 0:
        return float("inf")
    return 10 * math.log10(signal / noise) if signal > 0 else float("-inf")


def check_parity(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], limit: float) -> float:
    """The largest relative difference over all outputs.

    Raises:
        Refused: `parity` where it is over the limit.
    """
    worst, name = max((relative_difference(actual[output], expected[output]), output) for output in expected)
    if not worst <= limit:
        raise Refused(
            "parity",
            f"onnxruntime and torch differ by {worst:.2e} of the largest value in {name!r}, the limit is {limit:.0e}.",
            why="a fault in the export of this architecture, or weights so large that float32 does not hold them.",
            remedy="Keep the state directory and report it; the last generation goes on serving.",
        )
    return worst


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """Share of samples whose largest logit is the same class. Both [n, classes]."""
    return float((left.argmax(1) == right.argmax(1)).mean())
