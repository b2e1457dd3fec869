"""`foldd pack`, `keygen` and how commands fail: with a sentence and status 2, never with a traceback."""

from __future__ import annotations

import subprocess
import sys

import networks
import numpy as np
import pytest
from safetensors.numpy import save_file

from foldd.core.bundle import open_bundle
from foldd.core.tensorfile import open_tensors
from foldd.daemon.cli import main


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], "config.toml cannot be read"),
        (["pack", "nowhere.safetensors", "-o", "x"], "cannot be read"),
        (["submit", "nowhere.safetensors"], "no file"),
        (["keygen", "../evil"], "cannot name a key"),
    ],
)
def test_failures_are_sentences(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOLDD_CONFIG", raising=False)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


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
