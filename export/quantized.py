"""A quantized artifact: the skeleton with integer weights, and Q/DQ pairs where activations are quantized.

The file says what is computed in quantized real numbers; onnxruntime fuses that into integer kernels when it loads
it (`audit.py` tells whether it did). What fuses was found by measurement: unsigned 8-bit activations, signed weights,
explicit zero points throughout, biases as int32 with the step of the products.

| weights | activations | written as |
|---|---|---|
| 5 … 8 bits | 8 bits | INT8 → DequantizeLinear |
| 2 … 4 bits | 8 bits | INT4 → Cast INT8 → DequantizeLinear |
| any | none | INT4 or INT8 → Cast FLOAT → Mul, folded at load |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from foldd.core.bundle import Head
from foldd.core.errors import BadSetup
from foldd.core.quantized import ActivationRange, QuantizedModel
from foldd.export.artifact import find_tensors, finish, patch
from foldd.export.biases import bias_codes, product_step, with_room
from foldd.export.containers import Store
from foldd.export.graph import Graph, Layer, Places, replace_content, resolve

_ACTIVATION_BITS = 8


def build_quantized_artifact(
    skeleton: Path,
    quantized: QuantizedModel,
    heads: Mapping[str, Head],
    target: Path,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Writes `model.onnx`, durably; outputs and heads are those of `build_artifact`, in float32.

    Args:
        quantized: every tensor of the skeleton, either in `weights` or in `floats`.
        heads: task → weight [classes, features], bias [classes].
        metadata: provenance that the model carries in its `metadata_props`.

    Raises:
        BadSetup: `wrong-skeleton`, `simulated-only` for activations of other than 8 bits, `unknown-place`,
            `two-ranges`.
        Refused: `artifact-too-large`.
    """
    _check_bits(quantized.activations)
    model = onnx.load(skeleton)
    find_tensors(model.graph, {name: weight.codes.shape for name, weight in quantized.weights.items()})
    patch(model.graph, quantized.floats)
    _Rewriter(model.graph, quantized).rewrite()
    finish(model, heads, target, metadata=metadata)


def _check_bits(activations: Mapping[str, ActivationRange]) -> None:
    for place, given in activations.items():
        if given.bits != _ACTIVATION_BITS:
            raise BadSetup(
                "simulated-only",
                f"{place} has {given.bits} bits; an artifact can only have activations of {_ACTIVATION_BITS}.",
                why="onnxruntime has no kernels for others: such a network can be simulated, not run.",
                remedy=f"Quantize activations to {_ACTIVATION_BITS} bits, or only weights.",
            )


