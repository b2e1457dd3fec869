"""The simulation of a quantized network: against the float one, a second simulation by hand, and onnxruntime."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from captured import IMAGE, Dense, SequenceFirst, Split, inputs, seeded
from quantized_kit import simulate

from foldd.base.batch_norm import fold_norms
from foldd.base.load import capture
from foldd.base.store import open_base, open_skeleton, store_base
from foldd.export.audit import audit_artifact
from foldd.export.parity import run_artifact, signal_to_noise
from foldd.export.quantized import build_quantized_artifact
from foldd.quantize.calibrate import choose_ranges, observe_network
from foldd.quantize.hdrq import as_shipped
from foldd.quantize.simulate import simulated_features

NETWORKS = ["residual", "attention", "with_head"]
FORMATS = {"w8a8": (8, 8), "w4a8": (4, 8), "w8": (8, None), "w4": (4, None)}


@pytest.fixture(scope="module")
def quantized(base_folder):
    """(name, format) → the base's folded network, its weights, and the two quantized."""

    @cache
    def make(name, kind):
        base = open_base(base_folder(name))
        arrays = fold_norms({n: t.numpy() for n, t in base.weights.items()}, base.folded.rules)
        weights = {n: torch.from_numpy(a) for n, a in arrays.items()}
        bits, activations = FORMATS[kind]
        ranges = {}
        if activations:
            ranges = choose_ranges(base.folded, observe_network(base.folded, weights, inputs(64)), activations)
        how = as_shipped(bits, activations, 10)
        return base.folded, weights, how.quantize(base.folded, weights, None, ranges, inputs(64), seed=0)

    return make


@pytest.mark.parametrize(("kind", "least"), [("w8a8", 33), ("w8", 40), ("w4a8", 15), ("w4", 15)])
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_nearly_the_float_network(quantized, name, kind, least):
    network, weights, model = quantized(name, kind)
    x = inputs(64, seed=3)
    with torch.no_grad():
        expected = network.features(weights, x)
    noise = signal_to_noise(simulated_features(network, model, x).numpy(), expected.numpy())
    assert least < noise < 70, "and something was rounded"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_a_second_simulation_says(quantized, name, kind):
    """One written for the tests, network by network, with torch's own fake quantization."""
    network, _, model = quantized(name, kind)
    x = inputs(64, seed=3)
    actual = simulated_features(network, model, x).numpy()
    weights = {**model.floats, **{n: w.values() for n, w in model.weights.items()}}
    expected = simulate(name, weights, model.activations, x.numpy())
    assert signal_to_noise(actual, expected) > 45
    # What may be left is a code that rounds to the other side, here and there.
    assert (np.abs(actual - expected).max(1) < 1e-5 * np.abs(expected).max()).mean() > 0.85


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_onnxruntime_makes_of_the_artifact(base_folder, tmp_path, quantized, name, kind):
    """As the file says, node by node; biases are rounded there, which is all that should differ. And as devices run it,
    in integer kernels throughout where activations are quantized: every layer that has a place."""
    network, _, model = quantized(name, kind)
    target, x = tmp_path / "model.onnx", inputs(64, seed=3)
    build_quantized_artifact(open_skeleton(base_folder(name))[0], model, {}, target, metadata={})
    expected = simulated_features(network, model, x).numpy()
    for optimised, least in ((False, 40), (True, 33)):
        actual = run_artifact(target, x.numpy(), ["features"], optimised=optimised)["features"]
        assert signal_to_noise(actual, expected) > least
    audit = audit_artifact(target)
    assert set(audit.left_float) == (set(model.weights) - placed(model) if FORMATS[kind][1] else set())
    assert set(audit.fused) == placed(model)
    assert set(audit.folded) == (set() if FORMATS[kind][1] else set(model.weights))
    assert len(placed(model)) >= (len(model.weights) - 1 if FORMATS[kind][1] else 0), "a transformer's patches at most"


def placed(model):
    """Weights of the layers whose input is quantized."""
    return {key.removesuffix(":input") for key in model.activations if key.endswith(":input")}


def test_the_number_of_inputs_does_not_matter(quantized):
    network, _, model = quantized("attention", "w8a8")
    x = inputs(70, seed=3)
    whole = simulated_features(network, model, x)
    parts = torch.cat([simulated_features(network, model, piece) for piece in torch.split(x, 33)])
    assert whole.shape == (70, 16)
    assert signal_to_noise(parts.numpy(), whole.numpy()) > 45
    assert not whole.requires_grad


@pytest.mark.parametrize("kind", [Split, SequenceFirst, Dense])
def test_odd_networks_become_artifacts_too(tmp_path, kind):
    """Split values, tokens before the batch, long skips: from the captured program to integer kernels."""
    store_base(tmp_path / "base", capture(seeded(kind), IMAGE))
    base, x = open_base(tmp_path / "base"), inputs(70)
    arrays = fold_norms({n: t.numpy() for n, t in base.weights.items()}, base.folded.rules)
    weights = {n: torch.from_numpy(a) for n, a in arrays.items()}
    ranges = choose_ranges(base.folded, observe_network(base.folded, weights, x), 8)
    model = as_shipped(8, 8, 3).quantize(base.folded, weights, None, ranges, x, seed=0)
    target = tmp_path / "model.onnx"
    build_quantized_artifact(open_skeleton(tmp_path / "base")[0], model, {}, target, metadata={})
    expected = simulated_features(base.folded, model, x).numpy()
    for optimised, least in ((False, 40), (True, 33)):
        actual = run_artifact(target, x.numpy(), ["features"], optimised=optimised)["features"]
        assert signal_to_noise(actual, expected) > least
    # Of a linear layer behind one concatenation and before another, onnxruntime 1.31 makes no integer kernel.
    left = set(audit_artifact(target).left_float) & placed(model)
    assert left <= ({"layers.8.weight"} if kind is Dense else set())
    assert set(model.weights) - placed(model) <= {"patch.weight"}
