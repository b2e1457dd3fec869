"""A publisher announces, daemons pull."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bus_kit import DAEMON, STRANGER, SUBMITTER, RawClient, make_file, wait_for

from foldd.core.digests import sha256_file
from foldd.core.errors import BadRequest, BadSetup, FolddError, Unavailable
from foldd.core.signatures import Identity, new_identity
from foldd.core.wire import Announce, Subscribe
from foldd.daemon.bus.auth import AllowList
from foldd.daemon.bus.incoming import Incoming
from foldd.daemon.bus.publisher import PublishResult, publish_file
from foldd.daemon.bus.puller import Puller
from foldd.daemon.bus.settings import BusSettings, PublisherSettings

PUBLISHER = new_identity("publisher")


class Publishing(threading.Thread):
    """`publish_file` in a thread."""

    def __init__(self, path: Path, daemons: list[Identity], endpoint: str = "tcp://127.0.0.1:*", **how: Any) -> None:
        super().__init__(daemon=True)
        self._call = (path, endpoint, PUBLISHER, AllowList(keys=[d.public for d in daemons]))
        self._how, self._bound = {"timeout_s": 15.0, **how}, queue.SimpleQueue[str]()
        self.outcome: PublishResult | FolddError | None = None
        self.start()
        self.endpoint = self._bound.get(timeout=5)

    def run(self) -> None:
        try:
            self.outcome = publish_file(*self._call, bound=self._bound.put, **self._how)
        except FolddError as error:
            self.outcome = error


@contextmanager
def pulling(
    tmp_path: Path,
    endpoint: str,
    identity: Identity = DAEMON,
    on_submitted: Callable[[Path, str], None] = lambda path, sender: None,
    **how: Any,
) -> Iterator[Puller]:
    key = tmp_path / "publisher.pub"
    key.write_bytes(msgspec.json.encode(PUBLISHER.public))
    settings = BusSettings(
        subscribe=(PublisherSettings(endpoint, str(key)),), min_free_bytes=0, subscribe_poll_s=0.1, **how
    )
    puller = Puller(settings, identity, Incoming(tmp_path / identity.name, settings, on_submitted))
    puller.start()
    try:
        yield puller
    finally:
        puller.stop()


def test_what_is_announced_is_pulled_and_confirmed(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors", 300_000)
    publishing, senders = Publishing(path, [DAEMON]), list[str]()
    with pulling(
        tmp_path, publishing.endpoint, on_submitted=lambda path, sender: senders.append(sender), chunk_bytes=4096
    ):
        publishing.join(15)
    assert senders == [f"publisher:{publishing.endpoint}"]
    result = publishing.outcome
    assert isinstance(result, PublishResult)
    assert result.stored == {DAEMON.public.curve_public: "daemon"}
    assert (tmp_path / "daemon/inbox/cats.safetensors").read_bytes() == path.read_bytes()


def test_waits_for_as_many_daemons_as_asked(tmp_path: Path) -> None:
    other = new_identity("other")
    path = make_file(tmp_path / "cats.safetensors")
    publishing = Publishing(path, [DAEMON, other], confirmations=2)
    with pulling(tmp_path, publishing.endpoint):
        wait_for((tmp_path / "daemon/inbox/cats.safetensors").exists)
        assert publishing.is_alive()
        with pulling(tmp_path, publishing.endpoint, other):
            publishing.join(15)
    assert isinstance(publishing.outcome, PublishResult)
    assert len(publishing.outcome.stored) == 2


def test_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors", 300_000)
    part = tmp_path / "daemon" / "work" / "incoming" / f"{sha256_file(path)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(path.read_bytes()[:123_456])
    publishing = Publishing(path, [DAEMON])
    with pulling(tmp_path, publishing.endpoint):
        publishing.join(15)
    assert isinstance(publishing.outcome, PublishResult)
    assert (tmp_path / "daemon/inbox/cats.safetensors").read_bytes() == path.read_bytes()


def test_a_tail_that_a_power_cut_took_is_pulled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldd.daemon.bus.puller._RETRY_S", 0.05)
    path = make_file(tmp_path / "cats.safetensors", 300_000)
    part = tmp_path / "daemon" / "work" / "incoming" / f"{sha256_file(path)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(path.read_bytes()[:100_000] + bytes(20_000))
    publishing = Publishing(path, [DAEMON])
    with pulling(tmp_path, publishing.endpoint):
        publishing.join(15)
    assert isinstance(publishing.outcome, PublishResult)
    assert (tmp_path / "daemon/inbox/cats.safetensors").read_bytes() == path.read_bytes()


def test_wrong_bytes_are_declined_but_not_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldd.daemon.bus.puller._MISMATCH_S", 0.5)
    path = make_file(tmp_path / "cats.safetensors", 30_000)
    content = path.read_bytes()
    publishing = Publishing(path, [DAEMON, STRANGER])  # so that it does not give up when one declines
    path.write_bytes(bytes(30_000))
    with pulling(tmp_path, publishing.endpoint) as puller:
        wait_for(lambda: "digest" in puller.errors.get(publishing.endpoint, ""))
        path.write_bytes(content)
        publishing.join(15)
    assert isinstance(publishing.outcome, PublishResult)
    assert DAEMON.public.curve_public in publishing.outcome.stored
    assert (tmp_path / "daemon/inbox/cats.safetensors").read_bytes() == content


def test_a_daemon_that_may_not_is_refused_and_knows_why(tmp_path: Path) -> None:
    publishing = Publishing(make_file(tmp_path / "cats.safetensors"), [DAEMON], timeout_s=1.5)
    with pulling(tmp_path, publishing.endpoint, STRANGER) as puller:
        wait_for(lambda: "refused" in puller.errors.get(publishing.endpoint, ""))
    publishing.join(10)
    assert isinstance(publishing.outcome, Unavailable)


def test_a_publisher_with_another_key_gets_nobody(tmp_path: Path) -> None:
    publishing = Publishing(make_file(tmp_path / "cats.safetensors"), [SUBMITTER], timeout_s=1.5)
    with RawClient(publishing.endpoint, SUBMITTER, STRANGER) as client:
        assert client.ask(Subscribe(), seconds=0.5) is None
    with RawClient(publishing.endpoint, SUBMITTER, PUBLISHER) as client:
        answer = client.ask(Subscribe())
        assert answer is not None
        assert isinstance(answer[0], Announce)


def test_what_a_daemon_declines_is_told(tmp_path: Path) -> None:
    publishing = Publishing(make_file(tmp_path / "cats.safetensors"), [DAEMON])
    with pulling(tmp_path, publishing.endpoint, max_bundle_bytes=100):
        publishing.join(15)
    assert isinstance(publishing.outcome, BadRequest)
    assert "too-large" in publishing.outcome.what


def test_nobody_comes(tmp_path: Path) -> None:
    publishing = Publishing(make_file(tmp_path / "cats.safetensors"), [DAEMON], timeout_s=0.2)
    publishing.join(5)
    assert isinstance(publishing.outcome, Unavailable)


def test_mistakes_in_the_settings_are_said_at_once(tmp_path: Path) -> None:
    for settings, identity, code in (
        (BusSettings(subscribe=(PublisherSettings("tcp://127.0.0.1:1"),)), None, "no-identity"),
        (BusSettings(subscribe=(PublisherSettings("tcp://127.0.0.1:1"),)), DAEMON, "no-server-key"),
        (BusSettings(subscribe=(PublisherSettings("tcp://127.0.0.1:1", "/none.pub"),)), DAEMON, "no-key"),
        (
            BusSettings(subscribe=(PublisherSettings("tcp://192.0.2.1:1"),), plaintext=True),
            None,
            "plaintext-not-loopback",
        ),
    ):
        with pytest.raises(BadSetup) as raised:
            Puller(settings, identity, Incoming(tmp_path, settings, lambda path, sender: None))
        assert raised.value.code == code
