"""The `foldd` command.

Exit status: 0 done; 1 it was done, and the answer is no (a checkpoint was set aside, a check failed); 2 it could not
be done, with the reason on standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import sqlite3
import sys
from pathlib import Path

import foldd
from foldd.core.errors import FolddError
from foldd.core.terminal import CommandParser, tell
from foldd.daemon.commands import bundles, decide, merge, service, show, transfer

_SPINS = "1000"
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def parser() -> argparse.ArgumentParser:
    """The whole command line; a test walks it."""
    top = argparse.ArgumentParser(prog="foldd", description="Continual model merging for edge devices.")
    top.add_argument("--version", action="version", version=f"foldd {foldd.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for group in (service, show, decide, bundles, merge, transfer):
        group.add(commands)
    demo = commands.add_parser("demo", help="the main job on real data, start to end, in a few minutes")
    demo.add_argument("--directory", type=Path, default=Path("demo-state"), help="where to work (default: demo-state)")
    demo.set_defaults(call=_demo)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    _log()
    _spin_less()
    try:
        return tell(lambda: arguments.call(arguments))
    except FolddError as error:
        print(f"foldd: {error}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.Error) as error:
        print(f"foldd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _spin_less() -> None:
    """Has threads that wait for each other sleep after microseconds; libgomp's default is milliseconds of spinning.

    As fast on an idle machine, and several times as fast where other programs need the cores, onnxruntime for one
    (docs/operations.md). It is read when torch is loaded, by the worker too; what the operator set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _demo(arguments: argparse.Namespace) -> int:
    from foldd.daemon.demo.journey import run

    return run(arguments.directory)


class _Journal(logging.Formatter):
    """Lines with journald's priority in front; the journal has its own clock."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n  ")
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{text}"


def _log() -> None:
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_Journal("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
