"""Simplified graphs compute the same, and what depends on the batch stays computed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from foldd.base.simplify import simplify
from foldd.base.store import open_skeleton


def graph(*nodes, height=4, **constants):
    """`input` [batch, 3, 4, 5] → `features` of any shape."""
    made = [helper.make_node("Constant", [], [name], value_ints=value) for name, value in constants.items()]
    made += [helper.make_node(kind, inputs, [output], name=output, **more) for kind, inputs, output, more in nodes]
    ends = (
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, height, 5])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
    )
    return helper.make_model(
        helper.make_graph(made, "g", *ends), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"input": inputs})[0]


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def turned(last):
    """Keys turned by way of three axes, into [batch, *last]."""
    return graph(
        ("Reshape", ["input", "flat"], "middle", {}),
        ("Transpose", ["middle"], "over", {"perm": [0, 2, 1]}),
        ("Reshape", ["over", "whole"], "features", {}),
        flat=[-1, 4, 5],
        whole=[-1, *last],
    )


DIMENSIONS = graph(
    ("Shape", ["input"], "all", {}),
    ("Shape", ["input"], "some", {"start": 2, "end": -1}),
    ("Gather", ["all", "first"], "batch", {}),
    ("Gather", ["all", "fourth"], "width", {}),
    ("Slice", ["all", "one", "three"], "between", {}),
    ("Slice", ["all", "one", "four", "zero", "two"], "every_other", {}),
    ("Slice", ["every_other", "one", "two"], "one_of_them", {}),
    ("Concat", ["batch", "width", "between", "some", "one_of_them"], "together", {"axis": 0}),
    ("Cast", ["together"], "features", {"to": TensorProto.FLOAT}),
    first=[0], fourth=[3], zero=[0], one=[1], two=[2], three=[3], four=[4],
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "removed"),
    [
        (DIMENSIONS, {"Shape": 1, "Gather": 1, "Slice": 1}),
        (turned((3, 5, 4)), {"Reshape": 2}),
        (turned((5, 3, 4)), {}),
        (turned((15, 4)), {}),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_is_computed_with_less(model, removed, batch):
    simple = onnx.ModelProto()
    simple.CopyFrom(model)
    simplify(simple)
    inputs = np.random.default_rng(batch).standard_normal((batch, 3, 4, 5)).astype(np.float32)
    assert np.array_equal(run(simple, inputs), run(model, inputs))
    fewer = kinds(model) - kinds(simple)
    del fewer["Constant"]
    assert fewer == removed


def test_axes_of_free_size_are_not_taken_for_equal():
    """Both have no number, but one is twice the other."""
    model = graph(
        ("Shape", ["input"], "n", {"start": 2, "end": 3}),
        ("Mul", ["n", "two"], "twice", {}),
        ("Concat", ["any", "twice", "five"], "flat", {"axis": 0}),
        ("Concat", ["any", "three", "five", "n"], "whole", {"axis": 0}),
        ("Reshape", ["input", "flat"], "middle", {}),
        ("Transpose", ["middle"], "over", {"perm": [0, 2, 1]}),
        ("Reshape", ["over", "whole"], "features", {}),
        height="n", any=[-1], two=[2], three=[3], five=[5],
    )  # fmt: skip
    simple = onnx.ModelProto()
    simple.CopyFrom(model)
    simplify(simple)
    inputs = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    assert np.array_equal(run(simple, inputs), run(model, inputs))


def test_what_the_exporter_writes_for_attention_and_for_a_missing_bias(base_folder):
    attention = onnx.load(open_skeleton(base_folder("attention"))[0])
    left = kinds(attention)
    assert left["CastLike"] == 0
    assert left["Shape"] == 1, "the batch"
    turns = [n for n in attention.graph.node if n.op_type == "Transpose" and list(n.attribute[0].ints) == [0, 1, 3, 2]]
    assert len(turns) == 1
    residual = onnx.load(open_skeleton(base_folder("residual"))[0])
    assert sorted(len(node.input) for node in residual.graph.node if node.op_type == "Conv") == [2, 3, 3]
    assert "Expand" not in kinds(residual)
