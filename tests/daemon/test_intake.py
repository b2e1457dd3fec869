"""Claiming: hostile names and entries, dropping again, cuts, a full disk. A real ledger and real files, no daemon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from foldd.core.errors import BadSetup, Unavailable
from foldd.daemon.intake import BUNDLE, Intake
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger
from foldd.daemon.names import printable, safe
from foldd.daemon.settle import Settled, SettleWatch


class Desk:
    """An intake with its ledger, and a shorthand for a drop that has settled."""

    def __init__(self, root: Path, **options) -> None:
        self.layout = Layout(root)
        self.layout.create()
        self.ledger = Ledger.create(self.layout.ledger)
        self.options = {"max_bundle_bytes": 1000, "quarantine_bytes": 0} | options
        self.intake = Intake(self.layout, self.ledger, **self.options)

    def put(self, name, content: bytes) -> Settled:
        path = self.layout.inbox / (os.fsdecode(name) if isinstance(name, bytes) else name)
        path.write_bytes(content)
        return Settled(path, (0, path.name), 0.5, True)

    def entry(self, name, is_file=False) -> Settled:
        path = self.layout.inbox / name
        return Settled(path, (0, name), 0.5, is_file)

    def drop(self, name, content: bytes):
        self.intake.claim(self.put(name, content))
        return self.ledger.arrivals()

    def reasons(self):
        return {
            json.loads(path.read_text())["file"]: json.loads(path.read_text())["code"]
            for path in self.layout.quarantine.glob("*/reason.json")
        }

    def again(self) -> None:
        """A new process on the same files."""
        self.intake = Intake(self.layout, self.ledger, **self.options)
        self.intake.recover()


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "state")


def test_claim_queues_once(desk):
    desk.drop("a.safetensors", b"one")
    desk.drop("b.safetensors", b"one")
    (row,) = desk.ledger.arrivals()
    assert (row.name, row.state, row.duplicates, row.bytes) == ("a.safetensors", "queued", 1, 3)
    assert desk.intake.file_of(row).read_bytes() == b"one"
    assert list(desk.layout.inbox.iterdir()) == []
    assert not desk.layout.claim.exists()


def test_dropped_again_under_another_name_is_that_name_now(desk):
    (row,) = desk.drop("my model.safetensors", b"one")
    desk.intake.quarantine(row, {"code": "bad-task-name", "what": ""})
    (row,) = desk.drop("model.safetensors", b"one")
    assert (row.name, row.state, row.attempts) == ("model.safetensors", "queued", 0)
    assert desk.intake.file_of(row).read_bytes() == b"one"
    assert list(desk.layout.quarantine.iterdir()) == []
    desk.again()
    assert desk.intake.file_of(row).exists(), "nothing is lost"


@pytest.mark.parametrize(
    "name", [b"caf\xe9.safetensors", "a\nb\x1b[31m.safetensors", "reason.json", "stage", "x" * 250]
)
def test_odd_names(desk, name):
    (row,) = desk.drop(name, b"one")
    assert row.name.isprintable()
    desk.intake.quarantine(row, {"code": "x", "what": ""})
    (folder,) = desk.layout.quarantine.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == sorted(["reason.json", safe(row.name)])
    assert json.loads((folder / "reason.json").read_text())["file"] == row.name


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/etc/passwd", p)], ids=["folder", "pipe", "link"]
)
@pytest.mark.parametrize("name", ["x", "reason.json", os.fsdecode(b"caf\xe9")])
def test_what_is_no_file_is_set_aside_and_never_opened(desk, make, name):
    make(desk.layout.inbox / name)
    desk.intake.claim(desk.entry(name))
    assert desk.reasons() == {printable(name): "not-a-file"}
    assert desk.ledger.arrivals() == []


def test_swapped_for_a_link_after_the_scan(desk):
    settled = desk.put("x", b"one")
    settled.path.unlink()
    settled.path.symlink_to("/etc/passwd")
    desk.intake.claim(settled)
    assert desk.reasons() == {"x": "not-a-file"}


def test_too_large(desk):
    desk.drop("x", b"1" * 1001)
    assert desk.reasons() == {"x": "too-large"}


def test_hard_link_elsewhere_cannot_change_what_was_claimed(desk, tmp_path):
    settled = desk.put("x", b"one")
    os.link(settled.path, tmp_path / "keep")
    desk.intake.claim(settled)
    (tmp_path / "keep").write_bytes(b"two")
    assert desk.intake.file_of(desk.ledger.arrivals()[0]).read_bytes() == b"one"


def test_entry_that_cannot_be_moved_stays_and_holds_nobody_up(desk, monkeypatch):
    real = os.rename

    def rename(source, target, **options):
        if str(source).endswith("stuck"):
            raise PermissionError(13, "Permission denied")
        return real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    desk.intake.claim(desk.put("stuck", b"one"))
    desk.intake.claim(desk.put("fine", b"two"))
    assert [row.name for row in desk.ledger.arrivals()] == ["fine"]
    assert (desk.layout.inbox / "stuck").exists()


def test_a_cut_claim_is_finished_before_the_next_one(desk):
    """The ledger fails in the middle: the file waits in work/claim, and no later claim may remove it."""

    class Broken(Exception):
        pass

    def breaks(*_):
        raise Broken

    real, desk.ledger.arrival = desk.ledger.arrival, breaks
    with pytest.raises(Broken):
        desk.drop("first", b"one")
    desk.ledger.arrival = real
    desk.drop("second", b"two")
    assert [row.name for row in desk.ledger.arrivals()] == ["first", "second"]


def test_recovery_of_a_claim_without_a_row(desk):
    (row,) = desk.drop("my model.safetensors", b"one")
    desk.ledger.forget(row.sha256)
    desk.again()
    (again,) = desk.ledger.arrivals()
    assert (again.name, again.sha256, again.settle_seconds) == ("my model.safetensors", row.sha256, 0.5)


def test_recovery_of_a_second_drop_that_was_cut(desk):
    (row,) = desk.drop("x", b"one")
    desk.intake.quarantine(row, {"code": "x", "what": ""})
    real, desk.ledger.requeue = desk.ledger.requeue, None
    with pytest.raises(TypeError):
        desk.drop("y", b"one")
    desk.ledger.requeue = real
    desk.again()
    (row,) = desk.ledger.arrivals()
    assert (row.name, row.state) == ("y", "queued")
    assert desk.intake.file_of(row).exists()


def test_a_full_disk_changes_nothing(desk):
    pages = desk.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    desk.ledger._db.execute(f"PRAGMA max_page_count = {pages}")

    def drop_until_full():
        for number in range(200):
            desk.drop(f"{number}-{'x' * 200}", b"%d" % number)

    with pytest.raises(Unavailable) as caught:
        drop_until_full()
    assert (caught.value.code, caught.value.retry) == ("ledger-failed", True)
    before = len(desk.ledger.arrivals())
    desk.ledger._db.execute("PRAGMA max_page_count = 100000")
    desk.again()
    assert len(desk.ledger.arrivals()) == before + 1, "what was cut is queued when there is room again"


def test_quarantine_keeps_reasons_when_it_is_over_its_limit(tmp_path):
    desk = Desk(tmp_path / "state", quarantine_bytes=250, max_bundle_bytes=50)
    for number in range(4):
        desk.drop(f"f{number}", b"1" * 100)
        time.sleep(0.02)
    assert len(desk.reasons()) == 4
    left = {path.name for path in desk.layout.quarantine.glob("*/f*")}
    assert left == {"f2", "f3"}


def test_a_missing_ledger_is_a_loss_to_be_told_of(desk):
    """Opening must not make a new one: an empty ledger would have every generation removed as an orphan."""
    desk.ledger.close()
    desk.layout.ledger.unlink()
    with pytest.raises(BadSetup) as caught:
        Ledger(desk.layout.ledger)
    assert caught.value.code == "not-initialised"
    desk.layout.generation(1).mkdir()
    for access in (Ledger, Ledger.create):
        with pytest.raises(BadSetup) as caught:
            access(desk.layout.ledger)
        assert caught.value.code == "ledger-missing"
    desk.layout.ledger.write_bytes(b"this is no database, it is a text")
    with pytest.raises(BadSetup) as caught:
        Ledger(desk.layout.ledger)
    assert caught.value.code == "broken-ledger"


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"data_offsets":[0,1e999]}}',
        b'{"a":{"data_offsets":[0,true]}}',
        b'{"a":1}',
        b"[1]",
        b'{"a":{"data_offsets":[0,NaN]}}',
    ],
)
def test_hostile_headers_do_not_reach_the_supervisor(desk, header):
    """The glance at a header happens in the supervisor: nothing in it may raise."""
    path = desk.layout.inbox / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    watch = SettleWatch(0.0, 60.0, lambda: 1.0)
    (settled,) = watch.scan(desk.layout.inbox)
    desk.intake.claim(settled)
    assert len(desk.ledger.arrivals()) == 1


def test_two_file_systems_are_refused(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    layout.create()
    (tmp_path / "inbox").rmdir()
    (tmp_path / "inbox").symlink_to("/proc")
    with pytest.raises(BadSetup) as caught:
        layout.create()
    assert caught.value.code == "two-file-systems"


def test_claimed_name_is_where_the_worker_looks(desk):
    (row,) = desk.drop("x", b"one")
    assert desk.intake.file_of(row).name == BUNDLE
