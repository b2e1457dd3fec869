"""The journey with the real daemon, worker and files: what is bad is set aside, what is good is served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from simulator import Box, make_bundle

from foldd.core.manifest import verify_manifest
from foldd.core.signatures import read_public
from foldd.daemon.memory import rss_bytes

LONG = {"threads": 1, "method": "otmf-paper", "otmf-paper": {"steps": 500}}  # long enough to be caught in the middle


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of a bundle with its tensors and metadata changed, and no digest of its content."""
    with safe_open(source, "np") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    metadata.pop("foldd.content")
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


@pytest.mark.parametrize("base", ["residual", "attention"])
def test_dropped_checkpoints_become_a_served_model(make_box, base):
    """Fold two, then answer from the artifact in onnxruntime; drop one again: nothing is folded twice."""
    box: Box = make_box(base=base)
    first, second = box.bundle("alpha", seed=1), box.bundle("beta", seed=2, classes=5)
    box.start()
    box.drop(first)
    box.wait_generation(1)
    box.drop(second)
    box.wait_generation(2)
    box.drop(first)
    box.wait(lambda: box.arrivals()[0].duplicates == 1, "the duplicate's count")
    assert not list(box.layout.inbox.glob("*.safetensors"))
    assert [row["task"] for row in box.history()] == ["alpha", "beta"]
    session = onnxruntime.InferenceSession(box.layout.current / "model.onnx")
    answers = session.run(["logits/alpha", "logits/beta"], {"input": np.zeros((4, 1, 8, 8), np.float32)})
    assert [a.shape for a in answers] == [(4, 3), (4, 5)]
    row = box.history()[-1]
    assert set(row) >= {
        "generation", "parent", "task", "method", "checkpoint_sha256", "artifact_sha256", "scores", "seconds",
        "peak_rss_bytes", "created",
    }  # fmt: skip
    assert row["method"] == "otmf"
    assert row["scores"]["parity"] <= 1e-4
    assert set(row["seconds"]) == {"settle", "verify", "fold", "export", "gate", "stage", "commit"}
    key = read_public(box.layout.keys / "daemon.pub")
    manifest = verify_manifest((box.layout.current / "manifest.json").read_bytes(), [key])
    assert manifest.generation == 2
    assert set(manifest.tasks) == {"alpha", "beta"}


def test_uowq_weighs_by_the_samples_that_bundles_tell(make_box, tmp_path):
    """100 samples before, 300 now; the attention network is the one whose kernels have no forward-mode derivative."""
    box: Box = make_box(base="attention", fold={"method": "uowq"})
    box.start()
    box.drop(box.bundle("alpha", seed=1))
    box.wait_generation(1)
    told = rewritten(
        box.bundle("beta", seed=2), tmp_path / "beta.safetensors", lambda _, meta: meta.update({"foldd.samples": "300"})
    )
    box.drop(told)
    box.wait_generation(2)
    fold = json.loads((box.layout.current / "report.json").read_text())["fold"]
    assert (fold["method"], fold["warnings"]) == ("uowq", [])
    assert fold["shares"]["merged"] == pytest.approx(0.25, abs=0.02)
    assert sum(fold["shares"].values()) == pytest.approx(1)


def test_idle_supervisor_is_small_and_has_no_torch(make_box):
    box: Box = make_box()
    process = box.start()
    box.drop(box.bundle("alpha"))
    box.wait_generation(1)
    box.wait(lambda: box.worker_pid() is None and box.status()["state"] == "idle", "the worker's end")
    facts = box.status()
    assert set(facts) >= {
        "generation", "state", "queue_depth", "tasks", "last_error", "quarantined", "rss_bytes", "config_digest",
    }  # fmt: skip
    assert facts["rss_bytes"] == pytest.approx(rss_bytes(process.pid), rel=0.1)
    assert facts["rss_bytes"] < 60_000_000
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    assert box.stop() == 0
    assert box.status()["state"] == "stopped"


