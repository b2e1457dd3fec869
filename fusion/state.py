"""All that the next fold needs: the merged task vector, heads, the previous task's calibration set, a count.

Its size does not grow with the number of tasks but for the heads, which every method must keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foldd.base.lazy import Lazy
from foldd.base.network import Base
from foldd.core.errors import BadSetup
from foldd.core.quantized import QuantizedTensor
from foldd.core.tensorfile import hand_back
from foldd.fusion.integers import BITS, IntegerVector


@dataclass(frozen=True, eq=False)
class HeadTensors:
    """A task's linear classifier on the features: weight [classes, features], bias [classes], float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features [n, features] → logits [n, classes]."""
        return features @ self.weight.to(features.dtype).T + self.bias.to(features.dtype)


@dataclass(frozen=True, eq=False)
class MergeState:
    """The merge so far. Tensors are never changed in place: a fold returns a new state.

    Of a state that was read from a file, `merged` and `statistics` stay there, and each access reads a tensor.

    Attributes:
        base: θ⁰; not serialised, its digest is.
        merged: merged task vector θ_merged − θ⁰: the names of `base.weights`, statistics included, float32; an
            `IntegerVector` where its weights are kept in integers.
        statistics: the method's own tensors, of constant size; may be empty.
        heads: task → head, in name order.
        histograms: of activations by place, over all tasks folded since activations are quantized; what they are is
            the quantizer's to know.
        calibration: the last folded task's calibration inputs [n, *input_shape]; None where it had none.
        previous: the task that was folded last.
        count: folds so far.
        labels: of the calibration inputs, [n], int64; kept where a later fold may borrow these samples
            (foldd.fusion.alignment), else None.
        classes: names of the classes that these labels number; None without labels.
    """

    base: Base
    merged: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    heads: dict[str, HeadTensors] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: Tensor | None = None
    previous: str | None = None
    count: int = 0
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None


def empty_state(base: Base) -> MergeState:
    """The state before the first fold: θ⁰ itself."""
    return MergeState(base, Lazy(base.weights, lambda name: torch.zeros_like(base.weights[name])))


def merged_weights(state: MergeState) -> Mapping[str, Tensor]:
    """θ⁰ + merged task vector, statistics included: float32, added up anew with each access."""
    return Lazy(state.base.weights, lambda name: state.base.weights[name] + state.merged[name])


