"""`foldd-runtime`, as a user starts it, and without torch."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from runtime_kit import DAEMON, publish, samples
from test_runtime_end_to_end import DEVICE, daemon

from foldd.core.notify import notify, watchdog_interval_s
from foldd.core.signatures import write_identity
from foldd.runtime.cli import main

NO_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "ot", "watchdog"}:
            raise ImportError(f"{name} is not on this device")
sys.meta_path.insert(0, Blocker())
from foldd.runtime.cli import main
code = main(sys.argv[1:])
assert not {"torch", "onnx", "onnxscript", "ot", "watchdog"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("foldd.") and name.split(".")[1] not in ("core", "runtime")]
sys.exit(code)
"""


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", samples(3))
    return str(tmp_path / "x.npy")


def test_infer_prints_classes_and_writes_logits(
    tmp_path: Path, inputs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "state", 2)
    arguments = ["infer", "--state", str(tmp_path / "state"), "--task", "cats", "--input", inputs]
    assert main([*arguments, "--output", str(tmp_path / "y.npy")]) == 0
    assert capsys.readouterr().out == "generation 2, task cats\n0\tcats-0\n1\tcats-0\n2\tcats-0\n"
    assert np.array_equal(np.load(tmp_path / "y.npy"), np.full((3, 2), 2.0))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "generation": 2,
        "task": "cats",
        "classes": ["cats-0"] * 3,
        "indices": [0, 0, 0],
    }


def test_errors_are_told_and_exit_with_2(tmp_path: Path, inputs: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path / "state")]
    assert main(["infer", *state, "--task", "cats", "--input", inputs]) == 2
    assert "There is no generation" in capsys.readouterr().err
    publish(tmp_path / "state", 1)
    assert main(["infer", *state, "--task", "cat", "--input", inputs]) == 2
    assert "Did you mean 'cats'" in capsys.readouterr().err
    assert main(["infer", *state, "--task", "cats", "--input", "/nowhere.npy"]) == 2
    for output, words in ((inputs, "one of the inputs"), (tmp_path / "nowhere" / "y.npy", "no folder")):
        assert main(["infer", *state, "--task", "cats", "--input", inputs, "--output", str(output)]) == 2
        assert words in capsys.readouterr().err
    assert np.array_equal(np.load(inputs), samples(3))
    assert main(["fetch", *state, "--from", "tcp://127.0.0.1:9"]) == 2
    assert "--trust" in capsys.readouterr().err
    assert main(["serve", *state, "--listen", "nonsense"]) == 2


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path)]
    assert main(["status", *state, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["generation"] is None
    publish(tmp_path, 9)
    assert main(["status", *state]) == 0
    assert re.search(r"^generation\s+9$", capsys.readouterr().out, re.M)
    assert main(["status", *state, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == ["cats", "dogs"]


def test_fetch_and_infer_where_torch_cannot_be_imported(tmp_path: Path, inputs: str) -> None:
    secret, _ = write_identity(DEVICE, tmp_path / "keys")
    (tmp_path / "daemon.pub").write_bytes(msgspec.json.encode(DAEMON.public))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", NO_TORCH, *arguments, "--state", str(tmp_path / "device")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    with daemon(tmp_path) as (server, root):
        publish(root, 1)
        done = run(
            "fetch", "--from", server.bind_endpoint, "--identity", str(secret), "--trust", str(tmp_path / "daemon.pub")
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "generation 1\n"
    done = run("infer", "--task", "dogs", "--input", inputs, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == ["dogs-0"] * 3


def test_fetch_follows_until_sigterm(tmp_path: Path) -> None:
    secret, _ = write_identity(DEVICE, tmp_path / "keys")
    (tmp_path / "daemon.pub").write_bytes(msgspec.json.encode(DAEMON.public))
    with daemon(tmp_path) as (server, root):
        process = subprocess.Popen(
            [
                sys.executable, "-c", NO_TORCH, "fetch", "--follow", "--from", server.bind_endpoint,
                "--announcements", server.announce_endpoint, "--identity", str(secret),
                "--trust", str(tmp_path / "daemon.pub"), "--state", str(tmp_path / "device"),
            ],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for generation in (1, 2):
                publish(root, generation)
                server.announce()
                assert process.stdout.readline() == f"generation {generation}\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()


def test_serve_follows_current_and_stops_on_sigterm(tmp_path: Path) -> None:
    publish(tmp_path / "state", 1)
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(30)
    process = subprocess.Popen(
        [sys.executable, "-c", NO_TORCH, "serve", "--state", str(tmp_path / "state"), "--listen", "127.0.0.1:0"],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
    )  # fmt: skip
    try:
        said = set()
        while not {b"READY=1", b"WATCHDOG=1"} <= said:
            said.add(systemd.recv(100))
        assert process.stderr is not None
        match = re.search(r"http://127.0.0.1:(\d+)", process.stderr.readline())
        assert match is not None

        def generation() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=10)
            connection.request("GET", "/v1/status")
            facts = json.loads(connection.getresponse().read())
            connection.close()
            return int(facts["generation"])

        assert generation() == 1
        publish(tmp_path / "state", 2)
        for _ in range(2000):
            if generation() == 2:
                break
        assert generation() == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
        systemd.close()


def test_notifications_go_nowhere_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    assert not notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None
