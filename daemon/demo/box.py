"""The demo's edge box: the real commands in processes of their own, as a user would type them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from foldd.core.errors import BadSetup, Unavailable

STOP_SECONDS = 30.0
COMMAND_SECONDS = 120.0
_ASK_SECONDS = 1.0  # between two questions: each is a process, and the fold wants the core
_LOOK_SECONDS = 0.05  # between two looks at `current`, which cost nothing


def command(name: str) -> str:
    """The path of an installed command, the one beside this Python first.

    Raises:
        BadSetup: `no-command`.
    """
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise BadSetup(
            "no-command", f"There is no command {name}.", remedy="Install foldd: `pip install 'foldd[demo]'`."
        )
    return found


def call(arguments: Sequence[str]) -> str:
    """Runs a command to its end and returns what it printed.

    Raises:
        Unavailable: `command-failed`, with what it said, or `too-slow`.
    """
    line = " ".join([Path(arguments[0]).name, *arguments[1:]])
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable("too-slow", f"`{line}` was not done in {COMMAND_SECONDS:.0f} s.") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise Unavailable("command-failed", f"`{line}` ended with status {done.returncode}:\n{said}")
    return done.stdout


class Box:
    """One configuration and its state directory."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config.toml"
        self.state = folder / "state"
        self.log = folder / "daemon.log"
        self._scratch = folder / "answers.npy"
        self._foldd, self._runtime = command("foldd"), command("foldd-runtime")

    def foldd(self, *arguments: str) -> str:
        verb, *rest = arguments
        return call([self._foldd, verb, "--config", str(self.config), *rest])

    def status(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.foldd("status", "--json"))
        return facts

    def history(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.foldd("history", "--json"))
        return rows

    def infer(self, task: str, images: Path, *, generation: int) -> np.ndarray:
        """Logits [n, classes] from the runtime, which must answer from the generation that is expected.

        Raises:
            Unavailable: `command-failed`, or `old-generation`.
        """
        where = ["--state", str(self.state), "--task", task, "--input", str(images), "--output", str(self._scratch)]
        said = json.loads(call([self._runtime, "infer", *where, "--json"]))
        if said["generation"] != generation:
            raise Unavailable(
                "old-generation", f"The runtime answers from generation {said['generation']}, not from {generation}."
            )
        logits: np.ndarray = np.load(self._scratch, allow_pickle=False)
        self._scratch.unlink()
        return logits

    def drop(self, bundle: Path) -> None:
        """Moves a finished bundle into the inbox, in one rename."""
        bundle.rename(self.state / "inbox" / bundle.name)

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """`foldd run`, stopped with SIGTERM at the end.

        Raises:
            Unavailable: `daemon-failed` where it does not end with status 0 then.
        """
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [self._foldd, "run", "--config", str(self.config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            raise Unavailable(
                "daemon-failed", f"The daemon ended with status {process.returncode}. {self._last_words()}"
            )

    def wait(
        self,
        process: subprocess.Popen[bytes],
        until: Callable[[dict[str, Any]], bool],
        *,
        seconds: float,
        show: Callable[[dict[str, Any]], None] = lambda facts: None,
    ) -> dict[str, Any]:
        """Asks `foldd status` until the answer is the one that is waited for.

        Raises:
            Unavailable: `daemon-failed`, `fold-failed` or `too-slow`.
        """
        deadline = time.monotonic() + seconds
        while True:
            if process.poll() is not None:
                raise Unavailable(
                    "daemon-failed", f"The daemon ended with status {process.returncode}. {self._last_words()}"
                )
            facts = self.status()
            if facts["quarantined"] or facts["last_error"]:  # good bundles on a good box: it should have neither
                raise Unavailable("fold-failed", f"The daemon could not fold: {facts['last_error']} {self._look()}")
            if until(facts):
                return facts
            if time.monotonic() > deadline:
                raise Unavailable("too-slow", f"Nothing new in {seconds:.0f} s: {json.dumps(facts)}. {self._look()}")
            show(facts)
            self._pause(process)

    def _pause(self, process: subprocess.Popen[bytes]) -> None:
        """Until it is time to ask again, `current` has moved or the daemon is gone."""
        deadline, before = time.monotonic() + _ASK_SECONDS, self._current()
        while time.monotonic() < deadline and self._current() == before and process.poll() is None:
            time.sleep(_LOOK_SECONDS)

    def _current(self) -> str | None:
        with suppress(OSError):
            return os.readlink(self.state / "current")
        return None

    def _last_words(self) -> str:
        return "Its last words:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def _look(self) -> str:
        return f"See {self.state / 'quarantine'} and {self.log}."


def train(folder: Path) -> None:
    """Runs `build` in a process of its own, which shows its progress itself.

    Raises:
        Unavailable: `training-failed`.
    """
    done = subprocess.run([sys.executable, "-m", "foldd.daemon.demo.build", str(folder)], check=False)
    if done.returncode:
        raise Unavailable("training-failed", f"Training the demo's tasks ended with status {done.returncode}.")