def pack(state: MergeState) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The state as arrays and string metadata for one `.safetensors` file: contiguous, and views that nobody may write
    to, so that a state in memory is not held twice.

    Names: `merged/<name>`, `statistics/<name>`, `histograms/<place>`, `heads/<task>/weight`, `heads/<task>/bias`,
    `calibration/inputs`, `calibration/labels`; of an `IntegerVector` the codes are `merged/<name>` and its steps
    `step/<name>`.
    """
    codes = state.merged.codes if isinstance(state.merged, IntegerVector) else {}
    tensors = {f"merged/{name}": state.merged[name] for name in state.merged if name not in codes}
    tensors |= {f"statistics/{name}": tensor for name, tensor in state.statistics.items()}
    tensors |= {f"histograms/{name}": tensor for name, tensor in state.histograms.items()}
    for task, head in state.heads.items():
        tensors |= {f"heads/{task}/weight": head.weight, f"heads/{task}/bias": head.bias}
    if state.calibration is not None:
        tensors["calibration/inputs"] = state.calibration
    if state.labels is not None:
        tensors["calibration/labels"] = state.labels
    metadata = {"count": str(state.count), "base": state.base.spec.digest}
    if state.previous is not None:
        metadata["previous"] = state.previous
    if state.classes is not None:
        metadata["classes"] = json.dumps(state.classes)
    arrays = {name: np.asarray(tensor.detach().numpy(), order="C").view() for name, tensor in tensors.items()}
    for name, kept in codes.items():
        arrays |= {f"merged/{name}": kept.codes.view(), f"step/{name}": kept.step.view()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays, metadata


def unpack(base: Base, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> MergeState:
    """Reads what `pack` wrote, bit for bit; merged vector and statistics are read with each access.

    Args:
        tensors: name → array; views of a mapped file are handed back to it after each reading.

    Raises:
        BadSetup: `broken-state` where tensors are missing or misshapen, `wrong-base` where it belongs to another θ⁰.
    """
    if metadata.get("base") != base.spec.digest:
        raise BadSetup(
            "wrong-base",
            f"The merge state belongs to base {metadata.get('base', '(none)')[:16]}…, "
            f"this base is {base.spec.digest[:16]}….",
            why="the base was replaced under an existing state directory.",
            remedy="Put the old base back, or start a fresh state directory.",
        )
    groups: dict[str, dict[str, np.ndarray]] = {
        group: {} for group in ("merged", "step", "statistics", "histograms", "heads", "calibration")
    }
    for name in sorted(tensors, key=str.encode):
        group, _, rest = name.partition("/")
        if group not in groups:
            raise _broken(f"it has a tensor {name!r} that no state has")
        groups[group][rest] = tensors[name]
    statistics = groups["statistics"]
    heads = {name: as_tensor(array) for name, array in groups["heads"].items()}
    inputs = groups["calibration"].get("inputs")
    labels, classes = _labels(groups["calibration"], metadata)
    tasks = sorted({name.rpartition("/")[0] for name in heads}, key=str.encode)
    if missing := [f"{task}/{part}" for task in tasks for part in ("weight", "bias") if f"{task}/{part}" not in heads]:
        raise _broken(f"it lacks heads/{missing[0]}")
    count = metadata.get("count", "")
    if not (count.isascii() and count.isdigit()):
        raise _broken(f"its count is {count!r}")
    return MergeState(
        base=base,
        merged=_merged(base, groups["merged"], groups["step"]),
        statistics=Lazy(statistics, lambda name: as_tensor(statistics[name])),
        heads={task: HeadTensors(heads[f"{task}/weight"], heads[f"{task}/bias"]) for task in tasks},
        histograms={name: as_tensor(array) for name, array in groups["histograms"].items()},
        calibration=None if inputs is None else as_tensor(inputs),
        previous=metadata.get("previous"),
        count=int(count),
        labels=labels,
        classes=classes,
    )


def _merged(base: Base, arrays: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray]) -> Mapping[str, Tensor]:
    """The merged vector out of its arrays, in the base's order: it is part of the state, sums follow it."""
    if arrays.keys() != base.weights.keys():
        raise _broken(f"its names differ from the base's in {sorted(arrays.keys() ^ base.weights.keys())[:3]}")
    for name, array in arrays.items():
        shape = base.spec.tensors[name].shape
        if array.shape != shape:
            raise _broken(f"{name} is {list(array.shape)}, the base's is {list(shape)}")
        if array.dtype not in (np.float32, np.int8):
            raise _broken(f"{name} has type {array.dtype}")
    codes = {name for name, array in arrays.items() if array.dtype == np.int8}
    if codes != steps.keys():
        raise _broken(f"it has codes or steps alone for {sorted(codes ^ steps.keys())[:3]}")
    floats = Lazy((name for name in base.weights if name not in codes), lambda name: as_tensor(arrays[name]))
    if not codes:
        return floats
    kept = {name: QuantizedTensor(arrays[name], np.array(steps[name]), BITS) for name in base.weights if name in codes}
    for name, tensor in kept.items():
        fits = tensor.step.shape == tensor.codes.shape[:1] and tensor.step.dtype == np.float32
        if not fits or not (np.isfinite(tensor.step) & (tensor.step > 0)).all():
            raise _broken(f"the steps of {name} are no positive float32 numbers, one for each channel")
    return IntegerVector(base.weights, kept, floats)


def _labels(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[Tensor, tuple[str, ...]] | tuple[None, None]:
    """The calibration inputs' labels and the names of their classes; states from before they were kept have none."""
    if "labels" not in arrays:
        return None, None
    labels = arrays["labels"]
    try:
        classes = tuple(str(name) for name in json.loads(metadata["classes"]))
    except (KeyError, ValueError, TypeError) as error:
        raise _broken("it has labels and no names for their classes") from error
    fits = "inputs" in arrays and labels.shape == arrays["inputs"].shape[:1] and labels.dtype == np.int64
    if not fits or not ((labels >= 0) & (labels < len(classes))).all():
        raise _broken("its labels are no class numbers, one for each calibration input")
    return as_tensor(labels), classes


def as_tensor(array: np.ndarray) -> Tensor:
    """A fresh tensor with the array's values; a mapped file gets the array's pages back.

    It is allocated by torch, whose buffers are all aligned alike: kernels may sum an oddly aligned one in another
    order, and then a replayed fold would differ in its last bits.
    """
    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    tensor.numpy()[...] = array
    hand_back(array)
    return tensor


def _broken(what: str) -> BadSetup:
    return BadSetup(
        "broken-state",
        f"The merge state cannot be read: {what}.",
        why="the file was edited, damaged, or written by another version of foldd.",
        remedy="Restore the state directory from a backup, or start a fresh one and drop the checkpoints again.",
    )
