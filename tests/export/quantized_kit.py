"""Quantized models for tests, hand-made skeletons, and the small networks simulated in torch."""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from foldd.base.batch_norm import fold_norms
from foldd.base.store import open_base, open_skeleton
from foldd.core.quantized import ActivationRange, QuantizedModel, QuantizedTensor


def symmetric(weight, bits, *, per_channel=True):
    """Rounded to nearest, the largest value is the largest code."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(1) if per_channel else np.abs(weight).max()
    step = np.asarray(largest / (2 ** (bits - 1) - 1), np.float32)
    shaped = step.reshape(-1, *[1] * (weight.ndim - 1)) if per_channel else step
    return QuantizedTensor(np.rint(weight / shaped).astype(np.int8), step, bits)


def range_of(low, high):
    low, high = min(low, 0.0), max(high, 0.0)
    step = float(np.float32((high - low) / 255))
    return ActivationRange(step, round(-low / step), 8)


def codes_of(x, given):
    return np.clip(np.rint(x / np.float32(given.step)) + given.zero_point, 0, 255).astype(np.int64)


GEMM_BIASES = {"again.bias": "again.weight", "mix.bias": "again.weight"}  # of `with_head`, the others have none


def write_skeleton(path, nodes, tensors, input_shape, features):
    """A graph `input` [batch, …] → `features` [batch, …] with float initializers that an artifact overwrites."""
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, [output], name=f"node_{output}", **more)
            for kind, inputs, output, more in nodes
        ],
        "foldd",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *input_shape])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", *features])],
        [helper.make_tensor(name, TensorProto.FLOAT, a.shape, a.tobytes(), raw=True) for name, a in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class Simulation:
    """A small network of networks.py computed in torch, with fake quantization at the places of a `QuantizedModel`.

    Args:
        activations: none at all: the places are recorded, with their ranges, in `seen`.
    """

    def __init__(self, weights, activations=None):
        self.weights = {name: torch.from_numpy(np.asarray(array)) for name, array in weights.items()}
        self.activations, self.seen = activations, {}

    def place(self, name, x):
        if self.activations is None:
            low, high = self.seen.get(name, (0.0, 0.0))
            self.seen[name] = min(low, x.min().item()), max(high, x.max().item())
            return x
        if (given := self.activations.get(name)) is None:
            return x
        return torch.fake_quantize_per_tensor_affine(x, given.step, given.zero_point, 0, 255)

    def conv(self, name, x, stride=1, padding=0):
        x = self.place(f"{name}.weight:input", x)
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), stride, padding)

    def linear(self, name, x, weight=""):
        weight = f"{weight or name}.weight"
        return F.linear(self.place(f"{weight}:input", x), self.weights[weight], self.weights[f"{name}.bias"])

    def residual(self, x, prefix=""):
        stem, conv, shortcut = f"{prefix}stem", f"{prefix}conv", f"{prefix}shortcut"
        x = self.place(f"{stem}.weight:output", F.relu(self.conv(stem, x, 2, 1)))
        left = self.place(f"{conv}.weight:output", self.conv(conv, x, 1, 1))
        right = self.place(f"{shortcut}.weight:output", self.conv(shortcut, x))
        return self.place(f"{conv}.weight:sum", F.relu(left + right)).mean((2, 3))

    def with_head(self, x):
        x = self.residual(x, "body.")
        return x + torch.tanh(self.linear("again", F.relu(self.linear("mix", x, "again"))))

    def attention(self, x):
        x = self.place("patch.weight:output", self.conv("patch", x, 4)).flatten(2).transpose(1, 2)
        x = torch.cat([self.weights["cls"].expand(len(x), -1, -1), x], 1) + self.weights["pos"]
        b, n, d = x.shape
        q, k, v = self.linear("qkv", self.norm("n1", x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.linear("proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        x = x + self.linear("fc2", F.gelu(self.linear("fc1", self.norm("n2", x))))
        return self.norm("norm", x)[:, 0]

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def images(n=64, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 1, 8, 8)).astype(np.float32)


def simulate(name, weights, activations, inputs):
    """Features of a network with these weights; records nothing."""
    with torch.no_grad():
        return getattr(Simulation(weights, activations), name)(torch.from_numpy(inputs)).numpy()


def quantize(folder, name, bits=8):
    """(skeleton, a network of networks.py with its own weights rounded, half the ranges that `images()` take).

    Half, because what is clamped shows in the answers much more than what is rounded.
    """
    skeleton, rules = open_skeleton(folder)
    folded = fold_norms({n: t.numpy() for n, t in open_base(folder).weights.items()}, rules)
    recording = Simulation(folded)
    with torch.no_grad():
        getattr(recording, name)(torch.from_numpy(images()))
    activations = {place: range_of(low / 2, high / 2) for place, (low, high) in recording.seen.items()}
    names = [place.rpartition(":")[0] for place in activations]
    weights = {name: symmetric(folded[name], bits) for name in names}
    floats = {name: array for name, array in folded.items() if name not in weights}
    return skeleton, QuantizedModel(weights, floats, activations)


def dequantized(quantized):
    """Every tensor in float32; biases of convolutions and Gemms rounded as integer kernels take them."""
    tensors = {**quantized.floats, **{name: weight.values() for name, weight in quantized.weights.items()}}
    owners = {f"{n.removesuffix('.weight')}.bias": n for n, w in quantized.weights.items() if w.codes.ndim == 4}
    for bias, weight in (owners | GEMM_BIASES).items():
        if bias in tensors and (given := quantized.activations.get(f"{weight}:input")):
            step = np.float32(given.step) * quantized.weights[weight].step
            tensors[bias] = np.asarray(np.rint(tensors[bias] / step) * step, np.float32)
    return tensors
