"""What torch's exporter writes in a roundabout way, said plainly; initializers are never touched.

Exported with `optimize=False` a network computes at every inference what does not change from one to the next: the
width of a head from its shape, zeros where a convolution has no bias. onnxruntime folds none of it, because the shapes
it is computed from have a free batch in them. In a small transformer that is a fifth of the time of an integer model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper, shape_inference

_Shape = list[int | None]  # None: free


def simplify(model: onnx.ModelProto) -> None:
    """Makes constants of fixed dimensions, casts of known types, and one node of a transposition in three, in place."""
    graph = model.graph
    shapes, types = _infer(model)
    for node in graph.node:
        if node.op_type == "CastLike" and node.input[1] in types:
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", types[node.input[1]]))
            del node.input[1:]
    _fix_dimensions(graph, shapes)
    shapes, _ = _infer(model)
    nodes = _without_detours(graph, shapes)
    _drop_zero_biases(nodes)
    kept = needed(nodes, (output.name for output in graph.output))
    graph.ClearField("node")
    graph.node.extend(kept)


def needed(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Of nodes in an order that computes, those that the outputs need."""
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _infer(model: onnx.ModelProto) -> tuple[dict[str, _Shape], dict[str, int]]:
    """Shape and element type by tensor, as far as they are known."""
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {str(value.name): value.type.tensor_type for value in values}
    shapes: dict[str, _Shape] = {
        name: [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        for name, kind in types.items()
        if kind.HasField("shape")
    }
    shapes |= {str(tensor.name): list(tensor.dims) for tensor in graph.initializer}
    return shapes, {name: kind.elem_type for name, kind in types.items() if kind.elem_type}


def _fix_dimensions(graph: onnx.GraphProto, shapes: Mapping[str, _Shape]) -> None:
    """Shape, and Gather and Slice of a shape, become constants where the dimensions are no free ones."""
    constants = {str(node.output[0]): value for node in graph.node if (value := _constant(node)) is not None}
    dimensions: dict[str, _Shape] = {}
    for node in graph.node:
        given = [constants.get(str(name)) for name in node.input[1:]]
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {a.name: a.i for a in node.attribute}
            found: _Shape = shapes[node.input[0]][ends.get("start", 0) : ends.get("end")]
            dimensions[str(node.output[0])] = found
            form: tuple[int, ...] = (len(found),)
        elif node.input and node.input[0] in dimensions and all(value is not None for value in given):
            known = dimensions[node.input[0]]
            where = [value for value in given if value is not None]
            if node.op_type == "Gather":
                found, form = [known[i] for i in where[0].reshape(-1)], where[0].shape
            elif node.op_type == "Slice" and (len(where) < 4 or int(where[3].item()) == 1):
                found = known[int(where[0].item()) : int(where[1].item())]
                form = (len(found),)
            else:
                continue
        else:
            continue
        if all(dimension is not None for dimension in found):
            value = numpy_helper.from_array(np.array(found, np.int64).reshape(form))
            node.CopyFrom(helper.make_node("Constant", [], [node.output[0]], name=node.name, value=value))


def _constant(node: NodeProto) -> np.ndarray | None:
    if node.op_type != "Constant":
        return None
    value = helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _without_detours(graph: onnx.GraphProto, shapes: Mapping[str, _Shape]) -> list[NodeProto]:
    """[b, h, n, d] → [b·h, n, d] → [b·h, d, n] → [b, h, d, n], as attention turns its keys, becomes one Transpose."""
    maker = {str(name): node for node in graph.node for name in node.output}
    takers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(str(name), []).append(node)
    merged: set[str] = set()
    for node in graph.node:
        before, after = maker.get(node.input[0] if node.input else ""), takers.get(str(node.output[0]), [])
        if node.op_type != "Transpose" or before is None or len(after) != 1:
            continue
        if (before.op_type, after[0].op_type) != ("Reshape", "Reshape"):
            continue
        first, middle, last = (shapes.get(t, []) for t in (before.input[0], before.output[0], after[0].output[0]))
        if len(first) != 4 or None in first[1:] or len(middle) != 3 or middle[1:] != first[2:]:
            continue
        _, h, n, d = first
        if list(helper.get_attribute_value(node.attribute[0])) == [0, 2, 1] and last[1:] == [h, d, n]:
            ends = [before.input[0]], [after[0].output[0]]
            merged.add(ends[1][0])
            node.CopyFrom(helper.make_node("Transpose", *ends, name=node.name, perm=[0, 1, 3, 2]))
    return [node for node in graph.node if node.op_type != "Reshape" or node.output[0] not in merged]


def _drop_zero_biases(nodes: list[NodeProto]) -> None:
    """The zeros of a convolution without bias: computed from its weight's shape, where kernels want a constant."""
    maker = {str(name): node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        made = maker.get(str(node.input[2]))
        while made is not None and made.op_type in ("Expand", "Cast", "CastLike"):
            made = maker.get(str(made.input[0]))
        if made is not None and (value := _constant(made)) is not None and not value.any():
            del node.input[2:]
