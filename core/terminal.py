"""The terminal: standard output whose reader, `head` say, may have seen enough before all is told; sizes as people read
them; and what is wrong with an option."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable
from typing import Any


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


class CommandParser(argparse.ArgumentParser):
    """A subcommand's options. An unknown one is told with the usage of the subcommand, not with that of them all."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def in_bytes(count: float) -> str:
    """A number of bytes as people read it: `36.3 kB`, `12.4 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.99995 * size:  # what would be written as 1000.0 of the next
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
