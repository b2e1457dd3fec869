"""Files on their way in: offered, resumed, verified, and placed in the inbox so that no power cut undoes it.

A transfer is a file `work/incoming/<sha256>.part`; its length is how far it came, so that nothing else has to be
remembered over a restart. Chunks are not synced: after a power cut the tail may be zeros, which the digest finds, and
then the transfer begins again. Used by the server's thread, its finisher and the puller at the same time: the table
is under a lock, reading and syncing of whole files happens outside it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from foldd.core.digests import sha256_file
from foldd.core.files import place_new, sync_file
from foldd.core.wire import Ack, Durable, Go, Have, Refuse, Wait
from foldd.daemon.bus.settings import BusSettings

log = logging.getLogger("foldd.bus")

SUFFIX = ".safetensors"
ACTIVE_S = 30.0  # a transfer without a chunk for so long is idle: others may take it over, or take its room
_RECENT = 1024  # digests remembered as durable while they wait in the inbox, unknown to the ledger


@dataclass
class _Transfer:
    name: str
    size: int
    done: int
    owner: str  # whose chunks are taken
    sender: str  # who that is, for people
    touched: float  # monotonic seconds
    inherited: bool  # some bytes are not from this owner since the start: from before a restart, or from another owner
    finishing: bool = False


class Incoming:
    """The transfers of one state directory."""

    def __init__(
        self,
        root: Path,
        settings: BusSettings,
        on_submitted: Callable[[Path, str], None],
        known: Callable[[str], str | None] = lambda sha256: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            root: the state directory.
            on_submitted: told the path in the inbox of every file that became durable, and who sent it (`bus:<name>`
                or `publisher:<endpoint>`); from any thread.
            known: what the ledger knows of a digest ("folded", "queued", …), or None.
        """
        self._inbox, self._folder = root / "inbox", root / "work" / "incoming"
        self._inbox.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._settings, self._on_submitted, self._known, self._clock = settings, on_submitted, known, clock
        self._lock = threading.Lock()
        self._table: dict[str, _Transfer] = {}
        self._recent: dict[str, str] = {}

    def offer(self, name: str, size: int, sha256: str, owner: str, sender: str = "") -> Have | Go | Wait | Refuse:
        """Decides about an offered file; `Go` opens, or goes on with, a transfer of `owner`.

        Args:
            size: bytes.
            owner: a public key, or what else tells clients apart.
            sender: who that is, for `on_submitted`; the owner where it is empty.
        """
        if (state := self._known(sha256)) is not None:
            return Have(sha256, state)
        with self._lock:
            if (placed := self._recent.get(sha256)) is not None and (self._inbox / placed).exists():
                return Have(sha256, f"in the inbox as {placed}")
            transfer = self._table.get(sha256)
            if transfer is not None and transfer.finishing:
                return Wait(sha256, 1.0, "everything arrived and is being verified")
            if transfer is not None and transfer.owner != owner and self._is_active(transfer):
                return Wait(sha256, 5.0, "another client is sending the same file")
            done = self._length(sha256) if transfer is None else transfer.done
            if transfer is None or transfer.size != size:
                if transfer is not None and self._is_active(transfer):
                    what = f"{sha256} was offered with {transfer.size} bytes a moment ago."
                    return Refuse(sha256, "size-differs", what, retry=True)
                if (refusal := self._refusal(sha256, size, done)) is not None:
                    return refusal
            if done > size:  # left by an offer of another length; the digest decides, so begin again
                os.truncate(self._part(sha256), 0)
                done = 0
            inherited = done > 0 and (transfer is None or transfer.inherited or transfer.owner != owner)
            self._table[sha256] = _Transfer(
                safe_name(name), size, done, owner, sender or owner, self._clock(), inherited
            )
        return Go(sha256, done, self._settings.chunk_bytes, self._settings.credit)

    def write(self, sha256: str, offset: int, data: bytes | memoryview, owner: str) -> Ack | Go | Refuse:
        """Appends one chunk. `Go` sends the client back to where the file really ends."""
        with self._lock:
            transfer = self._table.get(sha256)
            if transfer is None or transfer.owner != owner:
                return Refuse(sha256, "offer-first", "No such transfer is open for this key.", retry=True)
            transfer.touched = self._clock()
            if offset < transfer.done or transfer.finishing:
                return Ack(sha256, transfer.done)  # a repetition after a loss
            if offset > transfer.done:
                return Go(sha256, transfer.done, self._settings.chunk_bytes, self._settings.credit)
            if not 0 < len(data) <= min(self._settings.chunk_bytes, transfer.size - offset):
                return Refuse(sha256, "bad-chunk", f"A chunk of {len(data)} bytes at {offset} of {transfer.size}.")
            try:
                _append(self._part(sha256), offset, data)
            except OSError as error:
                return Refuse(sha256, "disk-failed", f"Writing failed: {error.strerror}.", retry=True)
            transfer.done = offset + len(data)
            return Ack(sha256, transfer.done)

    def is_complete(self, sha256: str) -> bool:
        """Whether everything has arrived and `finish` is due; true once for each transfer."""
        with self._lock:
            transfer = self._table.get(sha256)
            if transfer is None or transfer.finishing or transfer.done < transfer.size:
                return False
            transfer.finishing = True
            return True

    def finish(self, sha256: str) -> Durable | Refuse:
        """Verifies, syncs and places a complete file; takes as long as reading and syncing it takes."""
        transfer, part = self._table[sha256], self._part(sha256)
        try:
            if sha256_file(part) != sha256:
                part.unlink()
                what = f"What arrived as {transfer.name} does not have the digest offered."
                # Inherited bytes may be another's, or zeros where a power cut took the tail: not this sender's fault.
                return Refuse(sha256, "digest-mismatch", what, retry=transfer.inherited)
            sync_file(part)
            path = self._place(part, transfer.name, sha256)
        except OSError as error:
            return Refuse(sha256, "disk-failed", f"{transfer.name} could not be stored: {error.strerror}.", retry=True)
        finally:
            with self._lock:
                del self._table[sha256]
        with self._lock:
            self._recent[sha256] = path.name
            while len(self._recent) > _RECENT:
                del self._recent[next(iter(self._recent))]
        log.info("%s (%s…) came from %s", path.name, sha256[:16], transfer.sender)
        try:
            self._on_submitted(path, transfer.sender)
        except Exception:  # the file is durable whatever its listener does; the next scan finds it
            log.exception("the listener for submitted files failed")
        return Durable(sha256, path.name)

    def sweep(self) -> int:
        """Deletes the bytes of abandoned transfers; how many. Call it now and then."""
        deleted = 0
        with self._lock:
            for sha256, transfer in list(self._table.items()):
                if not transfer.finishing and self._clock() - transfer.touched > self._settings.stale_partial_s:
                    del self._table[sha256]
            limit = time.time() - self._settings.stale_partial_s
            for path in self._folder.glob("*.part"):
                if path.stem not in self._table and path.stat().st_mtime < limit:
                    path.unlink(missing_ok=True)
                    deleted += 1
        return deleted

    def _refusal(self, sha256: str, size: int, done: int) -> Refuse | None:
        """Why a transfer cannot begin, if it cannot.

        Idle ones give way where that helps: first their claims (the owners offer again), then the oldest bytes. Nothing
        of theirs is touched for an offer that is refused all the same.
        """
        if size == 0:
            return Refuse(sha256, "empty", "The offered file is empty.")
        if size > (limit := self._settings.max_bundle_bytes):
            return Refuse(sha256, "too-large", f"{size} bytes are offered, the limit is {limit}.")
        claims = {key: transfer for key, transfer in self._table.items() if key != sha256}
        active = {key: transfer for key, transfer in claims.items() if self._is_active(transfer)}
        parts = {p.stem: p.stat() for p in self._folder.glob("*.part") if p.stem not in {*active, sha256}}
        lying = {key: entry.st_size for key, entry in sorted(parts.items(), key=lambda part: part[1].st_mtime)}
        missing, free = size - min(done, size), shutil.disk_usage(self._folder).free
        at_best = self._shortage(sha256, size, missing, active.values(), 0, free + sum(lying.values()))
        if at_best is not None:
            return at_best
        unclaimed = sum(length for key, length in lying.items() if key not in claims)

        def fits() -> bool:
            return self._shortage(sha256, size, missing, claims.values(), unclaimed, free) is None

        for key in sorted(claims.keys() - active.keys(), key=lambda key: claims[key].touched):
            if fits():
                break
            del claims[key], self._table[key]
            unclaimed += lying.get(key, 0)
        for key, length in lying.items():
            if fits():
                break
            self._part(key).unlink(missing_ok=True)
            unclaimed -= length
            free += length
        return None

    def _shortage(
        self, sha256: str, size: int, missing: int, claims: Collection[_Transfer], unclaimed: int, free: int
    ) -> Refuse | None:
        """Which limit one more transfer would break.

        Args:
            size, missing: bytes of the new one, and how many of them have yet to come.
            claims: the transfers whose promised bytes count.
            unclaimed: bytes of unfinished files beside those.
            free: bytes of disk.
        """
        settings = self._settings
        if len(claims) >= settings.max_partials:
            code, what = "too-many-partials", f"{settings.max_partials} transfers are under way already."
        elif size + sum(transfer.size for transfer in claims) + unclaimed > settings.max_partial_bytes:
            code, what = "too-many-bytes", f"Unfinished transfers may hold {settings.max_partial_bytes} bytes."
        elif free - missing - sum(transfer.size - transfer.done for transfer in claims) < settings.min_free_bytes:
            code, what = "disk-full", f"There is no room for {size} more bytes on the daemon's disk."
        else:
            return None
        return Refuse(sha256, code, what, retry=True)

    def _is_active(self, transfer: _Transfer) -> bool:
        return transfer.finishing or self._clock() - transfer.touched < ACTIVE_S

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.part"

    def _length(self, sha256: str) -> int:
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def _place(self, part: Path, name: str, sha256: str) -> Path:
        """Moves a synced file into the inbox, never over another one."""
        stem = name.removesuffix(SUFFIX)
        names = (name, *(f"{stem}-{sha256[:n]}{SUFFIX}" for n in (8, 16, 64)))
        return place_new(part, (self._inbox / candidate for candidate in names))


def safe_name(name: str) -> str:
    """A file name that cannot leave the inbox, hide in it or be ignored by it."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name.replace("\\", "/")).name.removesuffix(SUFFIX)).strip(".-_")
    return f"{stem[:64] or 'checkpoint'}{SUFFIX}"


def _append(path: Path, offset: int, data: bytes | memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        written = 0
        view = memoryview(data)
        while written < len(view):
            written += os.pwrite(handle, view[written:], offset + written)
    except OSError:
        os.ftruncate(handle, offset)  # a restart takes the length for what arrived
        raise
    finally:
        os.close(handle)
