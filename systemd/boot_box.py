"""What the boot test sees of the booted box, and does to it, as its users and its administrator would."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATE = Path("/var/lib/foldd")
INBOX = STATE / "inbox"
DAEMON, RUNTIME = "foldd.service", "foldd-runtime.service"
URL = "http://127.0.0.1:8470"
DROPPER = "dropper"  # an ordinary user in the group foldd-drop


class Failed(Exception):
    """Something was not as it should be; the message says what."""


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise Failed(f"{shlex.join(command)}: status {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done


def show(unit: str, key: str) -> str:
    return run("systemctl", "show", unit, "--value", "-p", key).stdout.strip()


def main_pid(unit: str) -> int:
    return int(show(unit, "MainPID"))


def restarts(unit: str) -> int:
    return int(show(unit, "NRestarts"))


def active(unit: str) -> bool:
    return show(unit, "ActiveState") == "active"


def wait(what: str, condition: Callable[[], Any], seconds: float, *, every: float = 0.05) -> float:
    """Waits until the condition holds; how long that took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise Failed(f"{what}: not within {seconds:g} s")
        time.sleep(every)
    return round(time.monotonic() - started, 2)


def back(unit: str, before: int) -> bool:
    """Whether systemd started it again, and it is ready."""
    return restarts(unit) > before and active(unit)


def generation() -> int:
    try:
        return int(os.readlink(STATE / "current").rpartition("/")[2])
    except FileNotFoundError:
        return 0


def folding(name: str) -> bool:
    """Whether that file is being folded now; the status of the one before may stand for a moment longer."""
    try:
        live = json.loads((STATE / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return live["folding"] is not None and live["folding"]["file"] == name and workers() != []


def workers() -> list[int]:
    parent = main_pid(DAEMON)
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in text.split()]


def drop(source: Path) -> None:
    """As users do it: with a private umask, written in place by somebody who is not the daemon."""
    command = f"umask 077; cat {source} > {INBOX / source.name}"
    run("runuser", "-u", DROPPER, "--", "sh", "-c", command)


def ask(path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(URL + path, data=body, timeout=10) as answer:  # noqa: S310 - http, written above
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError as error:
        return 0, {"error": str(error)}


def served() -> int:
    return ask("/v1/status")[1].get("generation") or 0
