"""Places where a test may cut the power.

`FOLDD_CRASH_AT=name` makes the process that reaches the place kill itself with SIGKILL, once per state
directory: a marker file keeps it from happening again. Without the variable a crash point costs one dictionary
look-up.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "FOLDD_CRASH_AT"
SUPERVISOR_POINTS = (
    "claim.taken", "claim.renamed", "claim.queued", "fold.begun", "commit.manifest-written", "commit.blob-placed",
    "commit.generation-placed", "commit.committed", "commit.current-pointed", "publish.announced", "publish.marked",
    "quarantine.marked", "quarantine.moved",
)  # fmt: skip
WORKER_POINTS = (
    "verify", "fold.before", "fold.middle", "fold.after", "quantize", "export.written", "gate", "stage.written",
)  # fmt: skip


def crash_point(name: str, root: Path) -> None:
    """Kills this process if the environment says so and it has not been done before."""
    if os.environ.get(VARIABLE) == name:
        marker = root / f".crashed-at-{name}"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
