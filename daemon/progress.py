"""How far a long step is: one line that is rewritten on a terminal, a few lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_SECONDS = 0.1
_LINE_STEP = 0.25


class Progress:
    """Percent done and time left of one step.

    Args:
        stream: where to write; a terminal gets one line that changes, anything else a line per quarter.
        clock: seconds, rising.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._started = clock()
        self._shown = float("-inf")
        self._quarter = -1

    def update(self, fraction: float, text: str) -> None:
        """Shows `text` with the fraction done, 0 to 1; called as often as one likes."""
        now = self._clock()
        spent = now - self._started
        left = f", {spent * (1 - fraction) / fraction:.0f} s left" if 0.02 < fraction < 1 else ""
        line = f"  {100 * fraction:3.0f} %  {text}{left}"
        if self._terminal:
            if now - self._shown >= _TERMINAL_SECONDS:
                self._shown = now
                self._stream.write(f"\r\x1b[2K{line}")
        elif int(fraction / _LINE_STEP) > self._quarter:
            self._quarter = int(fraction / _LINE_STEP)
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def done(self, text: str = "") -> None:
        """Takes the changing line away and, where there is a text, leaves it in its place."""
        if self._terminal:
            self._stream.write("\r\x1b[2K")
        if text:
            self._stream.write(f"  {text}\n")
        self._stream.flush()
