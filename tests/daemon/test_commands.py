"""`foldd pack`, `keygen` and how commands fail: with a sentence and status 2, never with a traceback."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import networks
import numpy as np
import pytest
from safetensors.numpy import save_file

from foldd.core.base_spec import BaseSpec, TensorSpec
from foldd.core.bundle import open_bundle
from foldd.core.roles import Role
from foldd.core.scaled import ScaledTensor
from foldd.core.tensorfile import open_tensors
from foldd.daemon.cli import main
from foldd.daemon.layout import Layout


def weights_of(model, scale=1.0):
    state = {n: t for n, t in model.state_dict().items() if n != "again.weight" and t.is_floating_point()}
    return {n: t.numpy() * np.float32(scale) for n, t in state.items()}


@pytest.fixture
def box(make_box):
    return make_box(base="with_head")


def test_pack_with_the_weights_own_head(box, tmp_path, capsys):
    save_file(weights_of(networks.with_head()), tmp_path / "w.safetensors")
    np.save(tmp_path / "x.npy", np.ones((5, 1, 8, 8), np.float64))
    np.save(tmp_path / "y.npy", np.array([0, 1, 2, 3, 0], np.uint8))
    out = tmp_path / "birds.safetensors"
    status = main([
        "pack", str(tmp_path / "w.safetensors"), "-o", str(out), "--config", str(box.config_path), "--calibration",
        str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy"), "--samples", "9", "--classes", "a,b,c,d",
    ])  # fmt: skip
    assert status == 0
    read = open_bundle(out, box.spec)
    assert (read.task, read.samples, read.classes) == ("birds", 9, ("a", "b", "c", "d"))
    assert read.inputs.dtype == np.float32
    assert np.array_equal(read.head.weight, networks.with_head().fc.weight.detach().numpy())
    assert "content" in " ".join(open_tensors(out).metadata)


def test_pack_delta_is_the_difference(box, tmp_path):
    save_file(weights_of(networks.with_head(), 1.5), tmp_path / "w.safetensors")
    out = tmp_path / "t.safetensors"
    assert (
        main(["pack", str(tmp_path / "w.safetensors"), "-o", str(out), "--delta", "--config", str(box.config_path)])
        == 0
    )
    read = open_bundle(out, box.spec)
    assert read.is_delta
    name = "body.conv.weight"
    expected = 0.5 * networks.with_head().state_dict()[name].numpy()
    np.testing.assert_allclose(read.parameters[name].float32(), expected, rtol=1e-5, atol=1e-7)


def packed(box, tmp_path, *options, changed=lambda weights: None):
    weights = weights_of(networks.with_head(), 1.5)
    changed(weights)
    save_file(weights, tmp_path / "w.safetensors")
    out = tmp_path / "t.safetensors"
    status = main(["pack", str(tmp_path / "w.safetensors"), "-o", str(out), *options, "--config", str(box.config_path)])
    return out if status == 0 else None


def test_pack_quantized_stores_codes_within_half_a_step(box, tmp_path):
    floats = open_bundle(packed(box, tmp_path, "--delta"), box.spec)
    exact = {name: tensor.float32() for name, tensor in floats.parameters.items()}
    read = open_bundle(packed(box, tmp_path, "--quantize", "w8"), box.spec)
    assert read.is_delta
    coded = {name for name, tensor in read.parameters.items() if isinstance(tensor, ScaledTensor)}
    weights = {Role.MATRIX, Role.CONVOLUTION, Role.EMBEDDING}
    assert coded == {name for name in exact if box.spec.tensors[name].role in weights}
    for name, tensor in read.parameters.items():
        if name not in coded:
            assert tensor.float32().tobytes() == exact[name].tobytes()
            continue
        assert tensor.step.shape == tensor.shape[:1]
        error = np.abs(tensor.float32() - exact[name]).reshape(len(tensor.step), -1)
        assert (error <= tensor.step[:, None] * (0.5 + 1e-5)).all()
        assert error.any()


def test_pack_quantized_is_a_quarter_of_the_bytes(tmp_path, capsys):
    """Of a network that is large enough for its header not to count."""
    config, layout = tmp_path / "config.toml", Layout(tmp_path / "state")
    config.write_text("")
    layout.create()
    layout.base.mkdir(exist_ok=True)
    shapes = {"a.weight": (256, 512), "b.weight": (64, 32, 3, 3)}
    tensors = {name: TensorSpec(shape, Role.MATRIX) for name, shape in shapes.items()}
    spec = BaseSpec(digest="ab" * 32, tensors=tensors, input_shape=(3,), features=2, head="fc")
    spec.write(layout.base / "base.json")
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, layout.base / "weights.safetensors")
    save_file({n: 1.01 * a for n, a in arrays.items()} | {"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / "w")
    sizes = []
    for options in ([], ["--quantize", "w8"]):
        out = tmp_path / "t.safetensors"
        assert main(["pack", str(tmp_path / "w"), "-o", str(out), *options, "--config", str(config)]) == 0
        sizes.append(out.stat().st_size)
    assert 0.25 < sizes[1] / sizes[0] < 0.26


def test_pack_quantized_refuses_what_no_integer_stands_for(box, tmp_path, capsys):
    def diverged(weights):
        weights["body.conv.weight"][0, 0, 0, 0] = np.nan

    assert packed(box, tmp_path, "--quantize", "w8", changed=diverged) is None
    assert "body.conv.weight holds NaN" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        packed(box, tmp_path, "--quantize", "w3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], "config.toml cannot be read"),
        (["pack", "nowhere.safetensors", "-o", "x"], "cannot be read"),
        (["submit", "nowhere.safetensors"], "no file"),
        (["keygen", "../evil"], "cannot name a key"),
        (["submit", __file__, "--to", "127.0.0.1:5757"], "Write tcp://127.0.0.1:5757"),
    ],
)
def test_failures_are_sentences(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOLDD_CONFIG", raising=False)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def pack_inputs(tmp_path):
    """Everything that `foldd pack` reads, as files; its arguments but for -o."""
    save_file(weights_of(networks.with_head()), tmp_path / "w.safetensors")
    save_file({"weight": np.ones((4, 12), np.float32)}, tmp_path / "h.safetensors")
    np.save(tmp_path / "x.npy", np.ones((5, 1, 8, 8), np.float32))
    np.save(tmp_path / "y.npy", np.array([0, 1, 2, 3, 0]))
    names = {"--head": "h.safetensors", "--calibration": "x.npy", "--labels": "y.npy"}
    return [str(tmp_path / "w.safetensors"), *(part for o, n in names.items() for part in (o, str(tmp_path / n)))]


@pytest.mark.parametrize("name", ["w.safetensors", "h.safetensors", "x.npy", "y.npy", "box/state/base/base.json"])
def test_pack_never_replaces_what_it_reads(box, tmp_path, capsys, name):
    arguments = pack_inputs(tmp_path)
    before = (tmp_path / name).read_bytes()
    assert main(["pack", *arguments, "-o", str(tmp_path / name), "--config", str(box.config_path)]) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_outputs_replace_files_alone(box, tmp_path, capsys):
    arguments = [*pack_inputs(tmp_path), "--task", "t", "--config", str(box.config_path)]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-pipe").symlink_to(tmp_path / "pipe")
    for name, words in [
        ("pipe", "a device, a pipe or a socket"), ("to-pipe", "a device, a pipe or a socket"),
        ("folder", "is a folder"), ("nowhere/x.safetensors", f"no folder {tmp_path / 'nowhere'}"),
    ]:  # fmt: skip
        assert main(["pack", *arguments, "-o", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "to-pipe").is_symlink()
    for _ in range(2):  # an older result may be replaced
        assert main(["pack", *arguments, "-o", str(tmp_path / "t.safetensors")]) == 0
    assert " kB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", ""], "--task: '' cannot name a task"),
        (["--samples", "0"], "--samples 0"),
        (["--classes", "a,b"], "--classes names 2 classes, and the head has 4"),
        (["--labels", "far.npy"], "far.npy holds 4, and the head has classes 0…3"),
        (["--labels", "half.npy"], "half.npy holds numbers that are not whole"),
        (["--labels", "few.npy"], "few.npy is [2], and --calibration is [5, 1, 8, 8]"),
        (["--labels", "w.safetensors"], "--labels w.safetensors is no .npy array"),
        (["--calibration", "words.npy"], "--calibration words.npy is no .npy array"),
        (["--calibration", "nowhere.npy"], "There is no file nowhere.npy"),
        (["--head", "x.npy"], "x.npy is not a valid .safetensors"),
        (["--head", "w.safetensors"], "--head w.safetensors has no weight"),
    ],
)
def test_pack_names_the_option_that_is_wrong(box, tmp_path, monkeypatch, capsys, options, words):
    arguments = pack_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    np.save("far.npy", np.array([0, 1, 2, 3, 4]))
    np.save("half.npy", np.array([0, 1, 2, 3, np.nan]))
    np.save("few.npy", np.array([0, 1]))
    np.save("words.npy", np.array(["a", "b"]))
    assert main(["pack", *arguments, *options, "-o", "out.safetensors", "--config", str(box.config_path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "What to do" in said
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "w", "-o", "x", "--taks", "t"], ["usage: foldd pack", "unrecognized arguments: --taks t"]),
        (["submit", "f", "--to", "tcp://box:1", "--wait", "2"], ["usage: foldd submit", "--wait: not allowed with"]),
    ],
)
def test_wrong_options_are_told_with_the_commands_own_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)


def test_keygen_never_replaces_a_public_key(tmp_path, capsys):
    (tmp_path / "ci.pub").write_text("somebody else's")
    assert main(["keygen", "ci", "--directory", str(tmp_path)]) == 2
    assert "ci.pub exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ci.pub"]


def test_status_of_a_directory_that_was_never_initialised(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    assert main(["status", "--config", str(tmp_path / "config.toml")]) == 2
    assert "foldd init" in capsys.readouterr().err


def test_heavy_commands_name_the_extra_that_they_need(box):
    """Where torch cannot be imported, as after `pip install foldd`, light commands work and heavy ones explain."""
    blocker = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'ot', 'watchdog', 'sklearn'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from foldd.daemon.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def light(*arguments):
        command = [sys.executable, "-c", blocker, *arguments, "--config", str(box.config_path)]
        return subprocess.run(command, capture_output=True, text=True)

    assert light("status").returncode == 0
    assert light("history").returncode == 0
    failed = light("init", "--base", "x.pt2")
    assert failed.returncode == 2
    assert "foldd[daemon]" in failed.stderr
    failed = light("run")
    assert failed.returncode == 2
    assert "foldd[daemon]" in failed.stderr
