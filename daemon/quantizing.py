"""From a merged state to its quantized network, as a plan says: which bits, how much effort, on which inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldd.base.batch_norm import fold_norms
from foldd.base.network import Base
from foldd.core.quantized import QuantizedModel
from foldd.daemon.jobs import Plan
from foldd.export.audit import audit_artifact
from foldd.fusion.state import MergeState, merged_weights
from foldd.quantize.calibrate import add_histograms, choose_ranges, observe_network
from foldd.quantize.hdrq import Hdrq, as_published, as_shipped

# format → bits of weights, bits of activations
FORMATS: dict[str, tuple[int, int | None]] = {"w8a8": (8, 8), "w4a8": (4, 8), "w8": (8, None), "w4": (4, None)}


def quantize_state(
    plan: Plan, before: MergeState, state: MergeState, seed: int, progress: Callable[[float], None]
) -> tuple[MergeState, QuantizedModel]:
    """Quantizes the merged network; returns the state with what it saw of activations, and the network.

    Calibration inputs are the fold's own: the previous task's and the incoming one's. Ranges are those of all tasks
    that were folded in a format with quantized activations: their histograms add up in the state.

    Args:
        before, state: before and after the fold.
    """
    base, network = state.base, state.base.folded
    weights = folded_weights(base, merged_weights(state))
    inputs = calibration_inputs(before, state)
    weight_bits, activation_bits = FORMATS[plan.format]
    warnings: list[str] = []
    ranges = {}
    if activation_bits is not None:
        # The previous task's inputs were looked at in its own fold, unless activations were not quantized then.
        fresh = state.calibration if before.histograms else inputs
        if fresh is not None:
            seen = observe_network(network, weights, fresh)
            state = replace(state, histograms=add_histograms(before.histograms, seen))
        ranges = choose_ranges(network, state.histograms, activation_bits)
        if not ranges:
            activation_bits = None
            warnings.append(
                "Only the weights are quantized: no task so far brought calibration inputs to learn ranges from."
            )
    how = make_quantizer(plan, weight_bits, activation_bits)
    theta = folded_weights(base, dict(base.weights)) if how.pull else None
    model = how.quantize(network, weights, theta, ranges, inputs, seed=seed, progress=progress)
    count = 0 if inputs is None else len(inputs)
    report = {**model.report, "quantizer": plan.quantizer, "calibration_inputs": count, "warnings": warnings}
    return state, replace(model, report=report)


def audited(model: QuantizedModel, artifact: Path) -> dict[str, Any]:
    """What is reported of a quantization, with what onnxruntime makes of the artifact."""
    found = audit_artifact(artifact)
    meant = {place.removesuffix(":input") for place in model.activations}
    left = {name: why for name, why in found.left_float.items() if name in meant}
    slow = [f"{name} stays float in onnxruntime: {why}." for name, why in left.items()]
    return {
        **model.report, "kernels": dict(found.kernels), "fused": len(found.fused),
        "left_float": left, "folded": len(found.folded) + len(found.left_float) - len(left),
        "warnings": [*model.report.get("warnings", ()), *slow],
    }  # fmt: skip


def make_quantizer(plan: Plan, weight_bits: int, activation_bits: int | None) -> Hdrq:
    """The quantizer that a plan names."""
    make: Any = as_published if plan.quantizer == "hdrq-paper" else as_shipped
    how: Hdrq = make(weight_bits, activation_bits, plan.iterations)
    return how


def folded_weights(base: Base, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the BatchNorms folded: the skeleton's names → float32."""
    arrays = fold_norms({name: tensor.numpy() for name, tensor in weights.items()}, base.folded.rules)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def calibration_inputs(before: MergeState, state: MergeState) -> Tensor | None:
    """The previous task's inputs and the incoming one's, [n, …], or None where there are neither."""
    found = [inputs for inputs in (before.calibration, state.calibration) if inputs is not None]
    return torch.cat(found) if found else None