class _Rewriter:
    """One graph on its way from float to quantized."""

    def __init__(self, graph: onnx.GraphProto, quantized: QuantizedModel) -> None:
        self.target, self.quantized = graph, quantized
        self.graph = Graph(graph)
        self.places: Places = resolve(self.graph, quantized.activations)
        self.store = Store()
        self.after: dict[str, list[NodeProto]] = defaultdict(list)  # tensor → what follows whoever makes it
        self.pairs: dict[tuple[str, ActivationRange], str] = {}  # what a pair on a tensor gives
        self.named: set[str] = set()

    def rewrite(self) -> None:
        for tensor, (place, given) in self.places.everywhere.items():
            self._quantize_everywhere(tensor, place, given)
        for initializer in self.target.initializer:
            self._replace(str(initializer.name))
        self._assemble()

    def _quantize_everywhere(self, tensor: str, place: str, given: ActivationRange) -> None:
        # The maker's output takes another name: then whoever takes the tensor, graph outputs too, needs no change.
        maker, before = self.graph.maker[tensor], f"{tensor}/float"
        maker.output[list(maker.output).index(tensor)] = before
        self._pair(before, place, given, tensor)

    def _quantize_input(self, layer: Layer) -> ActivationRange | None:
        """The range of a layer's input, after which the layer takes the quantized values."""
        tensor = layer.input
        _, everywhere = self.places.everywhere.get(tensor, ("", None))
        place, given = self.places.at_layers.get(layer.weight, ("", everywhere))
        if given is not None and given != everywhere:
            if (tensor, given) not in self.pairs:
                self.pairs[tensor, given] = self._pair(tensor, place, given)
            layer.node.input[0] = self.pairs[tensor, given]
        return given

    def _pair(self, tensor: str, place: str, given: ActivationRange, output: str | None = None) -> str:
        """QuantizeLinear and DequantizeLinear behind a tensor."""
        step = self.store.add(f"{place}/step", np.asarray(given.step, "<f4"), TensorProto.FLOAT)
        zero = self.store.zero_point(np.asarray(given.zero_point), TensorProto.UINT8)
        # Of a weight that layers share, one place is several tensors.
        name = place if place not in self.named else f"{place}/{tensor}"
        self.named.add(name)
        codes, output = f"{name}/codes", output or f"{name}/real"
        self.after[tensor] += [
            helper.make_node("QuantizeLinear", [tensor, step, zero], [codes]),
            helper.make_node("DequantizeLinear", [codes, step, zero], [output]),
        ]
        return output

    def _replace(self, name: str) -> None:
        """Does to one initializer, and the layers that it is a weight of, what was asked for."""
        layers = self.graph.layers.get(name, [])
        ranges = [self._quantize_input(layer) for layer in layers]
        weight = self.quantized.weights.get(name)
        if weight is None:
            return
        given = [r for r in ranges if r is not None]
        if not layers or len(given) < len(layers) or len(self.graph.users(name)) > len(layers):
            self.store.folded(name, weight)  # every reader gets floats
            return
        steps = [r.step for r in given]
        biases = [self._integer_bias(layer) for layer in layers]
        weight = with_room(weight, [(s, b) for s, b in zip(steps, biases, strict=True) if b is not None])
        for layer, step, bias in zip(layers, steps, biases, strict=True):
            layer.node.input[1] = self.store.dequantized(name, weight, transposed=layer.transposed)
            if bias is not None:
                self._quantize_bias(layer, bias, product_step(step, weight))

    def _integer_bias(self, layer: Layer) -> np.ndarray | None:
        """A layer's bias, if it takes one that is to become integers.

        Behind a MatMul it stays float: the addition is a node of its own, its integers would be dequantized at every
        inference (a tenth of a small transformer's time). With every axis but the last fixed onnxruntime would make a
        float Gemm of the two, but the batch is free in a skeleton.
        """
        return None if layer.transposed or layer.bias is None else self.quantized.floats.get(layer.bias)

    def _quantize_bias(self, layer: Layer, bias: np.ndarray, step: np.ndarray) -> None:
        codes = bias_codes(bias, step)
        if codes is None:
            return  # stays float, which may cost the layer its integer kernel; the audit says so
        assert layer.adder is not None
        name = f"{layer.bias}/{layer.node.name}"  # layers that share a bias need not share its step
        stored = self.store.add(f"{name}/codes", codes.astype("<i4"), TensorProto.INT32)
        layer.adder.input[layer.slot] = self.store.dequantize(name, stored, step, TensorProto.INT32)

    def _assemble(self) -> None:
        """Puts everything back into the graph, less what nothing reads any more."""
        nodes = list(self.store.nodes.values())
        nodes += self.after[str(self.target.input[0].name)]
        for node in self.graph.nodes:
            nodes += self._followed(node)
        replace_content(self.target, nodes, [*self.target.initializer, *self.store.initializers.values()])

    def _followed(self, node: NodeProto) -> Iterator[NodeProto]:
        """A node and all that was put behind it; behind a place, a layer may have a range of its own."""
        yield node
        for output in node.output:
            for new in self.after[str(output)]:
                yield from self._followed(new)
