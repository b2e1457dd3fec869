"""The slot: the session that serves now, and how the next one takes its place without missing a request.

Load beside, verify, warm up, swap one reference, let go of the old one (TensorFlow Serving's order). A request
keeps the session that it took, so that it is answered by one generation from beginning to end.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import numpy as np

from foldd.core.digests import sha256_file
from foldd.core.errors import BadManifest, FolddError, Unavailable
from foldd.core.manifest import Manifest, read_manifest, verify_manifest
from foldd.core.signatures import PublicIdentity
from foldd.runtime.session import Session

log = logging.getLogger("foldd.runtime")


class SwapPolicy(StrEnum):
    """What a swap may cost in memory; both keep serving throughout.

    `AVAILABILITY` keeps the previous session for an instant rollback: two models at rest, three while swapping.
    `MEMORY` lets it go and loads it again from disk for a rollback: one at rest, two while swapping.
    """

    AVAILABILITY = "availability"
    MEMORY = "memory"


class Slot:
    """Serves what `current` in a directory points to. The directory is a daemon's state or a device's store."""

    def __init__(
        self,
        directory: Path,
        trusted: Iterable[PublicIdentity] | None = None,
        *,
        policy: SwapPolicy = SwapPolicy.AVAILABILITY,
        threads: int = 0,
    ) -> None:
        """
        Args:
            trusted: whose signature a manifest must have; None where whoever can write the directory is trusted.
            threads: see `Session`.
        """
        self._directory = directory
        self._trusted = None if trusted is None else tuple(trusted)
        self._policy, self._threads = policy, threads
        self._active: Session | None = None
        self._active_target: str | None = None
        self._previous: Session | None = None
        self._previous_target: str | None = None
        # What failed, or was rolled back from, and is not tried again; a store that mends it makes a new folder.
        self._refused: tuple[str, int, int] | None = None
        self._lock = threading.Lock()  # one swap at a time; requests never take it
        self.last_error: FolddError | None = None

    @property
    def session(self) -> Session:
        """The session that serves now.

        Raises:
            Unavailable: `no-generation`.
        """
        session = self._active
        if session is None:
            raise self.last_error or Unavailable(
                "no-generation",
                f"There is no generation in {self._directory}.",
                why="nothing has been folded or fetched yet.",
                remedy="Drop a checkpoint at the daemon, or run `foldd-runtime fetch`.",
            )
        return session

    @property
    def generation(self) -> int | None:
        """Number of the generation that serves now."""
        session = self._active
        return None if session is None else session.generation

    def infer(self, task: str, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """(logits [n, classes], the generation that gave them).

        Raises:
            Unavailable: `no-generation`, `inference-failed`.
            BadRequest: `unknown-task`, `wrong-shape`, `wrong-type`.
        """
        session = self.session
        return session.infer(task, inputs), session.generation

    def refresh(self) -> bool:
        """Swaps if `current` moved; whether it did. What is wrong with a new generation is in `last_error`.

        A new generation that fails keeps the old one serving; it is tried again only where that may help. At a cold
        start with nothing to keep, the newest older generation that works is taken.
        """
        with self._lock:
            target = self._read_link()
            if target is None or target == self._active_target or (stamp := self._stamp(target)) == self._refused:
                return False
            try:
                self._swap(target)
                self.last_error, self._refused = None, None
            except FolddError as error:
                if self.last_error is None or self.last_error.what != error.what:
                    log.error("generation at %s is not taken: %s", target, error)
                self.last_error = error
                if not error.retry:
                    self._refused = stamp
                return self._active is None and self._fall_back(target)
            return True

    def rollback(self) -> int:
        """Goes back to the generation before; its number. `current` counts again as soon as it moves on.

        Raises:
            Unavailable: `no-previous`.
            BadManifest: it is on disk no longer as it was.
        """
        with self._lock:
            if self._previous_target is None:
                raise Unavailable("no-previous", "There is no generation to go back to.")
            session = self._previous or self._load(self._previous_target)
            self._refused = None if self._active_target is None else self._stamp(self._active_target)
            self._active, self._active_target = session, self._previous_target
            self._previous = self._previous_target = None
            _trim()
            return session.generation

    def _swap(self, target: str) -> None:
        if self._policy is SwapPolicy.MEMORY:
            self._previous = None
            _trim()
        session = self._load(target)
        if self._policy is SwapPolicy.AVAILABILITY:
            self._previous = self._active
        self._previous_target, self._active_target = self._active_target, target
        self._active = session  # the swap: one reference
        _trim()

    def _fall_back(self, failed: str) -> bool:
        folders = sorted((self._directory / "generations").glob("[0-9]*"), reverse=True)
        for folder in folders:
            target = f"generations/{folder.name}"
            if target != failed:
                with contextlib.suppress(FolddError):
                    self._swap(target)
                    return True
        return False

    def _read_link(self) -> str | None:
        try:
            return os.readlink(self._directory / "current").rstrip("/")
        except OSError:
            return None  # a directory that is gone for a moment must not unload anything

    def _stamp(self, target: str) -> tuple[str, int, int]:
        try:
            stat = (self._directory / target).stat()
        except OSError:
            return target, 0, 0
        return target, stat.st_ino, stat.st_mtime_ns

    def _load(self, target: str) -> Session:
        folder = self._directory / target
        try:
            data = (folder / "manifest.json").read_bytes()
            manifest = read_manifest(data).manifest if self._trusted is None else verify_manifest(data, self._trusted)
            check_artifact(folder / "model.onnx", manifest)
        except OSError as error:
            raise Unavailable("artifact-unreadable", f"{error.filename} cannot be read: {error.strerror}.") from error
        session = Session(folder / "model.onnx", manifest, threads=self._threads)
        session.warm_up()
        return session


def check_artifact(path: Path, manifest: Manifest) -> None:
    """Holds a file against the manifest.

    Raises:
        BadManifest: `artifact-size`, `artifact-digest`.
        OSError: it cannot be read.
    """
    entry, size = manifest.artifact, path.stat().st_size
    if size != entry.bytes:
        raise BadManifest(
            "artifact-size",
            f"The artifact of generation {manifest.generation} has {size} bytes, its manifest says {entry.bytes}.",
            why="it was cut off, or swapped for another one.",
        )
    if (digest := sha256_file(path)) != entry.sha256:
        raise BadManifest(
            "artifact-digest",
            f"The artifact of generation {manifest.generation} has digest {digest[:16]}…, "
            f"its manifest says {entry.sha256[:16]}….",
            why="it was altered, damaged, or swapped for another one.",
        )


def _trim() -> None:
    """Gives a dropped session's memory back: glibc keeps 110 of 271 MB otherwise (seen with a 21 MB model)."""
    with contextlib.suppress(OSError, AttributeError):  # not on musl
        ctypes.CDLL(None).malloc_trim(0)
