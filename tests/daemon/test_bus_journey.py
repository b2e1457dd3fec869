"""Three processes, CURVE on: a client submits, the daemon folds, the runtime answers with the new generation."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from simulator import WAIT_S, Box


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def foldd(*arguments, timeout=WAIT_S):
    command = [sys.executable, "-m", "foldd.daemon.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def bus(make_box, tmp_path):
    """A box with its bus on, and the keys of a submitter, a device and a stranger."""
    keys = tmp_path / "box"
    ports = {"bind": free_port(), "announce": free_port()}
    endpoints = {name: f"tcp://127.0.0.1:{port}" for name, port in ports.items()}
    for name in ("ci", "device", "stranger", "box"):
        done = foldd("keygen", name, "--directory", tmp_path / "keys")
        assert done.returncode == 0, done.stderr
    for group, name in (("submitters", "ci"), ("devices", "device")):
        (keys / group).mkdir(parents=True)
        shutil.copy(tmp_path / "keys" / f"{name}.pub", keys / group)
    shutil.copy(tmp_path / "keys" / "box.key", keys)
    (keys / "box.key").chmod(0o600)
    table = endpoints | {"identity": "box.key", "submitters": "submitters", "devices": "devices"}
    box: Box = make_box(bus=table)
    box.start()
    box.wait(lambda: "serving" in box.tail(), "the daemon's start")
    return box, tmp_path / "keys", endpoints


def submit(bundle, keys, endpoints, who="ci"):
    return foldd(
        "submit", bundle, "--to", endpoints["bind"], "--identity", keys / f"{who}.key",
        "--server", keys / "box.pub", "--timeout", 20,
    )  # fmt: skip


def ask(port, path, data=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def npy(array) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_submitted_checkpoint_is_answered_from(bus, tmp_path):
    box, keys, endpoints = bus
    done = submit(box.bundle("alpha", seed=1), keys, endpoints)
    assert done.returncode == 0, done.stderr
    box.wait_generation(1)
    port = free_port()
    runtime = subprocess.Popen(
        [
            sys.executable, "-m", "foldd.runtime.cli", "serve", "--state", tmp_path / "device",
            "--from", endpoints["bind"], "--announcements", endpoints["announce"], "--identity", keys / "device.key",
            "--trust", keys / "box.pub", "--listen", f"127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:

        def generation():
            try:
                return ask(port, "/v1/infer/alpha", npy(np.zeros((2, 1, 8, 8), np.float32)))["generation"]
            except OSError:
                return None

        box.wait(lambda: generation() == 1, "an answer from generation 1")
        assert submit(box.bundle("beta", seed=2), keys, endpoints).returncode == 0
        box.wait(lambda: generation() == 2, "an answer from generation 2")
        answer = ask(port, "/v1/infer/beta", npy(np.zeros((2, 1, 8, 8), np.float32)))
        assert np.array(answer["logits"]).shape == (2, 3)
        maps = Path(f"/proc/{runtime.pid}/maps").read_text()
        assert "torch" not in maps
    finally:
        runtime.send_signal(signal.SIGTERM)
        assert runtime.wait(WAIT_S) == 0
    again = submit(box.bundle("alpha", seed=1), keys, endpoints)
    assert again.returncode == 0
    assert "folded" in again.stdout
    assert len(box.generations()) == 2


@pytest.mark.parametrize("who", ["stranger", "device"])
def test_keys_that_may_not_submit_are_refused(bus, who):
    box, keys, endpoints = bus
    done = submit(box.bundle("alpha"), keys, endpoints, who)
    assert done.returncode == 2
    assert "key" in done.stderr or "submitter" in done.stderr
    time.sleep(0.5)  # long enough for a scan of the inbox, had anything come
    assert box.arrivals() == []


def test_announced_checkpoint_is_pulled(make_box, tmp_path):
    """The other direction: a publisher offers a bundle, the subscribed daemon pulls it."""
    keys, port = tmp_path / "box", free_port()
    for name in ("publisher", "box"):
        assert foldd("keygen", name, "--directory", tmp_path / "keys").returncode == 0
    keys.mkdir()
    shutil.copy(tmp_path / "keys" / "box.key", keys)
    shutil.copy(tmp_path / "keys" / "publisher.pub", keys)
    (tmp_path / "daemons").mkdir()
    shutil.copy(tmp_path / "keys" / "box.pub", tmp_path / "daemons")
    box: Box = make_box(bus={"identity": "box.key"})
    with box.config_path.open("a") as config:
        config.write(f'subscribe = [{{ endpoint = "tcp://127.0.0.1:{port}", key = "publisher.pub" }}]\n')
    box.start()
    done = foldd(
        "submit", box.bundle("alpha"), "--announce", f"tcp://127.0.0.1:{port}", "--identity",
        tmp_path / "keys" / "publisher.key", "--daemons", tmp_path / "daemons", "--timeout", 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    box.wait_generation(1)
    assert box.generations()[0].task == "alpha"
