"""The table of transfers, without sockets."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from bus_kit import noise

from foldd.core.digests import sha256_bytes
from foldd.core.wire import Ack, Durable, Go, Refuse, Wait
from foldd.daemon.bus.incoming import ACTIVE_S, Incoming, safe_name
from foldd.daemon.bus.settings import BusSettings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_incoming(tmp_path: Path, **how: object) -> tuple[Incoming, Clock]:
    clock = Clock()
    settings = BusSettings(**{"min_free_bytes": 0, "chunk_bytes": 1024, **how})  # type: ignore[arg-type]
    return Incoming(tmp_path, settings, lambda path, sender: None, clock=clock), clock


def bring(incoming: Incoming, content: bytes, name: str = "a.safetensors") -> Durable | Refuse:
    sha256 = sha256_bytes(content)
    assert isinstance(incoming.offer(name, len(content), sha256, "me"), Go)
    incoming.write(sha256, 0, content, "me")
    assert incoming.is_complete(sha256)
    assert not incoming.is_complete(sha256)
    return incoming.finish(sha256)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("cats.safetensors", "cats.safetensors"),
        ("../../etc/passwd", "passwd.safetensors"),
        ("..\\..\\boot.ini", "boot.ini.safetensors"),
        (".hidden.safetensors", "hidden.safetensors"),
        ("...", "checkpoint.safetensors"),
        ("a b\nc\0d.safetensors", "a-b-c-d.safetensors"),
        ("/", "checkpoint.safetensors"),
        ("x" * 255, "x" * 64 + ".safetensors"),
        ("имя.safetensors", "checkpoint.safetensors"),
    ],
)
def test_names_are_made_harmless(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_an_idle_transfer_may_be_taken_over(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path)
    sha256 = sha256_bytes(b"x" * 10)
    assert isinstance(incoming.offer("a", 10, sha256, "one"), Go)
    incoming.write(sha256, 0, b"x" * 4, "one")
    clock.now += ACTIVE_S + 1
    assert incoming.offer("a", 10, sha256, "two") == Go(sha256, 4, 1024, 10)
    refused = incoming.write(sha256, 4, b"x" * 6, "one")
    assert isinstance(refused, Refuse)
    assert refused.code == "offer-first"


def test_idle_transfers_make_room(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path, max_partials=1)
    one, two = sha256_bytes(b"1"), sha256_bytes(b"2")
    assert isinstance(incoming.offer("a", 10, one, "me"), Go)
    assert isinstance(incoming.offer("b", 10, two, "me"), Refuse)
    clock.now += ACTIVE_S + 1
    assert isinstance(incoming.offer("b", 10, two, "me"), Go)


BIG = BusSettings().max_bundle_bytes


def start(incoming: Incoming, content: bytes, size: int, owner: str) -> str:
    """Offers `size` bytes and sends `content` of them; the digest."""
    sha256 = sha256_bytes(content)
    assert isinstance(incoming.offer("a", size, sha256, owner), Go)
    if content:
        incoming.write(sha256, 0, content, owner)
    return sha256


def test_two_offers_do_not_block_everybody_else(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path)
    start(incoming, b"1", BIG, "one")
    start(incoming, b"2", BIG, "one")
    refused = incoming.offer("b", 3, sha256_bytes(b"abc"), "two")
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry) == ("too-many-bytes", True)
    clock.now += ACTIVE_S + 1
    assert isinstance(bring(incoming, b"abc"), Durable)


def test_what_idle_transfers_promised_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming, clock = make_incoming(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    idle = start(incoming, b"1", 990, "one")
    refused = incoming.offer("b", 100, sha256_bytes(b"b"), "two")
    assert isinstance(refused, Refuse)
    assert refused.code == "disk-full"
    clock.now += ACTIVE_S + 1
    assert isinstance(incoming.offer("b", 100, sha256_bytes(b"b"), "two"), Go)
    # Its owner must ask again, which is when the promise is held against the limits once more.
    again = incoming.write(idle, 1, b"2", "one")
    assert isinstance(again, Refuse)
    assert (again.code, again.retry) == ("offer-first", True)
    assert isinstance(incoming.offer("a", 990, idle, "one"), Refuse)
    assert incoming.offer("a", 800, idle, "one") == Go(idle, 1, 1024, 10)


def test_idle_bytes_go_oldest_first_and_only_where_that_helps(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path, max_partial_bytes=100, max_bundle_bytes=100)
    folder = tmp_path / "work/incoming"
    digests = [start(incoming, bytes([n]) * 30, 30 + n, "one") for n in range(2)]
    os.utime(folder / f"{digests[1]}.part", (1, 1))  # the older one
    clock.now += ACTIVE_S + 1
    active = start(incoming, b"x", 35, "three")

    def left() -> list[str]:
        return [sha256 for sha256 in (*digests, active) if (folder / f"{sha256}.part").exists()]

    refused = incoming.offer("b", 70, sha256_bytes(b"b"), "two")  # does not fit beside the active one anyhow
    assert isinstance(refused, Refuse)
    assert refused.code == "too-many-bytes"
    assert left() == [*digests, active]
    assert incoming.write(digests[0], 0, b"", "one") == Ack(digests[0], 30)  # its claim stands, too
    clock.now += ACTIVE_S + 1
    incoming.write(active, 1, b"x", "three")
    assert isinstance(incoming.offer("b", 35, sha256_bytes(b"b"), "two"), Go)
    assert left() == [digests[0], active]


def test_a_wrong_size_bars_a_digest_only_while_its_transfer_is_active(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path)
    content = noise(100)
    sha256 = sha256_bytes(content)
    assert isinstance(incoming.offer("a", 999, sha256, "one"), Go)
    incoming.write(sha256, 0, content[:60], "one")
    assert isinstance(incoming.offer("a", 100, sha256, "two"), Wait)
    clock.now += ACTIVE_S + 1
    assert incoming.offer("a", 100, sha256, "two") == Go(sha256, 60, 1024, 10)
    incoming.write(sha256, 60, content[60:], "two")
    assert incoming.is_complete(sha256)
    assert isinstance(incoming.finish(sha256), Durable)


@pytest.mark.parametrize("whose", ["before the restart", "another's"])
def test_bytes_of_an_earlier_attempt_that_were_wrong_are_sent_again(tmp_path: Path, whose: str) -> None:
    content, damaged = noise(100), noise(60)[:50] + bytes(10)  # the tail that no power cut spares
    sha256 = sha256_bytes(content)
    incoming, clock = make_incoming(tmp_path)
    incoming.offer("a", 100, sha256, "one")
    incoming.write(sha256, 0, damaged, "one")
    if whose == "another's":
        clock.now += ACTIVE_S + 1
    else:
        incoming, _ = make_incoming(tmp_path)
    owner = "two" if whose == "another's" else "one"
    assert incoming.offer("a", 100, sha256, owner) == Go(sha256, 60, 1024, 10)
    incoming.write(sha256, 60, content[60:], owner)
    assert incoming.is_complete(sha256)
    refused = incoming.finish(sha256)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry) == ("digest-mismatch", True)
    # From the start, all of them its own: now they count against it.
    assert incoming.offer("a", 100, sha256, owner) == Go(sha256, 0, 1024, 10)
    incoming.write(sha256, 0, bytes(100), owner)
    assert incoming.is_complete(sha256)
    refused = incoming.finish(sha256)
    assert isinstance(refused, Refuse)
    assert not refused.retry
    assert isinstance(bring(incoming, content), Durable)


def test_who_sent_a_file_is_told(tmp_path: Path) -> None:
    told: list[tuple[Path, str]] = []
    incoming = Incoming(tmp_path, BusSettings(min_free_bytes=0), lambda path, sender: told.append((path, sender)))
    sha256 = sha256_bytes(b"abc")
    incoming.offer("a", 3, sha256, "f" * 64, "bus:alice")
    incoming.write(sha256, 0, b"abc", "f" * 64)
    assert incoming.is_complete(sha256)
    incoming.finish(sha256)
    assert told == [(tmp_path / "inbox" / "a.safetensors", "bus:alice")]


def test_abandoned_bytes_are_swept_and_others_are_not(tmp_path: Path) -> None:
    incoming, clock = make_incoming(tmp_path, stale_partial_s=100.0)
    for content, age in ((b"old", 1000), (b"new", 10)):
        sha256 = sha256_bytes(content)
        assert isinstance(incoming.offer("a", 10, sha256, "me"), Go)
        incoming.write(sha256, 0, b"12345", "me")
        part = tmp_path / "work/incoming" / f"{sha256}.part"
        os.utime(part, (part.stat().st_atime - age, part.stat().st_mtime - age))
    assert incoming.sweep() == 0  # both are in the table still
    clock.now += 101.0
    assert incoming.sweep() == 1
    assert [p.stem for p in (tmp_path / "work/incoming").iterdir()] == [sha256_bytes(b"new")]


def test_a_listener_that_fails_takes_nothing_back(tmp_path: Path) -> None:
    def fail(path: Path, sender: str) -> None:
        raise RuntimeError

    incoming = Incoming(tmp_path, BusSettings(min_free_bytes=0), fail)
    assert isinstance(bring(incoming, b"abc"), Durable)
    assert (tmp_path / "inbox" / "a.safetensors").exists()


def test_a_disk_that_fails_while_writing_leaves_no_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming, _ = make_incoming(tmp_path)
    content = noise(100)
    sha256 = sha256_bytes(content)
    incoming.offer("a", 100, sha256, "me")
    incoming.write(sha256, 0, content[:50], "me")
    real = os.pwrite

    def half(handle: int, data: bytes, offset: int) -> int:
        real(handle, bytes(data)[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        refused = incoming.write(sha256, 50, content[50:], "me")
    assert isinstance(refused, Refuse)
    assert refused.retry
    assert (tmp_path / "work/incoming" / f"{sha256}.part").stat().st_size == 50
    incoming.write(sha256, 50, content[50:], "me")
    assert incoming.is_complete(sha256)
    assert isinstance(incoming.finish(sha256), Durable)


def test_a_file_system_without_links_works_and_still_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    incoming, _ = make_incoming(tmp_path)
    assert bring(incoming, b"abc") == Durable(sha256_bytes(b"abc"), "a.safetensors")
    second = bring(incoming, b"def")
    assert isinstance(second, Durable)
    assert second.name != "a.safetensors"
    assert (tmp_path / "inbox" / "a.safetensors").read_bytes() == b"abc"
    assert (tmp_path / "inbox" / second.name).read_bytes() == b"def"
    assert list((tmp_path / "work/incoming").iterdir()) == []


def test_a_longer_leftover_is_begun_anew(tmp_path: Path) -> None:
    incoming, _ = make_incoming(tmp_path)
    sha256 = sha256_bytes(b"abc")
    (tmp_path / "work/incoming" / f"{sha256}.part").write_bytes(b"abcdef")
    assert incoming.offer("a", 3, sha256, "me") == Go(sha256, 0, 1024, 10)


def test_a_file_that_left_the_inbox_unknown_may_come_again(tmp_path: Path) -> None:
    incoming, _ = make_incoming(tmp_path)
    bring(incoming, b"abc")
    (tmp_path / "inbox" / "a.safetensors").unlink()
    assert isinstance(bring(incoming, b"abc"), Durable)
