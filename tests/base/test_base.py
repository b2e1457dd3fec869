"""The base: captured, cut, described, exported; for both kinds of network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from foldd.base.batch_norm import fold_norms
from foldd.base.features import cut_at_features
from foldd.base.load import capture, input_shape_of, load_program
from foldd.base.store import open_base, open_skeleton, store_base
from foldd.core.digests import base_digest
from foldd.core.errors import BadSetup
from foldd.core.roles import Role

SHAPE = (1, 8, 8)
HERE = Path(networks.__file__)


def inputs(n: int = 5) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_features_are_the_networks_output(base_folder, name):
    base, model = open_base(base_folder(name)), getattr(networks, name)()
    with torch.no_grad():
        assert torch.equal(base.features(base.weights, inputs()), model(inputs()))


def test_features_follow_the_weights_they_are_given_and_change_nothing(base_folder):
    base = open_base(base_folder("residual"))
    before = base.features(base.weights, inputs())
    other = {name: tensor * 1.5 for name, tensor in base.weights.items()}
    assert not torch.allclose(base.features(other, inputs()), before)
    assert torch.equal(base.features(base.weights, inputs()), before)


def test_head_is_found_and_left_out(base_folder):
    base, model = open_base(base_folder("with_head")), networks.with_head()
    captured = {}
    model.fc.register_forward_pre_hook(lambda _, arguments: captured.update(x=arguments[0]))
    with torch.no_grad():
        model(inputs())
        torch.testing.assert_close(base.features(base.weights, inputs()), captured["x"])
    assert "fc.weight" not in base.spec.tensors
    assert base.spec.head == "fc"
    assert base.spec.features == 12


def test_tied_tensors_have_one_canonical_entry(base_folder):
    spec = open_base(base_folder("with_head")).spec
    tied = {name: entry.tied_to for name, entry in spec.tensors.items() if entry.tied_to}
    assert tied in ({"mix.weight": "again.weight"}, {"again.weight": "mix.weight"})
    assert len({"mix.weight", "again.weight"} & set(spec.canonical)) == 1


@pytest.mark.parametrize(
    ("network", "tensor", "role"),
    [
        ("residual", "stem.weight", Role.CONVOLUTION),
        ("residual", "conv.bias", Role.BIAS),
        ("residual", "bn.weight", Role.NORM),
        ("residual", "bn.running_var", Role.STATISTIC),
        ("residual", "bn.num_batches_tracked", Role.COUNTER),
        ("attention", "qkv.weight", Role.MATRIX),
        ("attention", "qkv.bias", Role.BIAS),
        ("attention", "n1.bias", Role.NORM),
        ("attention", "pos", Role.EMBEDDING),
        ("attention", "cls", Role.EMBEDDING),
    ],
)
def test_roles_are_read_from_the_graph(base_folder, network, tensor, role):
    assert open_base(base_folder(network)).spec.tensors[tensor].role is role


def test_digest_is_the_documented_one(base_folder):
    """Written out once more, from the words of docs/formats.md."""
    import hashlib

    state = {n: t for n, t in networks.residual().state_dict().items() if t.is_floating_point()}
    digest = hashlib.sha256()
    for name in sorted(state):
        shape = ",".join(map(str, state[name].shape))
        digest.update(name.encode() + b"\0float32\0" + shape.encode() + b"\0" + state[name].numpy().tobytes())
    assert open_base(base_folder("residual")).spec.digest == digest.hexdigest()


def test_folding_batch_norm_keeps_the_function_in_float64():
    """Against an independent computation: torch's own convolution and BatchNorm in double precision."""
    model = networks.residual().double()
    state = {n: t.numpy().astype(np.float32) for n, t in model.state_dict().items() if t.is_floating_point()}
    module = capture(networks.residual(), SHAPE).module(check_guards=False)
    from foldd.base.batch_norm import find_norms

    rules = tuple(rule for rule, _, _ in find_norms(module))
    assert {rule.weight for rule in rules} == {"stem.weight", "conv.weight"}
    folded = fold_norms(state, rules)
    assert not any("running" in name or name.startswith(("bn.", "norm.")) for name in folded)
    x = inputs().double()
    expected = model.bn(model.stem(x))
    weight, bias = (torch.from_numpy(folded[n]).double() for n in ("stem.weight", "stem.bias"))
    actual = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["residual", "attention", "with_head"])
