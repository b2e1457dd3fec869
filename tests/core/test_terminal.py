"""A reader of standard output that goes away early is no error; sizes as people read them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from foldd.core.terminal import in_bytes, tell

PROGRAM = """
import sys
from foldd.core.terminal import tell
def command():
    for line in range(int(sys.argv[1])):
        print(line)
    return 5
sys.exit(tell(command))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_goes_away_is_no_error(lines, unbuffered):
    """Three lines fail only when the buffer is flushed at the end, many (or all) in the middle of a `print`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(lines)],
        stdout=writing, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_status_is_the_commands_own_where_everything_was_read():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "100000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (5, 100_000, "")


def test_another_broken_pipe_is_told():
    def command() -> int:
        raise BrokenPipeError("a socket's")

    with pytest.raises(BrokenPipeError, match="socket"):
        tell(command)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (36_318, "36.3 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (5e9, "5.0 GB"),
    ],
)
def test_sizes(count, text):
    assert in_bytes(count) == text
