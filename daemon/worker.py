"""The worker: imports torch, folds what it is given, and exits when there is no more. One process, no sockets.

It dies with its supervisor, and it never writes to the ledger: everything it does lies in its stage folder until
the supervisor commits it, so killing it at any moment loses nothing but time.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from foldd.core.errors import BadInput, BadSetup, FolddError, Held, Refused
from foldd.daemon.jobs import Failed, Hello, Staged, decode_job, encode_line
from foldd.daemon.layout import Layout
from foldd.daemon.memory import return_freed_memory, rss_bytes

_PR_SET_PDEATHSIG = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}


def main(arguments: list[str]) -> int:
    """`python -m foldd.daemon.worker ROOT PARENT_PID`; jobs on standard input, answers on standard output."""
    root, parent = Path(arguments[0]), int(arguments[1])
    _die_with(parent)
    # Libraries print. Answers go to a copy of standard output, everything else to standard error.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    return _serve(Layout(root), sys.stdin.buffer, answers)


def _serve(layout: Layout, jobs: BinaryIO, answers: BinaryIO) -> int:
    # Late, so that a supervisor that imports this module's neighbours never gets torch.
    import onnx  # noqa: F401 - counted into the baseline like all imports
    import torch

    from foldd.base.store import open_base
    from foldd.core.base_spec import read_base_spec
    from foldd.daemon.pipeline import fold_job

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else all is written twice
    torch.backends.mkldnn.deterministic = True  # type: ignore[assignment]
    baseline = rss_bytes()

    def send(message: msgspec.Struct) -> None:
        answers.write(encode_line(message))

    try:
        # Before the base is opened, or the copy that torch's loader makes would stay as free pieces.
        return_freed_memory(read_base_spec(layout.base / "base.json").float_bytes)
        base = open_base(layout.base)
    except FolddError as error:
        send(Failed("setup", error.as_dict()))
        return 1
    send(Hello(baseline))
    for line in jobs:
        job = decode_job(line)
        answers.write(_answer(lambda job=job: fold_job(job, layout, base, baseline, send)))  # type: ignore[misc]
    return 0


def _answer(work: Callable[[], Staged]) -> bytes:
    """Runs one job and turns every way to fail into an answer, one that cannot be written down included."""
    try:
        return encode_line(work())
    except Held as error:
        failed = Failed("hold", error.as_dict())
    except (BadInput, Refused) as error:
        failed = Failed("input", error.as_dict())
    except BadSetup as error:
        failed = Failed("setup", error.as_dict())
    except FolddError as error:
        failed = Failed("environment" if error.retry else "bug", error.as_dict())
    except OSError as error:
        failed = Failed("environment" if error.errno in _FULL else "bug", _unforeseen(error))
    except Exception as error:  # noqa: BLE001 - a bug must cost one attempt, not the worker
        failed = Failed("bug", _unforeseen(error))
    return encode_line(failed)


def _unforeseen(error: BaseException) -> dict[str, object]:
    return {
        "code": "disk-full" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "unforeseen",
        "what": f"{type(error).__name__}: {error}",
        "why": "",
        "remedy": "",
        "retry": True,
        "traceback": traceback.format_exc(),
    }


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the supervisor dies; checks that it has not died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
