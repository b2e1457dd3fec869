"""One quantized layer at a time, in onnxruntime and in whole numbers with numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from quantized_kit import codes_of, range_of, symmetric, write_skeleton

from foldd.core.errors import BadSetup
from foldd.core.quantized import ActivationRange, QuantizedModel, QuantizedTensor
from foldd.export.audit import audit_artifact
from foldd.export.parity import relative_difference, run_artifact
from foldd.export.quantized import build_quantized_artifact

INPUT, OUTPUT = "w:input", "w:output"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(folder, skeleton, model, inputs, *, optimised=True):
    build_quantized_artifact(skeleton, model, {}, folder / "model.onnx", metadata={})
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return run_artifact(folder / "model.onnx", inputs, ["features"], optimised=optimised)["features"]


def convolve(x, w, groups):
    """Whole numbers [n, in, h, w] and [out, in/groups, 3, 3], one pixel of padding."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    parts = zip(np.split(windows, groups, 1), np.split(w, groups), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", left, right) for left, right in parts], 1)


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize(
    ("bits", "groups", "per_channel", "relu", "bias"),
    [(8, 1, True, True, True), (8, 1, False, False, True), (4, 2, True, True, True), (2, 1, True, False, False),
     (6, 4, True, True, False)],
)  # fmt: skip
def test_a_convolution_gives_exactly_the_codes_of_integer_arithmetic(
    tmp_path, optimised, bits, groups, per_channel, relu, bias
):
    tensors = {"w": random(8, 4 // groups, 3, 3)} | ({"b": random(8, seed=1)} if bias else {})
    more = {"group": groups, "pads": [1, 1, 1, 1]}
    nodes = [("Conv", ["input", *tensors], "conv" if relu else "features", more)]
    nodes += [("Relu", ["conv"], "features", {})] if relu else []
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, tensors, (4, 6, 6), (8, 6, 6))
    weight, inputs = symmetric(tensors["w"], bits, per_channel=per_channel), random(5, 4, 6, 6, seed=2)
    taken, given = range_of(inputs.min() / 2, inputs.max() / 2), range_of(0 if relu else -5, 6)
    floats = {"b": tensors["b"]} if bias else {}
    model = QuantizedModel({"w": weight}, floats, {INPUT: taken, OUTPUT: given})
    actual = run(tmp_path, skeleton, model, inputs, optimised=optimised)

    sums = convolve(codes_of(inputs, taken) - taken.zero_point, weight.codes.astype(np.int64), groups)
    step = np.float32(taken.step) * weight.step  # of the products, float32 like the file's
    step = np.broadcast_to(step, 8).astype(np.float64).reshape(8, 1, 1)
    if bias:
        sums = sums + np.rint(tensors["b"].reshape(8, 1, 1) / step)
    expected = codes_of(sums * step, given)  # clamped at zero point 0, which is the ReLU
    assert np.array_equal(np.rint(actual / given.step) + given.zero_point, expected)
    assert len(np.unique(expected)) > 50, "equality of few codes would say little"
    assert audit_artifact(tmp_path / "model.onnx").kernels == {"QLinearConv": 1}


def linear(folder, kind, tensors):
    if kind == "Gemm":
        nodes = [("Gemm", ["input", "w", "b"], "features", {"transB": 1})]
        return write_skeleton(folder / "s.onnx", nodes, tensors, (16,), (10,))
    nodes = [
        ("Transpose", ["w"], "turned", {"perm": [1, 0]}),
        ("MatMul", ["input", "turned"], "product", {}),
        ("Add", ["product", "b"], "features", {}),
    ]
    return write_skeleton(folder / "s.onnx", nodes, tensors, (7, 16), (7, 10))


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize(("bits", "per_channel"), [(8, True), (8, False), (4, True), (3, False)])
@pytest.mark.parametrize(("kind", "kernel"), [("Gemm", "QGemm"), ("MatMul", "MatMulIntegerToFloat")])
def test_a_linear_layer_gives_the_sums_of_integer_arithmetic(tmp_path, kind, kernel, bits, per_channel, optimised):
    tensors = {"w": random(10, 16), "b": random(10, seed=1)}
    weight = symmetric(tensors["w"], bits, per_channel=per_channel)
    inputs = random(6, *([16] if kind == "Gemm" else [7, 16]), seed=2)
    taken = range_of(inputs.min() / 2, inputs.max() / 2)
    model = QuantizedModel({"w": weight}, {"b": tensors["b"]}, {INPUT: taken})
    actual = run(tmp_path, linear(tmp_path, kind, tensors), model, inputs, optimised=optimised)

    step = taken.step * weight.step.astype(np.float64)
    bias = np.rint(tensors["b"] / step) * step if kind == "Gemm" else tensors["b"]
    expected = (codes_of(inputs, taken) - taken.zero_point) @ weight.codes.T.astype(np.int64) * step + bias
    assert relative_difference(actual, expected) < 1e-6
    assert audit_artifact(tmp_path / "model.onnx").kernels == {kernel: 1}
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "Transpose" not in kinds, "behind a DequantizeLinear it would keep the layer in float"


def test_four_bits_are_packed_two_a_byte_and_mean_the_same(tmp_path):
    """An odd number of codes, all of them used, and the same codes in a container of eight bits."""
    tensors = {"w": random(5, 3, 3, 3), "b": random(5)}
    skeleton = write_skeleton(
        tmp_path / "s.onnx", [("Conv", ["input", "w", "b"], "features", {})], tensors, (3, 8, 8), (5, 6, 6)
    )
    codes = np.resize(np.arange(-8, 8), tensors["w"].shape).astype(np.int8)
    answers = {}
    for bits in (4, 8):
        weight = QuantizedTensor(codes, np.float32(0.1) * np.ones(5, np.float32), bits)
        model = QuantizedModel({"w": weight}, {"b": tensors["b"]}, {INPUT: range_of(-2, 2), OUTPUT: range_of(-9, 9)})
        answers[bits] = run(tmp_path, skeleton, model, random(4, 3, 8, 8))
        stored = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}["w/codes"]
        assert len(stored.raw_data) == (codes.size + 1) // 2 if bits == 4 else codes.size
        assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), codes)
    assert np.array_equal(answers[4], answers[8])


