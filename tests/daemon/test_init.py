"""`foldd init` once more: the skeleton of the same base is made anew, folds stay; another base is refused."""

from __future__ import annotations

import networks
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from foldd.core.errors import BadSetup
from foldd.daemon.base_folder import replaced_base, restore_base
from foldd.daemon.cli import main
from foldd.daemon.layout import Layout
from foldd.daemon.plan import PACE


class Unclipped(networks.Residual):
    """`Residual` with all its tensors, but the features before the last ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        return (self.norm(self.conv(x)) + self.shortcut(x)).mean((2, 3))


def unclipped() -> nn.Module:
    return Unclipped()


@pytest.fixture
def init(tmp_path):
    """`foldd init` on a box; its exit status."""

    def run(box, factory="residual", *, change=lambda state: None, place=networks.__file__):
        state = {name: tensor.clone().contiguous() for name, tensor in networks.residual().state_dict().items()}
        change(state)
        save_file(state, tmp_path / "w.safetensors")
        return main([
            "init", "--config", str(box.config_path), "--base", f"{place}:{factory}", "--weights",
            str(tmp_path / "w.safetensors"), "--input-shape", "1,8,8",
        ])  # fmt: skip

    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PACE}


def test_the_same_base_is_taken_apart_anew_and_its_folds_stay(make_box, init, capsys):
    box = make_box()
    box.start()
    box.drop(box.bundle("alpha", seed=1))
    box.wait_generation(1)
    assert init(box) == 2
    assert "runs on" in capsys.readouterr().err
    box.stop()
    made = files(box.layout.base)
    blobs = {path.name for path in box.layout.blobs.iterdir()}
    (box.layout.base / "skeleton.onnx").write_bytes(b"as an earlier version made it")
    assert init(box) == 0
    assert "folds stay" in capsys.readouterr().out
    assert (box.layout.base / PACE).exists()
    assert files(box.layout.base)["skeleton.onnx"] == made["skeleton.onnx"]
    assert {path.name for path in box.layout.blobs.iterdir()} == blobs
    assert not box.layout.new_base.exists()
    assert not box.layout.old_base.exists()
    second = box.bundle("beta", seed=2)
    box.layout.base.rename(box.layout.old_base)  # as a power cut in the middle of another init leaves it
    box.start()
    box.drop(second)
    box.wait_generation(2)
    box.stop()
    session = onnxruntime.InferenceSession(box.layout.current / "model.onnx")
    assert {"logits/alpha", "logits/beta"} <= {output.name for output in session.get_outputs()}

    # Another network is refused, and nothing changes.
    before = files(box.layout.base)

    def other_weights(state):
        state["stem.weight"][0, 0, 0, 0] += 1

    assert init(box, change=other_weights) == 2
    assert "the folds are onto base" in capsys.readouterr().err
    assert init(box, "unclipped", place=__file__) == 2
    assert "its feature output is another" in capsys.readouterr().err
    assert files(box.layout.base) == before
    assert not box.layout.new_base.exists()


def test_a_base_is_replaced_whole_or_not_at_all(tmp_path):
    layout = Layout(tmp_path)

    def put(content, error=None):
        with replaced_base(layout) as folder:
            (folder / "base.json").write_text(content)
            if error is not None:
                raise error

    put("zeroth")
    put("first")
    with pytest.raises(BadSetup):
        put("second", BadSetup("bad-base", "No."))
    assert (layout.base / "base.json").read_text() == "first"
    # A crash between the two renames, with the new one beside.
    layout.base.rename(layout.old_base)
    layout.new_base.mkdir()
    restore_base(layout)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (layout.base / "base.json").read_text() == "first"
