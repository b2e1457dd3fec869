"""What `foldd status` and `foldd history` tell, read beside the daemon or without one."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

from foldd.core.manifest import read_manifest
from foldd.daemon.config import Config
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, GenerationRow, Ledger
from foldd.daemon.lock import holder
from foldd.daemon.memory import rss_bytes

_SHOWN = 5  # of what was set aside
_STARTING_SECONDS = 10.0
_SILENT = "The daemon runs and cannot say how it is: its disk may be full. Its log tells."


def status(config: Config) -> dict[str, Any]:
    """How things stand; `rss_bytes` is the supervisor's.

    `state`: `idle`, `folding`, `waiting` (to try again after `last_error`) or `stopped`. `set_aside`: the newest few of
    what was quarantined. `conflicts`: task → share of its decisions that the current generation kept, where it is low.

    Raises:
        BadSetup: `not-initialised`.
    """
    layout = Layout(config.root)
    ledger = Ledger(layout.ledger, read_only=True)
    try:
        current = ledger.current()
        pid = holder(layout.lock)
        live = _live(layout) if pid else {}
        # It writes `status.json` as soon as it has started, and takes it away when it can be written no more.
        silent = bool(pid) and not live and time.time() - layout.lock.stat().st_mtime > _STARTING_SECONDS
        held = [_held(arrival) for arrival in ledger.arrivals("held")]
        queue = len(ledger.arrivals("queued", "folding"))
        quarantined = sum(1 for _ in layout.quarantine.iterdir()) if layout.quarantine.is_dir() else 0
        set_aside = [_held(arrival) for arrival in ledger.arrivals("quarantined")[: -_SHOWN - 1 : -1]]
        tasks = list(read_manifest(current.manifest).manifest.tasks) if current else []
        return {
            "state": live.get("state", "waiting" if silent else "idle") if pid else "stopped",
            "generation": current.generation if current else None,
            "tasks": tasks,
            "queue_depth": queue,
            "folding": live.get("folding"),
            "held": held,
            "quarantined": quarantined,
            "set_aside": set_aside,
            "conflicts": _conflicts(layout, current),
            "last_error": live.get("last_error", _SILENT if silent else None),
            "free_bytes": shutil.disk_usage(layout.root).free,
            "pid": pid,
            "rss_bytes": rss_bytes(pid) if pid else None,
            "config_digest": config.digest,
            "state_directory": str(layout.root),
        }
    finally:
        ledger.close()


def history(config: Config) -> list[dict[str, Any]]:
    """Every generation, oldest first.

    Raises:
        BadSetup: `not-initialised`.
    """
    ledger = Ledger(Layout(config.root).ledger, read_only=True)
    try:
        return [_entry(row) for row in ledger.generations()]
    finally:
        ledger.close()


def _entry(row: GenerationRow) -> dict[str, Any]:
    return {
        "generation": row.generation, "parent": row.parent, "task": row.task, "method": row.method,
        "checkpoint_sha256": row.checkpoint_sha256, "artifact_sha256": row.artifact_sha256,
        "state_sha256": row.state_sha256, "config_digest": row.config_digest, "scores": row.scores,
        "seconds": row.seconds, "peak_rss_bytes": row.peak_rss_bytes, "created": row.created,
    }  # fmt: skip


def _conflicts(layout: Layout, current: GenerationRow | None) -> dict[str, float]:
    if current is None:
        return {}
    try:
        report = json.loads((layout.generation(current.generation) / "report.json").read_bytes())
    except (OSError, ValueError):
        return {}
    conflicts: dict[str, float] = report.get("conflicts", {})
    return conflicts


def _held(arrival: Arrival) -> dict[str, Any]:
    error = arrival.error or {}
    return {"id": arrival.sha256[:12], "file": arrival.name, "code": error.get("code"), "what": error.get("what")}


def _live(layout: Layout) -> dict[str, Any]:
    try:
        live = json.loads(layout.live.read_text())
    except (OSError, ValueError):
        return {}
    return live if isinstance(live, dict) else {}