def test_a_dead_channel_keeps_its_bias_and_its_layer_its_kernel(tmp_path):
    """Its step is next to nothing, so that in steps of the products the bias would need more than 32 bits."""
    tensors = {"w": random(4, 16), "b": random(4)}
    nodes = [("Gemm", ["input", "w", "b"], "features", {"transB": 1})]
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, tensors, (16,), (4,))
    weight = symmetric(tensors["w"], 8)
    weight.codes[2], weight.step[2] = 0, 1e-12
    model = QuantizedModel({"w": weight}, {"b": tensors["b"]}, {INPUT: range_of(-3, 3)})
    actual = run(tmp_path, skeleton, model, random(3, 16))
    assert actual[:, 2] == pytest.approx(np.full(3, tensors["b"][2]), rel=1e-6)
    assert audit_artifact(tmp_path / "model.onnx").fused == ("w",)


def test_a_bias_that_no_int32_holds_stays_float(tmp_path):
    tensors = {"w": random(4, 16), "b": np.full(4, 1e6, np.float32)}
    nodes = [("Gemm", ["input", "w", "b"], "features", {"transB": 1})]
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, tensors, (16,), (4,))
    weight = symmetric(tensors["w"] * np.float32(1e-4), 8)
    model = QuantizedModel({"w": weight}, {"b": tensors["b"]}, {INPUT: range_of(-3, 3)})
    assert run(tmp_path, skeleton, model, random(3, 16)) == pytest.approx(1e6, rel=1e-6)
    assert audit_artifact(tmp_path / "model.onnx").left_float == {"w": "its bias is float"}


def test_a_weight_that_something_else_reads_too_becomes_float_for_all(tmp_path):
    """A table that is also a linear layer, as with tied embeddings."""
    tensors = {"w": random(10, 16), "b": random(10)}
    nodes = [
        ("Gemm", ["input", "w", "b"], "scores", {"transB": 1}),
        ("ArgMax", ["scores"], "best", {"axis": 1, "keepdims": 0}),
        ("Gather", ["w", "best"], "features", {}),
    ]
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, tensors, (16,), (16,))
    weight, inputs = symmetric(tensors["w"], 8), random(20, 16, seed=1)
    model = QuantizedModel({"w": weight}, {"b": tensors["b"]}, {INPUT: range_of(-9, 9)})
    actual = run(tmp_path, skeleton, model, inputs, optimised=False)
    taken = (codes_of(inputs, range_of(-9, 9)) - range_of(-9, 9).zero_point) * range_of(-9, 9).step
    best = (taken @ weight.values().T + tensors["b"]).argmax(1)
    assert np.array_equal(actual, weight.values()[best])


def addition(folder):
    """Two layers that take the input, and their sum; (skeleton, quantized weights)."""
    tensors = {"w": random(16, 16), "v": random(16, 16, seed=1)}
    nodes = [
        ("Gemm", ["input", "w"], "left", {"transB": 1}),
        ("Gemm", ["input", "v"], "right", {"transB": 1}),
        ("Add", ["left", "right"], "features", {}),
    ]
    skeleton = write_skeleton(folder / "s.onnx", nodes, tensors, (16,), (16,))
    return skeleton, {name: symmetric(array, 8) for name, array in tensors.items()}


