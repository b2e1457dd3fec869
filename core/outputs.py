"""Where a command is told to write: looked at before the work, so that nothing but an older result is ever replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from foldd.core.errors import BadSetup


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Whether a file may be put in place under a name; an older regular file there is replaced.

    Raises:
        BadSetup: `no-such-folder`, `cannot-write`, `output-exists`, `output-is-input`.
    """
    check_folder(output)
    if output.is_dir():
        raise BadSetup("output-exists", f"{output} is a folder that exists already.", remedy="Name a new one.")
    if output.exists() and not output.is_file():
        raise BadSetup(
            "output-exists",
            f"{output} is a device, a pipe or a socket, and a file put in its place would remove it.",
            remedy="Write to a file.",
        )
    check_not_input(output, inputs)


def check_folder(output: Path) -> None:
    """Whether something can be made in the folder of a path.

    Raises:
        BadSetup: `no-such-folder`, `cannot-write`.
    """
    folder = output.absolute().parent
    if not folder.is_dir():
        raise BadSetup(
            "no-such-folder",
            f"There is no folder {folder} to write into.",
            remedy="Make it with mkdir, or check the path.",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadSetup(
            "cannot-write",
            f"{output} cannot be written: nothing may be made in {folder}.",
            why="the folder is another user's, or its disk is mounted for reading only.",
            remedy="Write elsewhere.",
        )


def check_not_input(output: Path, inputs: Iterable[Path]) -> None:
    """
    Raises:
        BadSetup: `output-is-input`.
    """
    if output.exists() and any(path.exists() and output.samefile(path) for path in inputs):
        raise BadSetup("output-is-input", f"{output} is one of the inputs.", remedy="Write to another file.")
