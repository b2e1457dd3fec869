"""Whole quantized networks, in onnxruntime as the file says and simulated in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized_kit import dequantized, images, quantize, simulate
from test_artifact import heads

from foldd.base.batch_norm import fold_norms
from foldd.base.store import open_base, open_skeleton
from foldd.core.errors import BadSetup
from foldd.core.quantized import QuantizedModel, QuantizedTensor
from foldd.export.artifact import build_artifact
from foldd.export.audit import audit_artifact
from foldd.export.graph import Graph, resolve
from foldd.export.parity import relative_difference, run_artifact, signal_to_noise
from foldd.export.quantized import build_quantized_artifact

NETWORKS = ["residual", "attention", "with_head"]


def build(skeleton, quantized, target, given=None):
    build_quantized_artifact(skeleton, quantized, given or {}, target, metadata={"foldd.generation": "7"})
    return target


def features(model, inputs, *, optimised=True):
    return run_artifact(model, inputs, ["features"], optimised=optimised)["features"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_simulation_without_quantizing_is_the_network(base_folder, name):
    """What the other tests compare with."""
    base = open_base(base_folder(name))
    folded = fold_norms({n: t.numpy() for n, t in base.weights.items()}, open_skeleton(base_folder(name))[1])
    with torch.no_grad():
        expected = base.features(base.weights, torch.from_numpy(images())).numpy()
    assert relative_difference(simulate(name, folded, {}, images()), expected) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_artifact_computes_what_the_simulation_does(base_folder, tmp_path, name, bits):
    skeleton, quantized = quantize(base_folder(name), name, bits)
    model = build(skeleton, quantized, tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    expected = simulate(name, dequantized(quantized), quantized.activations, images())
    for optimised in (False, True):
        actual = features(model, images(), optimised=optimised)
        assert signal_to_noise(actual, expected) > 45
        # What may be left is a code that rounds to the other side, here and there.
        same = np.abs(actual - expected).max(1) < 1e-5 * np.abs(expected).max()
        assert same.mean() > 0.9
    unlike = simulate(name, dequantized(quantized), {}, images())
    assert signal_to_noise(unlike, expected) < 20, "quantizing activations would not show"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_without_activations_an_artifact_is_the_float_network_with_rounded_weights(base_folder, tmp_path, name, bits):
    skeleton, quantized = quantize(base_folder(name), name, bits)
    quantized = replace(quantized, activations={})
    model = build(skeleton, quantized, tmp_path / "model.onnx")
    build_artifact(skeleton, dequantized(quantized), {}, tmp_path / "float.onnx", metadata={})
    expected = features(tmp_path / "float.onnx", images())
    for optimised in (True, False):
        assert relative_difference(features(model, images(), optimised=optimised), expected) < 1e-5
    audit = audit_artifact(model)
    assert (audit.kernels, audit.fused, audit.left_float) == ({}, (), {})
    assert set(audit.folded) == set(quantized.weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_container_of_the_weights_does_not_matter(base_folder, tmp_path, name):
    skeleton, quantized = quantize(base_folder(name), name, 4)
    wide = {n: replace(weight, bits=8) for n, weight in quantized.weights.items()}
    small = build(skeleton, quantized, tmp_path / "small.onnx")
    large = build(skeleton, replace(quantized, weights=wide), tmp_path / "large.onnx")
    assert small.stat().st_size < large.stat().st_size
    assert np.array_equal(features(small, images()), features(large, images()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("residual", {"QLinearAdd": 1, "QLinearConv": 3}), ("attention", {"MatMulIntegerToFloat": 4, "QLinearConv": 1}),
     ("with_head", {"QGemm": 2, "QLinearAdd": 1, "QLinearConv": 3})],
)  # fmt: skip
def test_every_layer_runs_in_integers(base_folder, tmp_path, name, kernels, bits):
    skeleton, quantized = quantize(base_folder(name), name, bits)
    audit = audit_artifact(build(skeleton, quantized, tmp_path / "model.onnx"))
    assert audit.left_float == {}
    assert audit.kernels == kernels
    assert set(audit.fused) == set(quantized.weights)


def test_places_are_behind_the_relu_that_alone_takes_them(base_folder, tmp_path):
    skeleton, quantized = quantize(base_folder("residual"), "residual")
    model = onnx.load(skeleton)
    places = resolve(Graph(model.graph), quantized.activations)
    assert {place: tensor for tensor, (place, _) in places.everywhere.items()} == {
        "stem.weight:output": "relu",
        "conv.weight:output": "conv2d_1",
        "shortcut.weight:output": "conv2d_2",
        "conv.weight:sum": "relu_1",
    }
    assert set(places.at_layers) == set(quantized.weights)
    model.graph.node.append(onnx.helper.make_node("Neg", ["conv2d"], ["another"]))
    places = resolve(Graph(model.graph), {"stem.weight:output": quantized.activations["stem.weight:output"]})
    assert list(places.everywhere) == ["conv2d"], "the ReLU is not all that takes it"


def test_a_layer_that_is_not_quantized_stays_as_it_is(base_folder, tmp_path):
    """The first layer in float, the second with eight bits among others of four."""
    skeleton, quantized = quantize(base_folder("residual"), "residual", 4)
    _, fine = quantize(base_folder("residual"), "residual", 8)
    weights = {"conv.weight": fine.weights["conv.weight"], "shortcut.weight": quantized.weights["shortcut.weight"]}
    activations = {p: r for p, r in quantized.activations.items() if p != "stem.weight:input"}
    stem = quantized.weights["stem.weight"].values()
    mixed = QuantizedModel(weights, {**quantized.floats, "stem.weight": stem}, activations)
    model = build(skeleton, mixed, tmp_path / "model.onnx")
    expected = simulate("residual", dequantized(mixed), activations, images())
    assert signal_to_noise(features(model, images(), optimised=False), expected) > 45
    stored = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in onnx.load(model).graph.initializer}
    assert stored["conv.weight/codes"] == "INT8"
    assert stored["shortcut.weight/codes"] == "INT4"
    assert stored["stem.weight"] == "FLOAT"
    assert set(audit_artifact(model).fused) == {"conv.weight", "shortcut.weight"}


def test_outputs_heads_and_provenance_are_those_of_a_float_artifact(base_folder, tmp_path):
    skeleton, quantized = quantize(base_folder("attention"), "attention")
    given = heads(open_base(base_folder("attention")), **{"a.b-c_d": 2, "z": 3})
    model = build(skeleton, quantized, tmp_path / "model.onnx", given)
    session = onnxruntime.InferenceSession(model)
    assert [(o.name, o.shape, o.type) for o in session.get_outputs()] == [
        ("features", ["batch", 16], "tensor(float)"),
        ("logits/a.b-c_d", ["batch", 2], "tensor(float)"),
        ("logits/z", ["batch", 3], "tensor(float)"),
    ]
    assert session.get_modelmeta().custom_metadata_map == {"foldd.generation": "7"}
    answers = run_artifact(model, images(5), ["features", "logits/z"])
    assert answers["logits/z"] == pytest.approx(answers["features"] @ given["z"].weight.T + given["z"].bias, abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_input_gives_equal_bytes(base_folder, tmp_path, bits):
    for name in ("a", "b"):
        skeleton, quantized = quantize(base_folder("with_head"), "with_head", bits)
        shuffled = dict(reversed(quantized.weights.items())), dict(reversed(quantized.activations.items()))
        if name == "b":
            quantized = replace(quantized, weights=shuffled[0], activations=shuffled[1])
        build(skeleton, quantized, tmp_path / name, heads(open_base(base_folder("with_head")), t=3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_of_another_network_are_refused(base_folder, tmp_path):
    skeleton, quantized = quantize(base_folder("residual"), "residual")
    misshapen = QuantizedTensor(np.zeros((1, 2), np.int8), np.float32(1), 8)
    for weights in ({"nowhere": misshapen}, {"conv.weight": misshapen}):
        with pytest.raises(BadSetup) as caught:
            build(skeleton, replace(quantized, weights=weights), tmp_path / "model.onnx")
        assert caught.value.code == "wrong-skeleton"
    assert not (tmp_path / "model.onnx").exists()