def test_every_bad_file_is_set_aside_with_its_own_reason_and_the_next_good_one_is_folded(
    make_box, base_folder, tmp_path
):
    box: Box = make_box()
    good, made = box.bundle("good", seed=1), tmp_path / "bad"
    made.mkdir()
    data = good.read_bytes()
    (made / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    header = 8 + int.from_bytes(data[:8], "little")
    (made / "padded.safetensors").write_bytes(data[:header] + b"\0" * (len(data) - header))
    (made / "notes.txt").write_text("not a checkpoint at all")
    (made / "empty.safetensors").touch()

    def nan(tensors, _):
        tensors["model/conv.weight"][0, 0, 0, 0] = np.nan

    def zeros(tensors, _):
        for name in tensors:
            if name.startswith("model/"):
                tensors[name] = np.zeros_like(tensors[name])

    def wild(tensors, _):
        tensors["model/conv.weight"] = tensors["model/conv.weight"] * np.float32(1e19)

    def shape(tensors, _):
        tensors["model/conv.bias"] = np.ones(5, np.float32)

    def base(_, metadata):
        metadata["foldd.base"] = "0" * 64

    def missing(tensors, _):
        del tensors["model/conv.bias"]

    changes = {"nan": nan, "zeros": zeros, "wild": wild, "shape": shape, "base": base, "missing": missing}
    for name, change in changes.items():
        rewritten(good, made / f"{name}.safetensors", change)
    make_bundle(made / "other.safetensors", base_folder("attention"), "other")
    os.symlink("/etc/hostname", box.layout.inbox / "link.safetensors")
    (box.layout.inbox / "folder").mkdir()
    box.start()
    for path in sorted(made.iterdir()):
        box.drop(path)
    box.wait(lambda: len(box.reasons()) == 13, "quarantine of all thirteen")
    assert box.reasons() == {
        "truncated.safetensors": "truncated",
        "padded.safetensors": "content-mismatch",
        "notes.txt": "not-safetensors",
        "empty.safetensors": "not-safetensors",
        "nan.safetensors": "not-finite",
        "zeros.safetensors": "all-zero",
        "wild.safetensors": "diverged",
        "shape.safetensors": "wrong-shape",
        "base.safetensors": "wrong-base",
        "missing.safetensors": "missing-tensors",
        "other.safetensors": "wrong-base",
        "link.safetensors": "not-a-file",
        "folder": "not-a-file",
    }
    assert (box.layout.quarantine).glob("*-nan.safetensors/nan.safetensors")
    box.drop(good)
    box.wait_generation(1)
    facts = box.status()
    assert facts["quarantined"] == 13
    shown = [(item["file"], item["code"]) for item in facts["set_aside"]]
    assert len(shown) == 5
    assert set(shown) <= set(box.reasons().items())
    assert box.worker_pid() is None or box.process.poll() is None


def test_a_quarantined_file_is_tried_again_when_dropped_again(make_box, tmp_path):
    box: Box = make_box()
    bad = tmp_path / "notes.txt"
    bad.write_text("no checkpoint")
    box.start()
    seen = {""}
    for _ in range(2):
        box.drop(bad)
        box.wait(lambda: _set_aside_at(box) not in seen, "quarantine")
        seen.add(_set_aside_at(box))
    assert box.status()["quarantined"] == 1


def _set_aside_at(box: Box) -> str:
    """When the only file in quarantine came there; nothing while one comes or goes."""
    try:
        (reason,) = [json.loads(path.read_text()) for path in box.layout.quarantine.glob("*/reason.json")]
    except (ValueError, FileNotFoundError):
        return ""
    return str(reason["quarantined"])


def test_plain_checkpoint_is_folded_by_the_data_free_method(make_box, tmp_path):
    """A fine-tuned state dict under the base's names, its head under the base's head's: any number of classes."""
    box: Box = make_box(base="with_head", fold={"data_free_method": "task-arithmetic"})
    import networks

    model = networks.with_head()
    tensors = {n: t.numpy().copy() for n, t in model.state_dict().items() if n != "again.weight"}
    tensors["body.stem.weight"] = tensors["body.stem.weight"] + 0.01
    tensors["fc.weight"] = np.ones((7, 12), np.float16)
    tensors["fc.bias"] = np.zeros(7, np.float16)
    save_file(tensors, tmp_path / "birds.safetensors")
    box.start()
    box.drop(tmp_path / "birds.safetensors")
    box.wait_generation(1)
    row = box.history()[0]
    assert (row["task"], row["method"]) == ("birds", "task-arithmetic")


def test_a_worker_that_dies_costs_an_attempt_and_then_the_checkpoint(make_box):
    """The poison pill: the daemon lives, the file goes to quarantine with the reason, the next one is folded."""
    box: Box = make_box(worker={"attempts": 2, "memory_bytes": 50_000_000})  # no worker fits into that
    box.start()
    box.drop(box.bundle("poison"))
    box.wait(lambda: box.status()["last_error"] is not None, "the worker's end")
    box.stop()
    assert box.generations() == []
    assert box.arrivals("queued")[0].attempts == 0, "a worker that never began a fold costs no attempt"


def test_killed_worker_is_replaced_and_counts_an_attempt(make_box):
    box: Box = make_box(worker={"attempts": 2}, fold=LONG)
    box.start()
    box.drop(box.bundle("first", seed=1))
    box.wait_generation(1)
    box.drop(box.bundle("second", seed=2))
    for attempt in (1, 2):
        box.wait(lambda n=attempt: [a.attempts for a in box.arrivals("folding")] == [n], f"attempt {attempt}")
        os.kill(box.worker_pid(), signal.SIGKILL)
    box.wait(box.reasons, "quarantine")
    assert box.reasons() == {"second.safetensors": "worker-died"}
    reason = json.loads(next(box.layout.quarantine.glob("*second*/reason.json")).read_text())
    assert "SIGKILL" in reason["what"]
    assert reason["attempts"] == 2
    assert box.process.poll() is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [b"GOMP_SPINCOUNT=1000"]),
        ({"GOMP_SPINCOUNT": "7"}, [b"GOMP_SPINCOUNT=7"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, []),
    ],
)
def test_the_workers_threads_spin_for_moments_unless_the_operator_says_otherwise(
    make_box, monkeypatch, given, expected
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):  # a command that ran in this process has set one
        monkeypatch.delenv(name, raising=False)
    box: Box = make_box(fold=LONG)
    box.start(**given)
    box.drop(box.bundle("first"))
    box.wait(lambda: box.arrivals("folding"), "the fold")
    environment = Path(f"/proc/{box.worker_pid()}/environ").read_bytes().split(b"\0")
    assert [line for line in environment if line.startswith(b"GOMP_SPINCOUNT")] == expected