def test_skeleton_has_one_initializer_per_tensor_and_nothing_of_this_machine(base_folder, name):
    folder = base_folder(name)
    path, rules = open_skeleton(folder)
    base = open_base(folder)
    folded = fold_norms({n: t.numpy() for n, t in base.weights.items()}, rules)
    model = onnx.load(path)
    assert set(folded) <= {initializer.name for initializer in model.graph.initializer}
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"stack_trace" not in path.read_bytes()


def test_archive_and_factory_give_the_same_base(tmp_path):
    model = networks.residual()
    torch.export.save(capture(model, SHAPE), tmp_path / "model.pt2")
    save_file({n: t for n, t in model.state_dict().items() if t.is_floating_point()}, tmp_path / "w.safetensors")
    first = store_base(tmp_path / "a", load_program(str(tmp_path / "model.pt2")))
    second = store_base(
        tmp_path / "b",
        load_program(f"{HERE}:residual", weights=tmp_path / "w.safetensors", input_shape=SHAPE),
    )
    assert first == second


def test_features_by_submodule_name():
    program = capture(networks.with_head(), SHAPE)
    cut = cut_at_features(program, features="body")
    with torch.no_grad():
        torch.testing.assert_close(cut.module()(inputs()), networks.with_head().body(inputs()))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"head": "nope"}, "no-features"),
        ({"features": "nope"}, "no-features"),
        ({"features": "body.stem"}, "bad-features"),
    ],
)
def test_wrong_feature_names_are_explained(options, code):
    with pytest.raises(BadSetup) as caught:
        cut_at_features(capture(networks.with_head(), SHAPE), **options)
    assert caught.value.code == code
    assert caught.value.remedy


def test_training_mode_is_refused(tmp_path):
    model = networks.residual().train()
    program = torch.export.export(
        model, (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(BadSetup) as caught:
        load_program(str(tmp_path / "m.pt2"))
    assert caught.value.code == "base-in-training"


def test_fixed_batch_is_refused():
    program = torch.export.export(networks.residual(), (torch.zeros(2, *SHAPE),))
    with pytest.raises(BadSetup) as caught:
        input_shape_of(program)
    assert caught.value.code == "base-fixed-batch"


@pytest.mark.parametrize(
    ("source", "code"),
    [("missing.pt2", "no-base"), ("no-colon", "bad-base"), ("nowhere:f", "base-incomplete")],
)
def test_wrong_sources_are_explained(source, code):
    with pytest.raises(BadSetup) as caught:
        load_program(source)
    assert caught.value.code == code


def test_sources_that_cannot_be_a_base_tell_what_can(tmp_path, monkeypatch):
    (tmp_path / "net_of_this_folder.py").write_text("def make():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    for source, words in [
        ("ckpt.pt", "holds weights, and not the network"),
        ("base.safetensors", "--weights base.safetensors"),
        ("net_of_this_folder:make", r"Write net_of_this_folder\.py:make"),
        ("nowhere:make", "try it in Python"),
        ("net_of_this_folder.py:make", "returned a int"),
    ]:
        with pytest.raises(BadSetup, match=words) as caught:
            load_program(source, weights=tmp_path / "w.safetensors", input_shape=SHAPE)
        assert caught.value.code == "bad-base"
        assert caught.value.remedy


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(BadSetup) as caught:
        load_program(f"{HERE}:residual", weights=tmp_path / "w.safetensors", input_shape=SHAPE)
    assert caught.value.code == "wrong-weights"


def test_init_command_end_to_end(tmp_path):
    torch.export.save(capture(networks.with_head(), SHAPE), tmp_path / "model.pt2")
    (tmp_path / "config.toml").write_text('[state]\ndirectory = "state"\n')
    command = [sys.executable, "-m", "foldd.daemon.cli", "init", "--config", str(tmp_path / "config.toml")]
    done = subprocess.run(
        [*command, "--base", str(tmp_path / "model.pt2"), "--head", "fc"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spec = open_base(tmp_path / "state" / "base").spec
    assert spec.head == "fc"
    weights = {n: t.numpy() for n, t in open_base(tmp_path / "state" / "base").weights.items()}
    assert base_digest(weights.items()) == spec.digest
