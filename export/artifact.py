"""An artifact: the skeleton with one generation's weights, and one `logits/<task>` output per head.

Putting tensors into the skeleton costs milliseconds, exporting again costs seconds
(`make bench-export` measures both). `patch` and `finish` are the two halves that `quantized.py` shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from foldd.core.bundle import Head
from foldd.core.errors import BadSetup, Refused
from foldd.core.files import write_file

FEATURES = "features"
MAX_ONNX_BYTES = 2**31 - 1  # protobuf's own limit for one message


def build_artifact(
    skeleton: Path,
    weights: Mapping[str, np.ndarray],
    heads: Mapping[str, Head],
    target: Path,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Writes `model.onnx`, durably.

    Args:
        weights: initializer name → float32 array, BatchNorm already folded; exactly the skeleton's tensors.
        heads: task → weight [classes, features], bias [classes].
        metadata: provenance that the model carries in its `metadata_props`.

    Raises:
        BadSetup: `wrong-skeleton` where names or shapes differ.
        Refused: `artifact-too-large` over 2 GiB: so large a head does not fit.
    """
    model = onnx.load(skeleton)
    patch(model.graph, weights)
    finish(model, heads, target, metadata=metadata)


def patch(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray]) -> None:
    """Puts float32 arrays into the initializers of their names. Raises `BadSetup` as `build_artifact` does."""
    wanted = find_tensors(graph, {name: array.shape for name, array in weights.items()})
    for name, array in weights.items():
        wanted[name].raw_data = array.astype("<f4", copy=False).tobytes()


def find_tensors(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, onnx.TensorProto]:
    """The float initializers of these names.

    Raises:
        BadSetup: `wrong-skeleton` where one is missing or has another shape.
    """
    wanted = {i.name: i for i in graph.initializer if i.data_type == TensorProto.FLOAT and i.name in shapes}
    if missing := [name for name in shapes if name not in wanted]:
        raise BadSetup(
            "wrong-skeleton",
            f"The skeleton has no initializer {missing[0]!r}.",
            why="the state directory mixes two bases.",
            remedy="Run `foldd init` into a fresh state directory.",
        )
    for name, shape in shapes.items():
        if tuple(wanted[name].dims) != shape:
            raise BadSetup("wrong-skeleton", f"{name} is {shape}, the skeleton's is {tuple(wanted[name].dims)}.")
    return wanted


def finish(model: onnx.ModelProto, heads: Mapping[str, Head], target: Path, *, metadata: Mapping[str, str]) -> None:
    """Adds heads and provenance and writes the file, durably. Raises `Refused` as `build_artifact` does."""
    if heads:
        _add_heads(model.graph, heads)
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    size = model.ByteSize()
    if size > MAX_ONNX_BYTES:
        raise Refused("artifact-too-large", f"The model would be {size} bytes; one ONNX file holds {MAX_ONNX_BYTES}.")
    write_file(target, model.SerializeToString(deterministic=True))


def _add_heads(graph: onnx.GraphProto, heads: Mapping[str, Head]) -> None:
    """logits/<task> = features · weightᵀ + bias.

    All heads are one product that is split: onnxruntime computes every head with each request anyway, and twelve small
    products took a tenth of a small network's time.
    """
    tasks = sorted(heads)
    weight = np.concatenate([heads[task].weight for task in tasks])
    bias = np.concatenate([heads[task].bias for task in tasks])
    for name, array in (("heads/weight", weight), ("heads/bias", bias)):
        data = np.ascontiguousarray(array, "<f4").tobytes()
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, array.shape, data, raw=True))
    outputs, sizes = [f"logits/{task}" for task in tasks], [len(heads[task].bias) for task in tasks]
    together = outputs[0] if len(tasks) == 1 else "heads/logits"
    graph.node.append(
        helper.make_node("Gemm", [FEATURES, "heads/weight", "heads/bias"], [together], name=together, transB=1)
    )
    if len(tasks) > 1:
        graph.initializer.append(helper.make_tensor("heads/sizes", TensorProto.INT64, [len(sizes)], sizes))
        graph.node.append(helper.make_node("Split", [together, "heads/sizes"], outputs, name="heads/split", axis=1))
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    for output, size in zip(outputs, sizes, strict=True):
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, size]))
