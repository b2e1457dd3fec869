"""The supervisor's handle on its worker: start, hand over a job, read answers without blocking, watch, kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import msgspec

from foldd.daemon.jobs import Answer, Job, decode_answer, encode_line
from foldd.daemon.memory import rss_bytes

_KEPT_LINES = 40
_MAX_LINE_BYTES = 1 << 20


class WorkerProcess:
    """One worker. `answers` and `errors` are file descriptors to select on."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "foldd.daemon.worker", str(root), str(os.getpid())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.answers, self.errors = self._process.stdout.fileno(), self._process.stderr.fileno()
        os.set_blocking(self.answers, False)
        os.set_blocking(self.errors, False)
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)  # of its standard error, for a post-mortem
        self.last_heard = self.started = time.monotonic()
        self.job: Job | None = None
        self.ready = self.reported = False  # has imported everything; has said why it cannot
        self.killed_because = ""
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def hand_over(self, job: Job) -> None:
        """Sends the next job; the worker must be ready."""
        assert self._process.stdin is not None
        self.job, self.started = job, time.monotonic()
        self.last_heard = self.started
        try:
            self._process.stdin.write(encode_line(job))
        except BrokenPipeError:
            self.killed_because = "it was gone before it got its job"

    def read(self) -> list[Answer]:
        """Complete answers that have come so far."""
        self._read_errors()
        try:
            while chunk := os.read(self.answers, 65536):
                self._buffer += chunk
        except BlockingIOError:
            pass
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self.last_heard = time.monotonic()
        if len(self._buffer) > _MAX_LINE_BYTES:
            self.kill("it does not speak the protocol")
            return []
        try:
            return [decode_answer(line) for line in lines]
        except msgspec.MsgspecError:
            self.kill("it does not speak the protocol")
            return []

    def _read_errors(self) -> None:
        try:
            while chunk := os.read(self.errors, 65536):
                self.last_lines.extend(chunk.decode(errors="replace").splitlines())
        except BlockingIOError:
            return

    def check(self, *, memory_bytes: int, fold_seconds: float, stall_seconds: float) -> None:
        """Kills the worker where it is over a limit; a limit of 0 is none."""
        now = time.monotonic()
        if memory_bytes and rss_bytes(self.pid) > memory_bytes:
            self.kill(f"it used more than worker.memory_bytes = {memory_bytes}")
        elif self.job and fold_seconds and now - self.started > fold_seconds:
            self.kill(f"it took longer than worker.fold_seconds = {fold_seconds:g}")
        elif stall_seconds and (self.job or not self.ready) and now - self.last_heard > stall_seconds:
            self.kill(f"it made no progress for worker.stall_seconds = {stall_seconds:g}")

    def kill(self, reason: str) -> None:
        self.killed_because = self.killed_because or reason
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)

    def dismiss(self) -> None:
        """No more jobs: the worker ends by itself, and its memory goes back to the system."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def ended(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""
        return self._process.poll()

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits for the end and closes the pipes; kills a worker that does not end."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill("it did not end when it was dismissed")
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def post_mortem(self) -> str:
        """How it ended, in words."""
        status = self.ended()
        if self.killed_because:
            how = self.killed_because
        elif status is not None and status < 0:
            how = f"it was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += " (out of memory, or somebody's kill -9)"
        else:
            how = f"it ended with status {status}"
        tail = " | ".join(line.strip() for line in list(self.last_lines)[-3:])
        return f"{how}; it last said: {tail}" if tail else how
