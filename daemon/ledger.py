"""The ledger: what arrived, what was tried, what was folded. Its commit is the truth; links and files follow it.

SQLite in WAL mode with synchronous=FULL, so that a transaction that returned survives a power cut. The
supervisor is the only writer; `status` and `history` read beside it, or without it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from foldd.core.errors import BadSetup, Unavailable

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE arrivals (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256 TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    source TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'folding', 'folded', 'held', 'quarantined')),
    attempts INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0,
    plan TEXT,
    error TEXT,
    settle_seconds REAL NOT NULL DEFAULT 0,
    arrived TEXT NOT NULL
) STRICT;
CREATE TABLE generations (
    generation INTEGER PRIMARY KEY,
    parent INTEGER,
    arrival INTEGER NOT NULL REFERENCES arrivals (id),
    task TEXT NOT NULL,
    method TEXT NOT NULL,
    checkpoint_sha256 TEXT NOT NULL,
    artifact_sha256 TEXT NOT NULL,
    state_sha256 TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    manifest BLOB NOT NULL,
    scores TEXT NOT NULL,
    seconds TEXT NOT NULL,
    peak_rss_bytes INTEGER NOT NULL,
    published INTEGER NOT NULL DEFAULT 0,
    created TEXT NOT NULL
) STRICT;
CREATE INDEX arrivals_by_state ON arrivals (state);
CREATE INDEX generations_by_publication ON generations (published);
"""


@dataclass(frozen=True)
class Arrival:
    """One distinct file that arrived."""

    id: int
    sha256: str
    name: str
    source: str
    bytes: int
    state: str
    attempts: int
    duplicates: int
    plan: dict[str, Any] | None
    error: dict[str, Any] | None
    settle_seconds: float
    arrived: str


@dataclass(frozen=True)
class GenerationRow:
    """One committed generation."""

    generation: int
    parent: int | None
    arrival: int
    task: str
    method: str
    checkpoint_sha256: str
    artifact_sha256: str
    state_sha256: str
    config_digest: str
    manifest: bytes
    scores: dict[str, float]
    seconds: dict[str, float]
    peak_rss_bytes: int
    published: bool
    created: str


