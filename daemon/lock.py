"""One daemon to a state directory: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldd.core.errors import BadSetup

_PATIENCE_SECONDS = 0.5


@contextmanager
def daemon_lock(path: Path) -> Iterator[None]:
    """Holds the state directory.

    Raises:
        BadSetup: `already-running`.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            _take(handle)
        except BlockingIOError as error:
            raise BadSetup(
                "already-running",
                f"Process {holder(path) or '(unknown)'} runs on {path.parent} already.",
                remedy="Stop it first, or give this one another state directory.",
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> None:
    """Takes the lock; tries for a moment, because `foldd status` touches it to see whether it is free."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def holder(path: Path) -> int | None:
    """The process that holds the lock, or None. Never blocks, never takes the lock from anybody for long."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(handle, 32).strip()
            return int(text) if text.isdigit() else None
        return None
    finally:
        os.close(handle)
