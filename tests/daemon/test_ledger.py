"""The ledger: attempts, plans, the commit point, and readers beside the writer."""

from __future__ import annotations

import sqlite3

import pytest

from foldd.core.errors import BadSetup, Unavailable
from foldd.daemon.ledger import GenerationRow, Ledger, now

A, B = "a" * 64, "b" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path):
    ledger = Ledger.create(path)
    yield ledger
    ledger.close()


def generation(number, arrival, sha256):
    return GenerationRow(
        number, number - 1 or None, arrival, "task", "average", sha256, "artifact", "state", "config", b"manifest",
        {"parity": 0.0}, {"fold": 1.0}, 5, False, now(),
    )  # fmt: skip


def test_attempts_are_counted_before_the_work_and_given_back_when_it_was_not_its_fault(ledger):
    ledger.add(A, "a", "folder", 1, 0.5)
    assert ledger.begin(1, {"seed": 1}).attempts == 1
    assert ledger.arrival(A).state == "folding"
    ledger.retreat(1, refund=True)
    assert (ledger.arrival(A).attempts, ledger.arrival(A).state) == (0, "queued")
    ledger.begin(1, {"seed": 1})
    ledger.retreat(1, refund=False, error={"code": "x"})
    assert (ledger.arrival(A).attempts, ledger.arrival(A).error) == (1, {"code": "x"})


def test_the_first_plan_stands(ledger):
    ledger.add(A, "a", "folder", 1, 0.5)
    ledger.begin(1, {"seed": 1})
    ledger.retreat(1, refund=True)
    assert ledger.begin(1, {"seed": 2}).plan == {"seed": 1}


def test_commit_is_all_or_nothing(ledger):
    ledger.add(A, "a", "folder", 1, 0.5)
    ledger.begin(1, {})
    ledger.commit(generation(1, 1, A))
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit(generation(1, 1, A))
    ledger.add(B, "b", "folder", 1, 0.5)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit(generation(2, 99, B))
    assert ledger.arrival(A).state == "folded"
    assert ledger.arrival(B).state == "queued"
    assert [row.generation for row in ledger.generations()] == [1]


def test_order_of_arrival_is_kept_and_content_is_unique(ledger):
    ledger.add(B, "first", "folder", 1, 0.5)
    ledger.add(A, "second", "folder", 1, 0.5)
    assert [row.name for row in ledger.arrivals("queued")] == ["first", "second"]
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add(A, "again", "folder", 1, 0.5)


def test_readers_see_commits_and_cannot_write(path, ledger):
    reader = Ledger(path, read_only=True)
    ledger.add(A, "a", "folder", 1, 0.5)
    assert reader.arrival(A).name == "a"
    with pytest.raises(Unavailable):
        reader.add(B, "b", "folder", 1, 0.5)
    reader.close()


def test_every_commit_reaches_the_disk(ledger):
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_missing_and_foreign_ledgers(path, tmp_path):
    with pytest.raises(BadSetup) as caught:
        Ledger(path, read_only=True)
    assert caught.value.code == "not-initialised"
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(BadSetup) as caught:
        Ledger(path)
    assert caught.value.code == "wrong-ledger"
