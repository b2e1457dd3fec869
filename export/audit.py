"""The fusion audit: does a quantized artifact really run in integers?

onnxruntime fuses Q/DQ pairs and layers into integer kernels when it loads a file. Where a pattern misses by one node
the layer runs in float, with conversions around it: the answers are right, and it is slower than before quantizing.
Nothing says so but the graph that onnxruntime made of the file, so that is what is looked at here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, numpy_helper

from foldd.export.containers import weight_of
from foldd.export.graph import Graph

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearMatMul",
    }
)

_KINDS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Audit:
    """What onnxruntime made of an artifact.

    Attributes:
        kernels: integer kernel → how many.
        fused: weights whose layers run in integers.
        left_float: weight of a layer that was meant to, but does not → the likely reason.
        folded: weights that become float32 when the file is loaded, as all do where only weights are quantized: the
            file is small, speed and memory are those of float32.
    """

    kernels: Mapping[str, int]
    fused: tuple[str, ...]
    left_float: Mapping[str, str]
    folded: tuple[str, ...]


def audit_artifact(model: Path) -> Audit:
    """Loads an artifact as a device does and looks for its quantized layers in the optimised graph.

    Args:
        model: as `build_quantized_artifact` wrote it.
    """
    written, made = onnx.load(model).graph, _optimised(model).graph
    graph = Graph(written)
    kernels = [node for node in made.node if node.op_type in INTEGER_KERNELS]
    fused, left, folded = [], {}, []
    for weight, nodes in _layers(graph).items():
        if len(_kernels_of(graph, nodes, kernels)) >= len(nodes):
            fused.append(weight)
        else:
            left[weight] = _reason(graph, nodes, {str(t.name): t for t in written.initializer})
    activations = any(node.op_type == "QuantizeLinear" for node in graph.nodes)
    kept = {str(tensor.name) for tensor in made.initializer}
    for weight in _folded(graph):
        if f"{weight}/codes" in kept:
            left[weight] = "its weights are expanded to float at every inference"
        elif activations and any(node.op_type in _KINDS for node in graph.users(weight)):
            left[weight] = "its input is not quantized, only its weights are"
        else:
            folded.append(weight)
    counts = Counter(str(kernel.op_type) for kernel in kernels)
    return Audit(dict(sorted(counts.items())), tuple(fused), left, tuple(folded))


def _optimised(model: Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3  # it warns that such a file fits this machine only
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _layers(graph: Graph) -> dict[str, list[NodeProto]]:
    """Weight → the layers that take it as integers."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type in _KINDS and (tensors := _integers(graph, node)):
            found.setdefault(weight_of(tensors[-1]), []).append(node)
    return found


def _integers(graph: Graph, node: NodeProto) -> list[str]:
    """The tensors, from DequantizeLinear back to the initializer, that hold a layer's weight in integers."""
    maker = graph.maker.get(str(node.input[1]))
    if maker is None or maker.op_type != "DequantizeLinear":
        return []
    tensors = [str(maker.input[0])]
    while (maker := graph.maker.get(tensors[-1])) is not None:
        tensors.append(str(maker.input[0]))
    return tensors if tensors[-1] in graph.shapes else []


def _folded(graph: Graph) -> list[str]:
    """Weights that Cast and Mul make, under their own names."""
    return [str(n.output[0]) for n in graph.nodes if n.op_type == "Mul" and n.input[0] == f"{n.output[0]}/float"]


def _kernels_of(graph: Graph, nodes: list[NodeProto], kernels: list[NodeProto]) -> list[NodeProto]:
    """The integer kernels that layers became: they take the same initializer, or have the layer's name.

    onnxruntime 1.32 keeps both, with `_token_<n>` behind the name of a node that it replaced.
    """
    names = {str(node.name) for node in nodes} - {""}
    tensors = {tensor for node in nodes for tensor in _integers(graph, node)}
    return [k for k in kernels if tensors.intersection(k.input) or str(k.name).split("_token_")[0] in names]


def _reason(graph: Graph, nodes: list[NodeProto], tensors: Mapping[str, TensorProto]) -> str:
    reasons = dict.fromkeys(reason for node in nodes for reason in _misfits(graph, node, tensors))
    return "; ".join(reasons) or "the pattern is complete, but this onnxruntime has no kernel for it"


def _misfits(graph: Graph, node: NodeProto, tensors: Mapping[str, TensorProto]) -> Iterator[str]:
    """What is missing of the patterns that fuse."""
    relu = graph.only_taker(str(node.output[0]), "Relu")
    quantize = graph.only_taker(graph.behind_relu(str(node.output[0])), "QuantizeLinear")
    bias = graph.maker.get(str(node.input[2])) if len(node.input) > 2 else None
    float_bias = len(node.input) > 2 and (bias is None or bias.op_type != "DequantizeLinear")
    if float_bias and (node.op_type == "Gemm" or quantize is not None):
        yield "its bias is float"
    if node.op_type == "Conv" and quantize is None:
        yield "its output is not quantized"
    if relu is not None and quantize is not None and numpy_helper.to_array(tensors[str(quantize.input[2])]).any():
        yield "its output's range starts below 0, so that the ReLU before it is not absorbed"
