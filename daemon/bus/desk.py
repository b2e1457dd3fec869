"""Answers requests, without sockets: who may ask, and what is replied."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foldd.core.errors import BadRequest, FolddError
from foldd.core.manifest import read_manifest
from foldd.core.wire import (
    Chunk,
    Data,
    GetArtifact,
    GetManifest,
    ManifestIs,
    Offer,
    Refuse,
    Reply,
    Request,
    decode_request,
)
from foldd.daemon.bus.auth import AllowList
from foldd.daemon.bus.incoming import Incoming
from foldd.daemon.bus.settings import BusSettings

log = logging.getLogger("foldd.bus")

_KEPT_ARTIFACTS = 4  # a device may be in the middle of the one before


@dataclass(frozen=True)
class CurrentGeneration:
    """What is published now."""

    generation: int
    manifest: bytes  # signed, as it stands in manifest.json
    artifact: Path
    artifact_sha256: str

    @classmethod
    def at(cls, directory: Path) -> CurrentGeneration:
        """The generation in `generations/NNNNNN/`.

        Raises:
            BadManifest: its manifest cannot be read.
        """
        data = (directory / "manifest.json").read_bytes()
        manifest = read_manifest(data).manifest
        return cls(manifest.generation, data, directory / "model.onnx", manifest.artifact.sha256)


def current_generation(root: Path) -> CurrentGeneration | None:
    """The generation that `current` of a state directory points to, if there is one."""
    link = root / "current"
    return CurrentGeneration.at(link.resolve()) if link.exists() else None


Answer = tuple[Reply, bytes | None]


class Desk:
    """Takes one request at a time. `submitters` and `devices` are None where the bus is plaintext on loopback."""

    def __init__(
        self,
        settings: BusSettings,
        incoming: Incoming,
        current: Callable[[], CurrentGeneration | None],
        submitters: AllowList | None,
        devices: AllowList | None,
    ) -> None:
        self._settings, self._incoming, self._current = settings, incoming, current
        self._submitters, self._devices = submitters, devices
        self._artifacts: dict[str, Path] = {}
        self.counts = {"requests": 0, "malformed": 0, "denied": 0}

    def answer(self, key: str, header: bytes, payload: bytes | memoryview | None) -> Answer:
        """The reply to a request of the client with this public key; never raises for what a client sent."""
        self.counts["requests"] += 1
        try:
            request = decode_request(header)
        except BadRequest as error:
            self.counts["malformed"] += 1
            return Refuse("", error.code, error.what), None
        try:
            return self._decide(key, request, payload)
        except Exception:  # a ledger that is locked, a disk that fails: one request, not the bus
            log.exception("a request could not be answered")
            sha256 = getattr(request, "sha256", "")
            return Refuse(sha256, "internal", "The daemon failed on this request; its log says more.", retry=True), None

    def _decide(self, key: str, request: Request, payload: bytes | memoryview | None) -> Answer:
        sha256 = getattr(request, "sha256", "")
        match request:
            case Offer() | Chunk() if self._submitters is not None and key not in self._submitters:
                self.counts["denied"] += 1
                return Refuse(sha256, "not-a-submitter", "This key may not send checkpoints."), None
            case GetManifest() | GetArtifact() if self._devices is not None and key not in self._devices:
                self.counts["denied"] += 1
                return Refuse(sha256, "not-a-device", "This key may not fetch generations."), None
            case Offer():
                return self._incoming.offer(request.name, request.size, request.sha256, key, self._sender(key)), None
            case Chunk():
                return self._incoming.write(request.sha256, request.offset, payload or b"", key), None
            case GetManifest():
                return self._manifest()
            case GetArtifact():
                return self._piece(request)
        self.counts["malformed"] += 1
        return Refuse(sha256, "malformed", "This side does not answer such requests."), None

    def published(self) -> CurrentGeneration | None:
        """The current generation, remembered as one that may be fetched; None where there is none."""
        try:
            current = self._current()
        except (FolddError, OSError) as error:
            log.error("the current generation cannot be read: %s", error)
            return None
        if current is not None:
            self._artifacts.pop(current.artifact_sha256, None)
            self._artifacts[current.artifact_sha256] = current.artifact
            while len(self._artifacts) > _KEPT_ARTIFACTS:
                del self._artifacts[next(iter(self._artifacts))]
        return current

    def _sender(self, key: str) -> str:
        # The name stands in a file that the submitter wrote: it must not break a line of the log.
        name = "plaintext" if self._submitters is None else self._submitters.name(key)
        return f"bus:{re.sub(r'[^A-Za-z0-9._@-]+', '-', name)[:64]}"

    def _manifest(self) -> Answer:
        current = self.published()
        if current is None:
            return Refuse("", "no-generation", "Nothing has been folded yet.", retry=True), None
        return ManifestIs(current.generation, self._settings.chunk_bytes), current.manifest

    def _piece(self, request: GetArtifact) -> Answer:
        if request.sha256 not in self._artifacts:
            self.published()
        path = self._artifacts.get(request.sha256)
        try:
            if path is None:
                raise FileNotFoundError
            return read_piece(path, request.sha256, request.offset, min(request.length, self._settings.chunk_bytes))
        except OSError:
            # Collected in the meantime: the device asks for the manifest again.
            return Refuse(request.sha256, "artifact-gone", "There is no such artifact here now.", retry=True), None


def read_piece(path: Path, sha256: str, offset: int, length: int) -> Answer:
    """One piece of a file as a reply.

    Raises:
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        total = os.fstat(handle).st_size
        if offset >= total:
            return Refuse(sha256, "bad-offset", f"Offset {offset} is beyond the end at {total}."), None
        return Data(sha256, offset, total), os.pread(handle, length, offset)
    finally:
        os.close(handle)
