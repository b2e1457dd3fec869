"""A device's own copy of generations: what was verified stays, what is older is refused.

    generations/000042/{model.onnx, manifest.json}   verified, complete, never changed
    current → generations/000042
    incoming/<sha256>.part                           on its way; its length is how far it came
    highest.json                                     the highest generation ever accepted, and its manifest's digest

A current generation that the disk damaged is fetched again: the same signed manifest, and no other of that number.
`highest.json` is written after verification and never goes down, so that an attacker who replays an old signed
manifest, or an operator who moves `current` back, cannot make the device take an old generation for a new one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from foldd.core.digests import sha256_bytes
from foldd.core.errors import BadManifest, BadSetup, Unavailable
from foldd.core.files import place, place_directory, point, write_file
from foldd.core.manifest import Manifest, read_manifest, verify_manifest
from foldd.core.signatures import PublicIdentity
from foldd.runtime.slot import check_artifact

log = logging.getLogger("foldd.runtime")

MAX_ARTIFACT_BYTES = 8 * 1024**3
MIN_FREE_BYTES = 64 * 1024 * 1024
KEEP_GENERATIONS = 2


class _Highest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    generation: int
    manifest_sha256: str = ""  # of the signed manifest


class Store:
    """One directory, one process writing it."""

    def __init__(self, root: Path, trusted: Iterable[PublicIdentity], *, keep: int = KEEP_GENERATIONS) -> None:
        """
        Args:
            trusted: whose signatures count.
            keep: how many generations stay on disk, the current one included; at least 1.

        Raises:
            BadSetup: `broken-store` where `highest.json` cannot be read: a guard that is gone must not be ignored.
            Unavailable: `store-unwritable`.
        """
        self.root, self._trusted, self._keep = root, tuple(trusted), max(1, keep)
        self._incoming = root / "incoming"
        try:
            for folder in (root, root / "generations", self._incoming):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable("store-unwritable", f"{error.filename} cannot be made: {error.strerror}.") from error
        self._highest = self._read_highest()
        self._checked: tuple[bytes, bool] | None = None  # the current manifest, and whether its artifact is as signed

    @property
    def highest(self) -> int:
        """The highest generation ever accepted; 0 where there was none."""
        data, linked = self.current_bytes(), 0
        if data is not None:
            # A power cut between the link and highest.json leaves only the link. Where that is damaged, its number
            # means nothing: highest.json still guards, and what comes next mends it.
            with contextlib.suppress(BadManifest):
                linked = verify_manifest(data, self._trusted).generation
        return max(self._highest.generation, linked)

    def current(self) -> Manifest | None:
        """The manifest that `current` points to.

        Raises:
            BadManifest: `manifest-malformed`, `manifest-too-large`: the disk damaged it.
        """
        data = self.current_bytes()
        return None if data is None else read_manifest(data).manifest

    def current_bytes(self) -> bytes | None:
        try:
            return (self.root / "current" / "manifest.json").read_bytes()
        except OSError:
            return None

    def admit(self, data: bytes) -> Manifest | None:
        """Verifies a signed manifest; None where it is the current one already, undamaged.

        Whether the current artifact is undamaged is looked at once per start: it means reading all of it.

        Raises:
            BadManifest: `manifest-too-large`, `manifest-malformed`, `unknown-signer`, `bad-signature`,
                `generation-not-rising`, `artifact-too-large`.
        """
        manifest = verify_manifest(data, self._trusted)
        intact, highest = self._is_intact(), self.highest
        if intact and data == self.current_bytes():
            return None
        again = not intact and manifest.generation == highest and self._was_accepted(data)
        if manifest.generation <= highest and not again:
            raise BadManifest(
                "generation-not-rising",
                f"Generation {manifest.generation} is offered, this device has accepted {highest} before.",
                why="an old manifest is replayed, or the daemon's state was set back.",
                remedy="To go back to old weights, fold and sign them as a new generation.",
            )
        if not 0 < manifest.artifact.bytes <= MAX_ARTIFACT_BYTES:
            raise BadManifest("artifact-too-large", f"The artifact is said to have {manifest.artifact.bytes} bytes.")
        return manifest

    def begin(self, manifest: Manifest) -> int:
        """Prepares to receive an artifact; how many of its bytes are here already.

        Raises:
            Unavailable: `disk-full`.
        """
        part = self._part(manifest)
        for other in self._incoming.iterdir():
            if other != part:
                other.unlink()  # of a generation that was overtaken
        if not part.exists():
            self._reuse(manifest, part)
        done = part.stat().st_size if part.exists() else 0
        if done > manifest.artifact.bytes:
            part.unlink()
            done = 0
        missing = manifest.artifact.bytes - done
        if shutil.disk_usage(self.root).free - missing < MIN_FREE_BYTES:
            raise Unavailable("disk-full", f"There is no room for {missing} bytes in {self.root}.")
        return done

    def write(self, manifest: Manifest, offset: int, data: bytes) -> None:
        """Appends a piece, never beyond the length that was signed.

        Raises:
            BadManifest: `artifact-size`.
            Unavailable: `disk-failed`.
        """
        if offset + len(data) > manifest.artifact.bytes:
            raise BadManifest("artifact-size", f"More than the {manifest.artifact.bytes} bytes of the manifest came.")
        try:
            with self._part(manifest).open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise Unavailable("disk-failed", f"Writing to {self._incoming} failed: {error.strerror}.") from error

    def commit(self, manifest: Manifest, data: bytes) -> Path:
        """Verifies what came, makes it durable and current; the generation's folder.

        Args:
            data: the signed manifest, as admitted.

        Raises:
            BadManifest: `artifact-size`, `artifact-digest`; what came is thrown away then.
            Unavailable: `disk-failed`.
        """
        part = self._part(manifest)
        try:
            check_artifact(part, manifest)
        except BadManifest:
            part.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise Unavailable("disk-failed", f"{part} cannot be read: {error.strerror}.") from error
        name = f"{manifest.generation:06d}"
        folder, staged = self.root / "generations" / name, self.root / "generations" / f".{name}.part"
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            write_file(staged / "manifest.json", data)
            place(part, staged / "model.onnx")
            place_directory(staged, folder)
            point(self.root / "current", f"generations/{name}")
            self._checked = (data, True)
            self._highest = _Highest(manifest.generation, sha256_bytes(data))
            write_file(self.root / "highest.json", msgspec.json.encode(self._highest) + b"\n")
        except OSError as error:
            raise Unavailable("disk-failed", f"{folder} could not be written: {error.strerror}.") from error
        self._collect()
        return folder

    def _is_intact(self) -> bool:
        """Whether `current` leads to a manifest that is signed and the artifact that it names."""
        data = self.current_bytes()
        if data is None:
            return False
        if self._checked is None or self._checked[0] != data:
            try:
                check_artifact(self.root / "current" / "model.onnx", verify_manifest(data, self._trusted))
                intact = True
            except (BadManifest, OSError) as error:
                log.warning("the current generation is damaged: %s", error)
                intact = False
            self._checked = (data, intact)
        return self._checked[1]

    def _was_accepted(self, data: bytes) -> bool:
        return data == self.current_bytes() or sha256_bytes(data) == self._highest.manifest_sha256

    def _collect(self) -> None:
        """Removes all but the newest generations; never the current one."""
        current = os.readlink(self.root / "current").rpartition("/")[2]
        names = sorted((p.name for p in (self.root / "generations").iterdir() if p.name.isdigit()), key=int)
        for name in names[: -self._keep]:
            if name != current:
                shutil.rmtree(self.root / "generations" / name, ignore_errors=True)

    def _reuse(self, manifest: Manifest, part: Path) -> None:
        """Copies an artifact that is here under another number: a rollback costs no transfer."""
        for folder in (self.root / "generations").iterdir():
            model = folder / "model.onnx"
            try:
                if read_manifest((folder / "manifest.json").read_bytes()).manifest.artifact == manifest.artifact:
                    shutil.copyfile(model, part)
                    check_artifact(part, manifest)  # a copy of a damaged one would be refused for ever
                    return
            except (OSError, BadManifest):
                part.unlink(missing_ok=True)

    def _part(self, manifest: Manifest) -> Path:
        return self._incoming / f"{manifest.artifact.sha256}.part"

    def _read_highest(self) -> _Highest:
        path = self.root / "highest.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Highest)
        except FileNotFoundError:
            return _Highest(0)
        except (OSError, msgspec.MsgspecError) as error:
            raise BadSetup(
                "broken-store",
                f"{path} cannot be read: {error}.",
                why="the disk is failing, or it was edited.",
                remedy=f"Check the disk; then remove {path} if the device may trust the next generation that comes.",
            ) from error