def now() -> str:
    """UTC in ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Ledger:
    """Access to `ledger.sqlite3`."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """
        Raises:
            BadSetup: `not-initialised`, `wrong-ledger`, `broken-ledger`. A ledger is made by `create` alone: one that
                is missing beside generations is a loss to be told of, not to be papered over.
        """
        if not path.exists() or not path.stat().st_size:
            raise _not_initialised(path)
        try:
            self._open(path, "ro" if read_only else "rw")
        except sqlite3.DatabaseError as error:
            raise BadSetup(
                "broken-ledger",
                f"{path} cannot be opened: {error}.",
                why="a damaged disk, or another file under this name.",
                remedy="Restore the state directory from a backup, or start a fresh one.",
            ) from error

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """The ledger of a state directory that has none yet; an existing one is opened."""
        if not path.exists() or not path.stat().st_size:
            if _has_generations(path):
                raise _not_initialised(path)
            database = sqlite3.connect(path, isolation_level=None)
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            database.close()
        return cls(path)

    def _open(self, path: Path, mode: str) -> None:
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA busy_timeout = 5000")
        if mode == "rw":
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise _not_initialised(path)
        if version != SCHEMA_VERSION:
            raise BadSetup(
                "wrong-ledger",
                f"{path} has schema {version}, this foldd knows {SCHEMA_VERSION}.",
                why="another version of foldd wrote it.",
                remedy="Use that version, or a fresh state directory.",
            )

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction, or none of it.

        Raises:
            Unavailable: `ledger-failed`: the disk is full or failed; nothing was changed.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._roll_back()
            raise Unavailable(
                "ledger-failed",
                f"The ledger cannot be written: {error}.",
                why="the disk is full, or failed.",
                remedy="Make room; the daemon goes on by itself.",
            ) from error
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite has rolled back by itself where the disk is full
            self._db.execute("ROLLBACK")

    # --- arrivals

    def arrival(self, sha256: str) -> Arrival | None:
        row = self._db.execute("SELECT * FROM arrivals WHERE sha256 = ?", (sha256,)).fetchone()
        return _arrival(row) if row else None

    def arrivals(self, *states: str) -> list[Arrival]:
        """In order of arrival; all of them where no state is named."""
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        return [_arrival(row) for row in self._db.execute(f"SELECT * FROM arrivals {where} ORDER BY id", states)]  # noqa: S608

    def count(self, state: str) -> int:
        return int(self._db.execute("SELECT count(*) FROM arrivals WHERE state = ?", (state,)).fetchone()[0])

    def add(self, sha256: str, name: str, source: str, size: int, settle_seconds: float) -> None:
        """Queues a file that was never seen."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO arrivals (sha256, name, source, bytes, state, settle_seconds, arrived)"
                " VALUES (?, ?, ?, ?, 'queued', ?, ?)",
                (sha256, name, source, size, settle_seconds, now()),
            )

    def note_duplicate(self, sha256: str) -> None:
        with self._transaction():
            self._db.execute("UPDATE arrivals SET duplicates = duplicates + 1 WHERE sha256 = ?", (sha256,))

    def hold(self, arrival: int, error: dict[str, Any]) -> None:
        """Out of the queue until somebody decides; the attempt does not count."""
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'held', attempts = attempts - 1, error = ? WHERE id = ?",
                (json.dumps(error), arrival),
            )

    def release(self, arrival: Arrival) -> None:
        """Back to the queue after somebody's yes: this time it is folded whatever it conflicts with."""
        plan = None if arrival.plan is None else json.dumps(arrival.plan | {"on_conflict": "fold"}, sort_keys=True)
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'queued', error = NULL, plan = ? WHERE id = ? AND state = 'held'",
                (plan, arrival.id),
            )

    def requeue(self, sha256: str, name: str, source: str) -> None:
        """Takes a quarantined file up again from its beginning, under the name that it came by this time."""
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'queued', attempts = 0, error = NULL, plan = NULL, name = ?, source = ?"
                " WHERE sha256 = ?",
                (name, source, sha256),
            )

    def forget(self, sha256: str) -> None:
        """Drops a row as if its file had never come; one that is being folded, or was, stays."""
        with self._transaction():
            self._db.execute("DELETE FROM arrivals WHERE sha256 = ? AND state NOT IN ('folding', 'folded')", (sha256,))

    def begin(self, arrival: int, plan: dict[str, Any]) -> Arrival:
        """Counts an attempt and fixes everything that decides its result, before the work begins.

        The plan of an earlier attempt stands, so that a replay computes the same bytes.
        """
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'folding', attempts = attempts + 1, plan = coalesce(plan, ?)"
                " WHERE id = ? AND state = 'queued'",
                (json.dumps(plan, sort_keys=True), arrival),
            )
        return _arrival(self._db.execute("SELECT * FROM arrivals WHERE id = ?", (arrival,)).fetchone())

    def retreat(self, arrival: int, *, refund: bool, error: dict[str, Any] | None = None) -> None:
        """Back to the queue; `refund` where the attempt was not the checkpoint's fault."""
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'queued', attempts = attempts - ?, error = coalesce(?, error)"
                " WHERE id = ? AND state = 'folding'",
                (int(refund), json.dumps(error) if error else None, arrival),
            )

    def quarantine(self, arrival: int, error: dict[str, Any]) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE arrivals SET state = 'quarantined', error = ? WHERE id = ?", (json.dumps(error), arrival)
            )

    # --- generations

    def commit(self, row: GenerationRow) -> None:
        """The commit point of a fold: the generation exists and its checkpoint is folded, or neither."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
                (
                    row.generation, row.parent, row.arrival, row.task, row.method, row.checkpoint_sha256,
                    row.artifact_sha256, row.state_sha256, row.config_digest, row.manifest, json.dumps(row.scores),
                    json.dumps(row.seconds), row.peak_rss_bytes, row.created,
                ),
            )  # fmt: skip
            self._db.execute("UPDATE arrivals SET state = 'folded', error = NULL WHERE id = ?", (row.arrival,))

    def mark_published(self, generation: int) -> None:
        with self._transaction():
            self._db.execute("UPDATE generations SET published = 1 WHERE generation = ?", (generation,))

    def current(self) -> GenerationRow | None:
        return next(iter(self.latest(1)), None)

    def generations(self) -> list[GenerationRow]:
        """All of them, oldest first."""
        return [_generation(row) for row in self._db.execute("SELECT * FROM generations ORDER BY generation")]

    def latest(self, count: int) -> list[GenerationRow]:
        """The last few, newest first."""
        query = "SELECT * FROM generations ORDER BY generation DESC LIMIT ?"
        return [_generation(row) for row in self._db.execute(query, (count,))]

    def unpublished(self) -> list[int]:
        """Generations that were committed and not yet announced."""
        query = "SELECT generation FROM generations WHERE published = 0 ORDER BY generation"
        return [int(row[0]) for row in self._db.execute(query)]


def _not_initialised(path: Path) -> BadSetup:
    if _has_generations(path):
        return BadSetup(
            "ledger-missing",
            f"{path} is missing or empty, but there are generations beside it.",
            why="a power cut on a disk that lies, or an incomplete restore.",
            remedy="Restore the whole state directory from a backup; without its ledger, what was folded is unknown.",
        )
    return BadSetup(
        "not-initialised",
        f"There is no ledger at {path}.",
        why="`foldd init` has not been run for this state directory.",
        remedy="Run `foldd init`, then `foldd run`.",
    )


def _has_generations(path: Path) -> bool:
    folder = path.parent / "generations"
    return folder.is_dir() and any(folder.iterdir())


def _arrival(row: sqlite3.Row) -> Arrival:
    values = dict(row)
    values["plan"] = json.loads(values["plan"]) if values["plan"] else None
    values["error"] = json.loads(values["error"]) if values["error"] else None
    return Arrival(**values)


def _generation(row: sqlite3.Row) -> GenerationRow:
    values = dict(row)
    values["scores"] = json.loads(values["scores"])
    values["seconds"] = json.loads(values["seconds"])
    values["published"] = bool(values["published"])
    return GenerationRow(**values)
