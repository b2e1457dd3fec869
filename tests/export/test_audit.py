"""The audit names each layer that onnxruntime leaves in float, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from quantized_kit import quantize, range_of, symmetric, write_skeleton
from test_quantized_networks import build

from foldd.core.quantized import ActivationRange, QuantizedModel
from foldd.export.audit import audit_artifact


@pytest.mark.parametrize(
    ("name", "without", "left", "reason"),
    [
        ("residual", "shortcut.weight:output", "shortcut.weight", "its output is not quantized"),
        ("residual", "stem.weight:input", "stem.weight", "its input is not quantized, only its weights are"),
        ("attention", "patch.weight:output", "patch.weight", "its output is not quantized"),
        ("attention", "fc1.weight:input", "fc1.weight", "its input is not quantized, only its weights are"),
        ("with_head", "again.weight:input", "again.weight", "its input is not quantized, only its weights are"),
    ],
)
def test_a_missing_place(base_folder, tmp_path, name, without, left, reason):
    skeleton, quantized = quantize(base_folder(name), name)
    activations = {place: given for place, given in quantized.activations.items() if place != without}
    audit = audit_artifact(build(skeleton, replace(quantized, activations=activations), tmp_path / "model.onnx"))
    assert audit.left_float == {left: reason}
    assert set(audit.fused) == set(quantized.weights) - {left}
    assert audit.folded == ()


def test_a_relu_before_a_range_that_starts_below_zero(base_folder, tmp_path):
    skeleton, quantized = quantize(base_folder("residual"), "residual")
    given = quantized.activations["stem.weight:output"]
    activations = {
        place: ActivationRange(given.step, 10, 8) if known == given else known
        for place, known in quantized.activations.items()
    }
    audit = audit_artifact(build(skeleton, replace(quantized, activations=activations), tmp_path / "model.onnx"))
    assert audit.left_float.keys() == {"stem.weight"}
    assert "below 0" in audit.left_float["stem.weight"]


def test_integer_weights_that_nothing_fuses_with(base_folder, tmp_path):
    """A file of another writer: INT4 straight into DequantizeLinear, which is slower than float32."""
    skeleton, quantized = quantize(base_folder("attention"), "attention", 4)
    model = onnx.load(build(skeleton, quantized, tmp_path / "model.onnx"))
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for initializer in model.graph.initializer:
        if initializer.name.startswith("zero/INT8"):
            initializer.data_type = onnx.TensorProto.INT4
            initializer.raw_data = bytes((initializer.dims[0] + 1) // 2)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in casts:
            node.input[0] = casts[node.input[0]]
    onnx.save(model, tmp_path / "model.onnx")
    audit = audit_artifact(tmp_path / "model.onnx")
    assert set(audit.left_float) == set(quantized.weights)
    assert set(audit.left_float.values()) == {"the pattern is complete, but this onnxruntime has no kernel for it"}


def test_weights_that_are_not_folded(base_folder, tmp_path):
    """As inputs that a caller may replace they are no constants."""
    skeleton, quantized = quantize(base_folder("residual"), "residual")
    model = onnx.load(build(skeleton, replace(quantized, activations={}), tmp_path / "model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("conv.weight/"):
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "model.onnx")
    audit = audit_artifact(tmp_path / "model.onnx")
    assert audit.left_float == {"conv.weight": "its weights are expanded to float at every inference"}
    assert set(audit.folded) == {"stem.weight", "shortcut.weight"}


def test_of_two_layers_with_one_weight_both_must_fuse(tmp_path):
    """The second convolution's output has no range: its kernel would have to be float."""
    weight = np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [("Conv", ["input", "w"], "first", {}), ("Relu", ["first"], "middle", {})]
    nodes += [("Conv", ["middle", "w"], "second", {}), ("Relu", ["second"], "features", {})]
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, {"w": weight}, (4, 3, 3), (4, 3, 3))
    model = QuantizedModel({"w": symmetric(weight, 8)}, {}, dict.fromkeys(("w:input", "w:output"), range_of(0, 3)))
    audit = audit_artifact(build(skeleton, model, tmp_path / "model.onnx"))
    assert (audit.fused, audit.left_float, audit.kernels) == (("w",), {}, {"QLinearConv": 2})
    cut = onnx.load(tmp_path / "model.onnx")
    kept = [node for node in cut.graph.node if "features" not in node.output and "features/float" not in node.input]
    next(node for node in kept if "features/float" in node.output).output[0] = "features"
    del cut.graph.node[:]
    cut.graph.node.extend(kept)
    onnx.save(cut, tmp_path / "model.onnx")
    audit = audit_artifact(tmp_path / "model.onnx")
    assert (audit.fused, audit.left_float) == ((), {"w": "its output is not quantized"})
