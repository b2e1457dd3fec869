"""What the running daemon says of itself: `status.json`, rewritten at most once a second, and progress in the log."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("foldd.progress")

_WRITE_SECONDS = 1.0
_LOG_STEP = 0.25
_LOG_AFTER_SECONDS = 5.0  # a fold that is over sooner needs no lines about its progress


class LiveStatus:
    """State, progress and the last error. Not durable on purpose: the ledger is what counts after a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.last_error: str | None = None
        self.waiting = False  # after a failure that is worth repeating
        self._folding: dict[str, Any] | None = None
        self._started = self._written = 0.0
        self._logged = 0.0
        self._last: dict[str, Any] = {}
        self._failed: int | None = None  # why it could not be written the last time

    def begin(self, name: str) -> None:
        self._started, self._logged = time.monotonic(), 0.0
        self.waiting = False
        self._folding = {"file": name, "task": None, "stage": "verify", "fraction": 0.0, "left_seconds": None}

    def progress(self, stage: str, fraction: float, task: str | None) -> None:
        if self._folding is None:
            return
        spent = time.monotonic() - self._started
        left = round(spent * (1 - fraction) / fraction, 1) if fraction > 0.02 else None
        self._folding |= {"stage": stage, "fraction": round(fraction, 3), "task": task, "left_seconds": left}
        if spent > _LOG_AFTER_SECONDS and fraction - self._logged >= _LOG_STEP:
            self._logged = fraction
            log.info("%s: %s, %.0f %%, %.0f s left", self._folding["file"], stage, 100 * fraction, left or 0)

    def finish(self, *, error: str | None = None) -> None:
        """A fold ended, well or with an error; a good one ends the complaint about an earlier one."""
        self._folding, self.last_error = None, error

    def write(self) -> None:
        """Writes if something changed; progress at most once a second, a change of state at once."""
        state = "folding" if self._folding else "waiting" if self.waiting else "idle"
        content = {
            "pid": os.getpid(),
            "state": state,
            "folding": self._folding,
            "last_error": self.last_error,
        }
        if content == self._last:
            return
        turned = content["state"] != self._last.get("state")
        if turned or time.monotonic() - self._written >= _WRITE_SECONDS:
            self._last = json.loads(json.dumps(content))
            self._written = time.monotonic()
            self._put(content)

    def stopped(self) -> None:
        self._path.unlink(missing_ok=True)

    def _put(self, content: dict[str, Any]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.part")
        try:
            temporary.write_text(json.dumps(content))
            temporary.rename(self._path)
        except OSError as error:
            self._path.unlink(missing_ok=True)  # rather nothing than what is not true any more
            self._last = {}
            if error.errno != self._failed:
                log.warning("status.json cannot be written: %s", error)
            self._failed = error.errno
        else:
            self._failed = None
