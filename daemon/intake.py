"""From the inbox to the work folder: claim, deduplicate, quarantine. Every step can be cut and done again.

    inbox/NAME ──▶ work/claim/bundle ──▶ work/<sha256>/bundle ──▶ folded, or quarantine/*/NAME

A file is taken out of the inbox before it is looked at: what is hashed cannot be swapped under our hands any more.
`origin.json` beside it keeps the name that it was dropped under.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foldd.core.digests import sha256_file
from foldd.core.errors import BadCheckpoint
from foldd.core.files import place, sync_directory, sync_file, write_file
from foldd.daemon.crashpoints import crash_point
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, Ledger, now
from foldd.daemon.names import REASON, printable, safe
from foldd.daemon.settle import Settled

log = logging.getLogger("foldd.intake")

BUNDLE, ORIGIN = "bundle", "origin.json"


class Intake:
    """Moves settled files out of the inbox, under the ledger's eyes.

    Args:
        beat: called while a file is being hashed, about once a MiB; may raise to break off.
    """

    def __init__(
        self,
        layout: Layout,
        ledger: Ledger,
        *,
        max_bundle_bytes: int,
        quarantine_bytes: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout, self._ledger, self._beat = layout, ledger, beat
        self._max, self._quarantine_bytes = max_bundle_bytes, quarantine_bytes
        self._complained: set[Path] = set()

    def claim(self, settled: Settled, *, source: str = "folder") -> None:
        """Takes one entry out of the inbox: queues it, drops it as a duplicate, or sets it aside.

        An entry that cannot be moved stays where it is and is complained of once.
        """
        name, claim = printable(settled.path.name), self._layout.claim
        self._finish_claim()
        claim.mkdir()
        sync_directory(self._layout.work)
        origin = {"name": name, "source": source, "settle_seconds": settled.waited_seconds}
        write_file(claim / ORIGIN, _json(origin))
        try:
            place(settled.path, claim / BUNDLE)
        except FileNotFoundError:
            return  # taken back by whoever dropped it
        except OSError as error:
            if settled.path not in self._complained:
                self._complained.add(settled.path)
                log.warning("%s cannot be taken out of the inbox: %s", name, error.strerror)
            return
        crash_point("claim.taken", self._layout.root)
        self._resume()

    def _finish_claim(self) -> None:
        """Goes on with a claim that was cut, and leaves `work/claim` free."""
        if os.path.lexists(self._layout.claim / BUNDLE):
            self._resume()
        shutil.rmtree(self._layout.claim, ignore_errors=True)

    def _resume(self) -> None:
        """Goes on with what lies in `work/claim`."""
        claim, bundle = self._layout.claim, self._layout.claim / BUNDLE
        origin = _origin(claim)
        name = origin["name"]
        info = bundle.lstat()
        if not stat.S_ISREG(info.st_mode):
            self._set_aside(
                name,
                BadCheckpoint(
                    "not-a-file",
                    f"{name} is no regular file.",
                    why="a folder, a link or a pipe was put into the inbox.",
                    remedy="Drop the .safetensors file itself; links are not followed.",
                ),
            )
            return
        if info.st_size > self._max:
            self._set_aside(
                name,
                BadCheckpoint(
                    "too-large",
                    f"{name} is {info.st_size} bytes, the limit is {self._max}.",
                    remedy="Raise intake.max_bundle_bytes if such files are meant to come.",
                ),
            )
            return
        if info.st_nlink > 1:
            _make_own(bundle)  # a hard link elsewhere could change it after it was verified
        try:
            sha256 = sha256_file(bundle, self._beat)
        except PermissionError:
            self._set_aside(
                name,
                BadCheckpoint(
                    "not-readable",
                    f"{name} cannot be read by the daemon.",
                    why="its owner allows nobody else to.",
                    remedy="Give the daemon's user read access, and drop it again.",
                ),
            )
            return
        self._queue(sha256, info.st_size, origin)

    def _queue(self, sha256: str, size: int, origin: dict[str, Any]) -> None:
        name, known, item = origin["name"], self._ledger.arrival(sha256), self._layout.work_item(sha256)
        if known is not None and known.state != "quarantined":
            shutil.rmtree(self._layout.claim)
            self._ledger.note_duplicate(sha256)
            log.info("%s is a duplicate of %s (%s); it is not folded again", name, known.name, known.state)
            return
        if item.exists():
            shutil.rmtree(item)  # an older copy of the same bytes, left by a crash
        sync_file(self._layout.claim / BUNDLE)  # whoever dropped it may not have
        place(self._layout.claim, item)
        crash_point("claim.renamed", self._layout.root)
        self._enter(sha256, size, origin, known)
        crash_point("claim.queued", self._layout.root)

    def _enter(self, sha256: str, size: int, origin: dict[str, Any], known: Arrival | None) -> None:
        """Writes the row of a file that lies in its work folder."""
        if known is None:
            self._ledger.add(sha256, origin["name"], origin["source"], size, origin["settle_seconds"])
            return
        self._ledger.requeue(sha256, origin["name"], origin["source"])
        shutil.rmtree(self._layout.quarantine / _folder(known), ignore_errors=True)
        log.info("%s was quarantined before; it is tried again", origin["name"])

    def file_of(self, arrival: Arrival) -> Path:
        """The claimed file of an arrival."""
        return self._layout.work_item(arrival.sha256) / BUNDLE

    def quarantine(self, arrival: Arrival, error: dict[str, Any]) -> None:
        """Marks a checkpoint as bad and sets its file aside with the reason."""
        self._ledger.quarantine(arrival.id, error)
        crash_point("quarantine.marked", self._layout.root)
        self._finish_quarantine(arrival, error)
        crash_point("quarantine.moved", self._layout.root)
        log.warning("%s was set aside (%s): %s", arrival.name, error["code"], error["what"])

    def hold(self, arrival: Arrival, error: dict[str, Any]) -> None:
        """Keeps a checkpoint in its work folder until somebody decides about it."""
        self._ledger.hold(arrival.id, error)
        shutil.rmtree(self._layout.stage(arrival.sha256), ignore_errors=True)
        log.warning("%s is held (%s, %s): %s", arrival.name, error["code"], arrival.sha256[:12], error["what"])

    def retry(self, arrival: Arrival) -> None:
        """Queues what is held or was set aside; anything else stays as it is."""
        if arrival.state == "held":
            self._ledger.release(arrival)
            log.info("%s is folded all the same, as ordered", arrival.name)
        elif arrival.state == "quarantined":
            aside, item = self._layout.quarantine / _folder(arrival) / safe(arrival.name), self.file_of(arrival)
            if aside.exists():
                item.parent.mkdir(exist_ok=True)
                sync_directory(self._layout.work)
                write_file(item.parent / ORIGIN, _json({"name": arrival.name, "source": arrival.source}))
                place(aside, item)
            if not item.exists():
                log.warning("%s cannot be tried again: its file is gone", arrival.name)
                return
            self._ledger.requeue(arrival.sha256, arrival.name, arrival.source)
            shutil.rmtree(aside.parent, ignore_errors=True)
            log.info("%s is tried again, as ordered", arrival.name)

    def forget(self, arrival: Arrival) -> None:
        """Drops a checkpoint that waits, is held or was set aside, file and row, as if it had never come."""
        if arrival.state in ("folding", "folded"):
            log.warning("%s is %s: it cannot be forgotten", arrival.name, arrival.state)
            return
        self._ledger.forget(arrival.sha256)
        shutil.rmtree(self._layout.work_item(arrival.sha256), ignore_errors=True)
        shutil.rmtree(self._layout.quarantine / _folder(arrival), ignore_errors=True)
        log.info("%s is forgotten, as ordered", arrival.name)

    def _finish_quarantine(self, arrival: Arrival, error: dict[str, Any]) -> None:
        """Moves the file of a row that is marked; doing it again changes nothing."""
        target = self._layout.quarantine / _folder(arrival)
        target.mkdir(exist_ok=True)
        sync_directory(self._layout.quarantine)
        reason = error | {
            "file": arrival.name, "source": arrival.source, "sha256": arrival.sha256, "bytes": arrival.bytes,
            "attempts": arrival.attempts, "arrived": arrival.arrived, "quarantined": now(),
        }  # fmt: skip
        write_file(target / REASON, _json(reason))
        if self.file_of(arrival).exists():
            place(self.file_of(arrival), target / safe(arrival.name))
        shutil.rmtree(self._layout.work_item(arrival.sha256), ignore_errors=True)
        self._limit_quarantine()

    def recover(self) -> None:
        """Brings the work folder and the ledger into agreement after a crash, or after a step that failed."""
        for arrival in self._ledger.arrivals("folding"):
            # The daemon died or a disk failed, not the worker: that is no fault of the checkpoint.
            self._ledger.retreat(arrival.id, refund=True)
        for item in sorted(self._layout.work.iterdir()):
            if re.fullmatch(r"[0-9a-f]{64}", item.name):
                self._recover_item(item)
        self._finish_claim()
        for arrival in self._ledger.arrivals("queued"):
            if not self.file_of(arrival).exists():
                log.error("%s (%s) is queued, but its file is gone", arrival.name, arrival.sha256[:12])
                self._ledger.forget(arrival.sha256)

    def _recover_item(self, item: Path) -> None:
        known, bundle = self._ledger.arrival(item.name), item / BUNDLE
        if not bundle.exists() or (known is not None and known.state == "folded"):
            shutil.rmtree(item)
        elif known is None or (known.state == "quarantined" and self._was_moved(known)):
            self._enter(item.name, bundle.stat().st_size, _origin(item), known)
        elif known.state == "quarantined":
            self._finish_quarantine(known, known.error or {})

    def _was_moved(self, arrival: Arrival) -> bool:
        """Whether quarantine has the file already: then the one in the work folder was dropped anew."""
        return (self._layout.quarantine / _folder(arrival) / safe(arrival.name)).exists()

    def _set_aside(self, name: str, error: BadCheckpoint) -> None:
        """Quarantines what lies in `work/claim` and never got as far as the ledger."""
        target = self._layout.quarantine / f"{now().replace(':', '')}-{safe(name)}"
        target.mkdir(exist_ok=True)
        sync_directory(self._layout.quarantine)
        write_file(target / REASON, _json(error.as_dict() | {"file": name, "quarantined": now()}))
        place(self._layout.claim / BUNDLE, target / safe(name))
        shutil.rmtree(self._layout.claim)
        log.warning("%s was set aside (%s): %s", name, error.code, error.what)
        self._limit_quarantine()

    def _limit_quarantine(self) -> None:
        """Removes the oldest set-aside files beyond the limit; their reasons stay."""
        kept = 0
        for folder in sorted(self._layout.quarantine.iterdir(), key=lambda f: f.lstat().st_mtime, reverse=True):
            for entry in folder.iterdir() if folder.is_dir() else []:
                if entry.name == REASON or entry.is_symlink() or not entry.is_file():
                    continue
                kept += entry.stat().st_size
                if self._quarantine_bytes and kept > self._quarantine_bytes:
                    log.warning("removing %s: quarantine is over its limit", entry)
                    entry.unlink()


def _make_own(path: Path) -> None:
    copy = path.with_name(f"{path.name}.copy")
    shutil.copyfile(path, copy)
    sync_file(copy)
    place(copy, path)


def _origin(folder: Path) -> dict[str, Any]:
    try:
        origin: dict[str, Any] = json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError):
        origin = {"name": "unnamed.safetensors", "source": "folder", "settle_seconds": 0.0}
    return origin


def _folder(arrival: Arrival) -> str:
    return f"{arrival.sha256[:12]}-{safe(arrival.name)}"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
