"""What the daemon says of itself, when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foldd.daemon.live import LiveStatus


def test_what_cannot_be_written_is_not_left_to_tell_old_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "status.json"
    live = LiveStatus(path)
    live.write()
    assert json.loads(path.read_text())["state"] == "idle"
    blocked = path.with_name(".status.json.part")
    blocked.mkdir()  # as a full disk: nothing can be written under that name
    live.last_error = "the disk is full"
    for _ in range(3):
        live.begin("a.safetensors")
        live.write()
        live.finish(error="the disk is full")
        live.write()
    assert not path.exists()
    assert len(caplog.records) == 1, "said once, not at each turn"
    blocked.rmdir()
    live.write()
    assert json.loads(path.read_text())["last_error"] == "the disk is full"