SHARED = {INPUT: range_of(-3, 3), "v:input": range_of(-3, 3)}


@pytest.mark.parametrize(
    ("more", "pairs"),
    [({}, 1), ({"v:input": range_of(-2, 2)}, 2), ({"w:sum": range_of(-9, 9), "v:sum": range_of(-9, 9)}, 2)],
)
def test_places_that_are_one_tensor_get_one_pair(tmp_path, more, pairs):
    skeleton, weights = addition(tmp_path)
    run(tmp_path, skeleton, QuantizedModel(weights, {}, SHARED | more), random(3, 16))
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == pairs


def test_a_layer_behind_a_place_can_have_a_range_of_its_own(tmp_path):
    """The tensor is rounded as the place says, and on the way into the layer once more.

    So says the file; onnxruntime makes one rounding of the two where it can, in steps of its own.
    """
    tensors = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    nodes = [("Gemm", ["input", "w"], "middle", {"transB": 1}), ("Gemm", ["middle", "v"], "features", {"transB": 1})]
    skeleton = write_skeleton(tmp_path / "s.onnx", nodes, tensors, (8,), (8,))
    weights = {name: symmetric(array, 8) for name, array in tensors.items()}
    ranges = {INPUT: range_of(-3, 3), OUTPUT: range_of(-4, 4), "v:input": range_of(-1, 2)}
    x = inputs = random(9, 8, seed=2)
    for place, name in ((INPUT, "w"), (OUTPUT, ""), ("v:input", "v")):
        x = (codes_of(x, ranges[place]) - ranges[place].zero_point) * np.float32(ranges[place].step)
        x = (x @ weights[name].values().T if name else x).astype(np.float32)
    actual = run(tmp_path, skeleton, QuantizedModel(weights, {}, ranges), inputs, optimised=False)
    assert relative_difference(actual, x) < 1e-6


def test_an_output_of_the_graph_can_be_a_place(tmp_path):
    skeleton, weights = addition(tmp_path)
    given = range_of(-9, 9)
    values = run(tmp_path, skeleton, QuantizedModel(weights, {}, SHARED | {"w:sum": given}), random(3, 16))
    assert np.array_equal(values, np.float32(given.step) * np.rint(values / np.float32(given.step)))
    assert len(np.unique(values)) > 20


def test_one_tensor_cannot_have_two_ranges(tmp_path):
    skeleton, weights = addition(tmp_path)
    model = QuantizedModel(weights, {}, {"w:sum": range_of(0, 1), "v:sum": range_of(0, 2)})
    with pytest.raises(BadSetup, match="v:sum and w:sum") as caught:
        build_quantized_artifact(skeleton, model, {}, tmp_path / "model.onnx", metadata={})
    assert caught.value.code == "two-ranges"


@pytest.mark.parametrize(
    ("activations", "code", "word"),
    [
        ({INPUT: ActivationRange(0.1, 8, 4)}, "simulated-only", "4 bits"),
        ({"other:input": range_of(0, 1)}, "unknown-place", "other"),
        ({"b:input": range_of(0, 1)}, "unknown-place", "b:input"),
        ({"w:middle": range_of(0, 1)}, "unknown-place", "w:middle"),
        ({"w": range_of(0, 1)}, "unknown-place", "'w'"),
        ({"w:sum": range_of(0, 1)}, "unknown-place", "w:sum"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, activations, code, word):
    tensors = {"w": random(10, 16), "b": random(10)}
    skeleton = linear(tmp_path, "Gemm", tensors)
    model = QuantizedModel({"w": symmetric(tensors["w"], 8)}, {"b": tensors["b"]}, activations)
    with pytest.raises(BadSetup, match=word) as caught:
        build_quantized_artifact(skeleton, model, {}, tmp_path / "model.onnx", metadata={})
    assert caught.value.code == code
    assert caught.value.remedy
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.26), (4, 0.14)])
def test_the_file_is_small(tmp_path, bits, limit):
    tensors = {"w": random(256, 64, 3, 3), "b": random(256)}
    skeleton = write_skeleton(
        tmp_path / "s.onnx", [("Conv", ["input", "w", "b"], "features", {})], tensors, (64, 8, 8), (256, 6, 6)
    )
    activations = {INPUT: range_of(-3, 3), OUTPUT: range_of(-9, 9)}
    for given in (activations, {}):
        model = QuantizedModel({"w": symmetric(tensors["w"], bits)}, {"b": tensors["b"]}, given)
        build_quantized_artifact(skeleton, model, {}, tmp_path / "model.onnx", metadata={})
        assert (tmp_path / "model.onnx").stat().st_size < limit * skeleton.stat().st_size
