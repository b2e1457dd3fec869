"""What people read: standard output whose reader, `head` say, may have seen enough before all is told; sizes."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable


def tell(command: Callable[[], int]) -> int:
    """Runs a command and sees its output through to the reader.

    A reader that goes away early got what it wanted: the command is done (0), whatever else it had to tell, as with
    ripgrep. Nothing is left in Python's buffer then, which would fail once more, loudly, at the interpreter's exit.

    Returns:
        the command's exit status, or 0 where the reader went away.

    Raises:
        BrokenPipeError: of another pipe or socket than standard output.
    """
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        output = sys.stdout.fileno()
        if not _reader_is_gone(output):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
        return 0
    return status


def _reader_is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are told whatever is asked for
    return bool(poll.poll(0))


def in_bytes(count: float) -> str:
    """A number of bytes as people read it: `36.3 kB`, `12.4 MB`."""
    if count < 1000:
        return f"{count:.0f} bytes"
    return f"{count / 1e3:.1f} kB" if count < 999_950 else f"{count / 1e6:.1f} MB"
