"""What the journey decides without training anything: folders, commands, waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foldd.core.errors import BadSetup, Unavailable
from foldd.daemon.commands import common
from foldd.daemon.config import load_config
from foldd.daemon.demo import box, journey


@pytest.fixture
def demo_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> box.Box:
    monkeypatch.setattr(box, "_ASK_SECONDS", 0.001)
    return box.Box(tmp_path)


class _Process:
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


def _facts(**changes: Any) -> dict[str, Any]:
    return {"state": "idle", "generation": None, "quarantined": 0, "last_error": None} | changes


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadSetup, match="was not made by"):
        journey._clear(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BadSetup, match="was not made by"):
        journey._clear(tmp_path / "thesis.txt")


def test_the_demos_own_folder_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "demo-state"
    journey._clear(folder)
    (folder / "results.json").write_text("old")
    journey._clear(folder)
    assert [entry.name for entry in folder.iterdir()] == [journey._MARK]


def test_a_folder_with_a_running_daemon_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journey._clear(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger.sqlite3").touch()
    monkeypatch.setattr(box.Box, "status", lambda self: {"pid": 4711})
    with pytest.raises(BadSetup, match="process 4711"):
        journey._clear(tmp_path)
    assert (tmp_path / "state").exists()


def test_the_configuration_is_one_that_foldd_reads(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(journey._CONFIG)
    config = load_config(tmp_path / "config.toml")
    assert config.root == tmp_path / "state"
    assert config.settings.fold.method == "otmf"
    assert config.settings.base.head == "fc"


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(BadSetup) as caught:
        journey.run(tmp_path / "d")
    assert "sklearn" in caught.value.what
    assert "foldd[demo]" in caught.value.remedy
    assert not (tmp_path / "d").exists()


def test_a_command_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(Unavailable, match=r"status 3:\nno such thing"):
        box.call([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_a_command_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "COMMAND_SECONDS", 0.2)
    with pytest.raises(Unavailable, match="was not done"):
        box.call([sys.executable, "-c", "import time; time.sleep(30)"])


def test_waiting_ends_when_the_answer_is_there(demo_box: box.Box, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([_facts(), _facts(state="folding"), _facts(generation=1)])
    shown: list[str] = []
    monkeypatch.setattr(box.Box, "status", lambda self: next(answers))
    facts = demo_box.wait(
        _Process(),  # type: ignore[arg-type]
        lambda facts: facts["generation"] == 1,
        seconds=5,
        show=lambda facts: shown.append(facts["state"]),
    )
    assert facts["generation"] == 1
    assert shown == ["idle", "folding"]


def test_a_new_generation_is_seen_before_the_next_question(demo_box: box.Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "_ASK_SECONDS", 60.0)
    links = iter([None, None, "generations/000001"])
    monkeypatch.setattr(box.Box, "_current", lambda self: next(links))
    demo_box._pause(_Process())  # type: ignore[arg-type]
    assert next(links, "all read") == "all read"


@pytest.mark.parametrize(
    ("code", "facts", "returncode"),
    [
        ("too-slow", _facts(), None),
        ("fold-failed", _facts(quarantined=1, last_error="not-finite"), None),
        ("fold-failed", _facts(last_error="the state is broken"), None),
        ("daemon-failed", _facts(), 1),
    ],
)
def test_waiting_is_bounded_and_tells_why(
    demo_box: box.Box, monkeypatch: pytest.MonkeyPatch, code: str, facts: dict[str, Any], returncode: int | None
) -> None:
    demo_box.log.write_text("the last line")
    monkeypatch.setattr(box.Box, "status", lambda self: facts)
    process = _Process()
    process.returncode = returncode
    with pytest.raises(Unavailable) as caught:
        demo_box.wait(process, lambda facts: False, seconds=0.05)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize(("script", "fails"), [("trap 'exit 0' TERM", False), ("trap 'exit 5' TERM", True)])
def test_the_daemon_is_stopped_with_sigterm_and_its_status_counts(
    demo_box: box.Box, tmp_path: Path, script: str, fails: bool
) -> None:
    ready = tmp_path / "ready"
    fake = tmp_path / "foldd"
    fake.write_text(f"#!/bin/sh\n{script}\ntouch {ready}\nwhile :; do sleep 0.01; done\n")
    fake.chmod(0o755)
    demo_box._foldd = str(fake)

    def journey_of(process: subprocess.Popen[bytes]) -> None:
        while not ready.exists():
            assert process.poll() is None

    if fails:
        with pytest.raises(Unavailable, match="status 5"), demo_box.daemon() as process:
            journey_of(process)
    else:
        with demo_box.daemon() as process:
            journey_of(process)
    assert process.returncode is not None


def test_the_journey_needs_neither_torch_nor_scikit_learn_itself() -> None:
    """The command line imports it, and a supervisor must never have torch."""
    program = (
        "import sys, foldd.daemon.demo.journey; "
        "print(sorted({'torch', 'sklearn', 'onnxruntime', 'foldd.runtime'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_an_interrupted_demo_leaves_no_daemon_behind(demo_box: box.Box, tmp_path: Path) -> None:
    fake = tmp_path / "foldd"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    demo_box._foldd = str(fake)
    with pytest.raises(KeyboardInterrupt), demo_box.daemon() as process:
        raise KeyboardInterrupt
    assert process.returncode is not None