def test_sigterm_in_the_middle_of_a_fold_costs_nothing(make_box):
    box: Box = make_box(fold=LONG)
    box.start()
    box.drop(box.bundle("first", seed=1))
    box.wait_generation(1)
    box.drop(box.bundle("second", seed=2))
    box.wait(lambda: box.arrivals("folding"), "the second fold")
    assert box.stop() == 0
    queued = box.arrivals("queued")
    assert [(a.name, a.attempts) for a in queued] == [("second.safetensors", 0)]
    box.configure(fold={"method": "average"})
    box.start()
    box.wait_generation(2)
    assert box.history()[1]["method"] == "otmf-paper", "the plan of the first attempt stands"


def test_two_daemons_on_one_state_directory_are_one_too_many(make_box):
    box: Box = make_box()
    box.start()
    box.wait(lambda: box.layout.lock.exists() and box.status()["pid"], "the first daemon")
    second = subprocess.run(
        [sys.executable, "-m", "foldd.daemon.cli", "run", "--config", str(box.config_path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert second.returncode == 2
    assert "already" in second.stderr


def test_damaged_merge_state_stops_folding_and_says_so(make_box):
    box: Box = make_box()
    box.start()
    box.drop(box.bundle("first", seed=1))
    box.wait_generation(1)
    box.stop()
    blob = next(box.layout.blobs.iterdir())
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    box.start()
    box.drop(box.bundle("second", seed=2))
    box.wait(lambda: "damaged" in (box.status()["last_error"] or ""), "the complaint")
    assert [a.state for a in box.arrivals()] == ["folded", "queued"], "nothing is lost"


def test_gate_refuses_and_the_last_generation_goes_on_serving(make_box):
    box: Box = make_box(
        gate={"conflict": 1.0, "on_conflict": "refuse"}, fold={"method": "average"}, heads={"mode": "frozen"}
    )
    box.start()
    box.drop(box.bundle("first", seed=1, scale=0.5, calibration=64))
    box.wait_generation(1)
    box.drop(box.bundle("second", seed=2, scale=2.0, calibration=64))
    box.wait(box.reasons, "the refusal")
    assert box.reasons() == {"second.safetensors": "conflict"}
    assert box.status()["generation"] == 1
    assert os.readlink(box.layout.current) == "generations/000001"


def test_submit_waits_until_folded(make_box):
    box: Box = make_box()
    bundle = box.bundle("alpha")
    box.start()
    command = [sys.executable, "-m", "foldd.daemon.cli", "submit", str(bundle), "--wait", "90"]
    done = subprocess.run([*command, "--config", str(box.config_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "generation 1" in done.stdout


def test_files_that_are_still_written_are_left_alone(make_box):
    """An open writer, and a name that says so: neither is taken before its time."""
    box: Box = make_box()
    bundle = box.bundle("slow")
    box.start()
    data = bundle.read_bytes()
    shutil.copyfile(bundle, box.layout.inbox / "copying.part")
    with (box.layout.inbox / "slow.safetensors").open("wb") as file:
        file.write(data)  # whole, but the writer still holds it
        file.flush()
        other = box.bundle("other", seed=2)
        box.drop(other)
        box.wait_generation(1)
        assert [row.task for row in box.generations()] == ["other"]
    box.wait_generation(2)
    assert (box.layout.inbox / "copying.part").exists()


def test_a_step_that_the_disk_refuses_is_mended_while_running(make_box):
    """`generations` cannot be written for a while: the daemon says so, goes on serving, and folds when it can again."""
    box: Box = make_box(fold={"method": "average"})
    box.start()
    box.drop(box.bundle("first", seed=1))
    box.wait_generation(1)
    aside = box.layout.root / "aside"
    box.layout.generations.rename(aside)
    box.layout.generations.touch()  # no folder: every rename into it fails
    box.drop(box.bundle("second", seed=2))
    box.wait(lambda: box.status()["last_error"], "the complaint")
    assert box.process.poll() is None
    assert [a.state for a in box.arrivals()] != ["folded", "folded"]
    box.layout.generations.unlink()
    aside.rename(box.layout.generations)
    box.wait_generation(2)
    assert box.arrivals()[1].attempts == 1, "what the disk broke costs no attempt"
    assert box.stop() == 0
