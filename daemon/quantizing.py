"""From a merged state to its quantized network, as a plan says: which bits, how much effort, on which inputs.

Weights come out of their files tensor by tensor, so that quantizing holds the integers and little else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldd.base.batch_norm import fold_norms
from foldd.base.lazy import Lazy
from foldd.base.network import Base
from foldd.core.quantized import QuantizedModel
from foldd.daemon.jobs import Plan
from foldd.export.audit import audit_artifact
from foldd.fusion.state import MergeState, merged_weights
from foldd.quantize.calibrate import add_histograms, choose_ranges, observe_network
from foldd.quantize.hdrq import Hdrq, as_published, as_shipped

# format → bits of weights, bits of activations
FORMATS: dict[str, tuple[int, int | None]] = {"w8a8": (8, 8), "w4a8": (4, 8), "w8": (8, None), "w4": (4, None)}


def observe_state(plan: Plan, before: MergeState, state: MergeState) -> MergeState:
    """The state with what its network's activations look like, where the format asks for their ranges.

    Histograms of all tasks that were folded so add up in the state.

    Args:
        before, state: before and after the fold.
    """
    if FORMATS[plan.format][1] is None:
        return state
    # The previous task's inputs were looked at in its own fold, unless activations were not quantized then.
    fresh = state.calibration if before.histograms else calibration_inputs(before, state)
    if fresh is None:
        return state
    weights = folded_weights(state.base, merged_weights(state))
    seen = observe_network(state.base.folded, weights, fresh)
    return replace(state, histograms=add_histograms(before.histograms, seen))


def quantize_state(
    plan: Plan, before: MergeState, state: MergeState, seed: int, progress: Callable[[float], None]
) -> QuantizedModel:
    """Quantizes the merged network, with the ranges that `observe_state` left.

    Calibration inputs are the fold's own: the previous task's and the incoming one's.

    Args:
        before, state: before the fold and after it, observed.
    """
    base, network = state.base, state.base.folded
    weight_bits, activation_bits = FORMATS[plan.format]
    warnings: list[str] = []
    ranges = {}
    if activation_bits is not None:
        ranges = choose_ranges(network, state.histograms, activation_bits)
        if not ranges:
            activation_bits = None
            warnings.append(
                "Only the weights are quantized: no task so far brought calibration inputs to learn ranges from."
            )
    how = make_quantizer(plan, weight_bits, activation_bits)
    weights = folded_weights(base, merged_weights(state))
    theta = folded_weights(base, base.weights) if how.pull else None
    inputs = calibration_inputs(before, state)
    model = how.quantize(network, weights, theta, ranges, inputs, seed=seed, progress=progress)
    count = 0 if inputs is None else len(inputs)
    report = {**model.report, "quantizer": plan.quantizer, "calibration_inputs": count, "warnings": warnings}
    return replace(model, report=report)


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


def folded_weights(base: Base, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights with the BatchNorms folded, as `fold_norms` does it: the skeleton's names → float32, each made anew with
    each access."""
    rules = base.folded.rules
    of = {name: rule for rule in rules for name in (rule.weight, rule.folded_bias)}
    gone = {name for rule in rules for name in rule.tensors} - {rule.weight for rule in rules}

    def make(name: str) -> Tensor:
        if (rule := of.get(name)) is None:
            return weights[name]
        return torch.from_numpy(fold_norms({part: weights[part].numpy() for part in rule.tensors}, (rule,))[name])

    return Lazy([*(name for name in weights if name not in gone), *(rule.folded_bias for rule in rules)], make)


def calibration_inputs(before: MergeState, state: MergeState) -> Tensor | None:
    """The previous task's inputs and the incoming one's, [n, …], or None where there are neither."""
    found = [inputs for inputs in (before.calibration, state.calibration) if inputs is not None]
    return torch.cat(found) if found else None
