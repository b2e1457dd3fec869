"""Artifacts: parity with torch in onnxruntime, one output per head, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from foldd.base.batch_norm import fold_norms
from foldd.base.store import open_base, open_skeleton
from foldd.core.bundle import Head
from foldd.core.errors import BadSetup, Refused
from foldd.export.artifact import build_artifact
from foldd.export.parity import agreement, check_parity, relative_difference, run_artifact, signal_to_noise


def random_weights(base, seed=0):
    """Weights far from the base's, statistics included: what a skeleton must take without a trace of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator) + (0.5 if "running_var" in name else -0.5)
        for name, tensor in base.weights.items()
    }


def heads(base, **classes):
    generator = np.random.default_rng(0)
    return {
        task: Head(
            generator.standard_normal((n, base.spec.features)).astype(np.float32),
            generator.standard_normal(n).astype(np.float32),
        )
        for task, n in classes.items()
    }


def build(folder, base, weights, given, target):
    skeleton, rules = open_skeleton(folder)
    folded = fold_norms({name: tensor.numpy() for name, tensor in weights.items()}, rules)
    build_artifact(skeleton, folded, given, target, metadata={"foldd.generation": "7"})


@pytest.mark.parametrize("name", ["residual", "attention", "with_head"])
@pytest.mark.parametrize("batch", [1, 5])
def test_parity_with_torch(base_folder, tmp_path, name, batch):
    base = open_base(base_folder(name))
    weights, given = random_weights(base), heads(base, cats=3, dogs=4)
    build(base_folder(name), base, weights, given, tmp_path / "model.onnx")
    inputs = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = base.features(weights, inputs).numpy()
    expected = {"features": features} | {
        f"logits/{task}": features @ head.weight.T + head.bias for task, head in given.items()
    }
    actual = run_artifact(tmp_path / "model.onnx", inputs.numpy(), list(expected))
    assert check_parity(actual, expected, 1e-4) < 1e-5
    assert np.abs(features).max() > 0.01, "parity of zeros would say nothing"


def test_every_tensor_reaches_the_artifact(base_folder, tmp_path):
    """Changing any one tensor of the network changes what the artifact answers: none is folded away or shared."""
    base = open_base(base_folder("residual"))
    inputs = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)

    def answer(weights):
        build(base_folder("residual"), base, weights, {}, tmp_path / "model.onnx")
        return run_artifact(tmp_path / "model.onnx", inputs, ["features"])["features"]

    weights = dict(base.weights)
    plain = answer(weights)
    for name in base.weights:
        assert not np.array_equal(answer(weights | {name: weights[name] + 0.05}), plain), name


def test_equal_input_gives_equal_bytes(base_folder, tmp_path):
    base = open_base(base_folder("attention"))
    for name in ("a", "b"):
        build(base_folder("attention"), base, random_weights(base), heads(base, t=3), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_outputs_and_provenance(base_folder, tmp_path):
    base = open_base(base_folder("residual"))
    build(base_folder("residual"), base, base.weights, heads(base, **{"a.b-c_d": 2, "z": 3}), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("features", ["batch", 12]), ("logits/a.b-c_d", ["batch", 2]), ("logits/z", ["batch", 3]),
    ]  # fmt: skip
    assert session.get_modelmeta().custom_metadata_map == {"foldd.generation": "7"}
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


def test_weights_of_another_network_are_refused(base_folder, tmp_path):
    base = open_base(base_folder("residual"))
    skeleton, _ = open_skeleton(base_folder("attention"))
    with pytest.raises(BadSetup) as caught:
        build_artifact(skeleton, {n: t.numpy() for n, t in base.weights.items()}, {}, tmp_path / "m", metadata={})
    assert caught.value.code == "wrong-skeleton"
    assert not (tmp_path / "m").exists()


def test_parity_measure():
    expected = np.array([1.0, -4.0])
    assert relative_difference(expected, expected) == 0
    assert relative_difference(expected + np.array([0.0, 0.4]), expected) == pytest.approx(0.1)
    assert relative_difference(np.array([np.nan, 0.0]), expected) == np.inf
    with pytest.raises(Refused) as caught:
        check_parity({"features": expected * 1.001}, {"features": expected}, 1e-4)
    assert caught.value.code == "parity"
    with pytest.raises(Refused):
        check_parity({"features": expected * np.nan}, {"features": expected}, 1e-4)


def test_agreement():
    left, right = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    assert agreement(left, left) == 1
    assert agreement(left, right) == 0.5


def test_signal_to_noise():
    expected = np.array([3.0, -4.0], np.float32)
    assert signal_to_noise(expected, expected) == np.inf
    assert signal_to_noise(expected + np.array([0.05, 0.0], np.float32), expected) == pytest.approx(40, abs=1e-3)
    assert signal_to_noise(expected, 0 * expected) == -np.inf
    assert signal_to_noise(expected * np.nan, expected) == -np.inf
