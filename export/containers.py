"""Integer weights as ONNX initializers, and the nodes that bring them to where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from foldd.core.quantized import QuantizedTensor

_INT4_BITS = 4


class Store:
    """Initializers and the nodes on them; equal names are made once.

    Attributes:
        initializers: what was added.
        nodes: what was added; they take nothing but initializers, so they may stand before all others.
    """

    def __init__(self) -> None:
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.nodes: dict[str, NodeProto] = {}

    def add(self, name: str, array: np.ndarray, kind: int) -> str:
        """An initializer; `kind` is a `TensorProto` data type. INT4 arrays come as int8."""
        if name not in self.initializers:
            data = _nibbles(array) if kind == TensorProto.INT4 else np.ascontiguousarray(array).tobytes()
            # raw, because the text form of INT4 spends more bytes than INT8 would.
            self.initializers[name] = helper.make_tensor(name, kind, array.shape, data, raw=True)
        return name

    def make(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node with one output, which it gives back."""
        if output not in self.nodes:
            self.nodes[output] = helper.make_node(kind, inputs, [output], **attributes)
        return output

    def dequantized(self, name: str, weight: QuantizedTensor, *, transposed: bool) -> str:
        """A weight behind DequantizeLinear, as integer kernels want it; [out, in] becomes [in, out] if `transposed`."""
        name = f"{name}/transposed" if transposed else name
        codes = self._codes(name, weight.codes.T if transposed else weight.codes, weight.bits)
        if weight.bits <= _INT4_BITS:
            # A DequantizeLinear that takes INT4 never fuses; this cast is folded when the file is loaded.
            codes = self.make("Cast", [codes], f"{name}/int8", to=TensorProto.INT8)
        return self.dequantize(name, codes, weight.step, TensorProto.INT8, axis=1 if transposed else 0)

    def dequantize(self, name: str, codes: str, step: np.ndarray, kind: int, *, axis: int = 0) -> str:
        """DequantizeLinear(codes) with zero points of 0, which some kernels insist on."""
        scale = self.add(f"{name}/step", step.astype("<f4"), TensorProto.FLOAT)
        attributes = {"axis": axis} if step.ndim else {}
        inputs = [codes, scale, self.zero_point(np.zeros(step.shape), kind)]
        return self.make("DequantizeLinear", inputs, f"{name}/real", **attributes)

    def zero_point(self, value: np.ndarray, kind: int) -> str:
        """Zero points, one initializer for all that are alike: for weights they are as many as the steps."""
        shape = "x".join(map(str, value.shape)) or "scalar"
        name = f"zero/{TensorProto.DataType.Name(kind)}/{shape}/{int(value.max(initial=0))}"
        return self.add(name, value.astype(helper.tensor_dtype_to_np_dtype(kind)), kind)

    def folded(self, name: str, weight: QuantizedTensor) -> str:
        """A weight that becomes float32 when the file is loaded, under its own name: Cast, Mul.

        DequantizeLinear would run at every inference before a convolution, and before a matrix product be fused into
        a kernel that quantizes activations behind one's back.
        """
        step = weight.step.reshape(-1, *[1] * (weight.codes.ndim - 1)) if weight.step.ndim else weight.step
        scale = self.add(f"{name}/step", step.astype("<f4"), TensorProto.FLOAT)
        codes = self._codes(name, weight.codes, weight.bits)
        return self.make("Mul", [self.make("Cast", [codes], f"{name}/float", to=TensorProto.FLOAT), scale], name)

    def _codes(self, name: str, codes: np.ndarray, bits: int) -> str:
        return self.add(f"{name}/codes", codes, TensorProto.INT4 if bits <= _INT4_BITS else TensorProto.INT8)


def weight_of(codes: str) -> str:
    """The weight whose codes an initializer holds."""
    return codes.removesuffix("/codes").removesuffix("/transposed")


def _nibbles(codes: np.ndarray) -> bytes:
    """Two codes a byte, the first in the low half; a last odd one alone (onnx.proto, `raw_data` of INT4)."""
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8) & 0x0F
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return bytes((flat[0::2] | flat[1::2] << 4).tobytes())
