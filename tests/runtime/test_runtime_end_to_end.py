"""Daemon's bus and device together, on the loopback, with CURVE on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from runtime_kit import DAEMON, publish, samples, wait_for

from foldd.core.errors import BadManifest, BadRequest, BadSetup, Unavailable
from foldd.core.files import write_file
from foldd.core.signatures import Identity, new_identity
from foldd.daemon.bus.desk import current_generation
from foldd.daemon.bus.server import BusServer
from foldd.daemon.bus.settings import BusSettings
from foldd.runtime.client import Runtime
from foldd.runtime.fetch import Fetcher, Source
from foldd.runtime.store import Store

DEVICE, SUBMITTER = new_identity("device"), new_identity("submitter")


@contextmanager
def daemon(tmp_path: Path, **how: Any) -> Iterator[tuple[BusServer, Path]]:
    root = tmp_path / "daemon"
    for folder, identity in (("devices", DEVICE), ("submitters", SUBMITTER)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_file(tmp_path / folder / f"{identity.name}.pub", msgspec.json.encode(identity.public))
    settings = BusSettings(**{
        "bind": "tcp://127.0.0.1:*", "announce": "tcp://127.0.0.1:*", "chunk_bytes": 4096, "allow_list_poll_s": 0.05,
        "devices": str(tmp_path / "devices"), "submitters": str(tmp_path / "submitters"), **how,
    })  # fmt: skip
    server = BusServer(settings, DAEMON, root, lambda path, sender: None, lambda: current_generation(root))
    server.start()
    try:
        yield server, root
    finally:
        server.stop()


def source(server: BusServer, identity: Identity | None = DEVICE, **how: Any) -> Source:
    return Source(
        server.bind_endpoint,
        identity,
        DAEMON.public,
        **{"announcements": server.announce_endpoint, "timeout_s": 5.0, **how},
    )


def make_fetcher(tmp_path: Path, server: BusServer, **how: Any) -> Fetcher:
    return Fetcher(source(server, **how), Store(tmp_path / "device", [DAEMON.public]))


def test_announced_fetched_swapped_answered(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        runtime = Runtime(tmp_path / "device", source(server), [DAEMON.public], threads=1)
        turns = []
        runtime.start(lambda: turns.append(1))
        for generation in (1, 2, 3):
            publish(root, generation, padding=100_000)
            server.announce()
            wait_for(lambda generation=generation: runtime.slot.generation == generation)  # type: ignore[misc]
            logits, served = runtime.infer("dogs", samples())
            assert served == generation
            assert np.all(logits == generation)
        runtime.stop()
        assert not runtime.alive
        assert turns
    # What was fetched is served without a daemon.
    assert Runtime(tmp_path / "device", None, [DAEMON.public], threads=1).infer("cats", samples())[1] == 3


def test_a_late_joiner_gets_the_current_generation_without_asking(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        publish(root, 5, padding=100_000)
        server.announce()
        fetcher = make_fetcher(tmp_path, server)
        fetcher._asked = float("inf")  # it never asks: only the announcement can tell, and that tells no chunk size
        manifest = fetcher.poll(10.0)
        assert manifest is not None
        assert manifest.generation == 5
        fetcher.close()


def test_without_announcements_it_asks(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        fetcher = make_fetcher(tmp_path, server, announcements=None, ask_s=0.05)
        assert fetcher.poll(0.2) is None
        publish(root, 1)
        manifest = fetcher.poll(5.0)
        assert manifest is not None
        assert manifest.generation == 1
        assert fetcher.poll(0.2) is None
        fetcher.close()


def test_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        folder = publish(root, 1, padding=300_000)
        fetcher = make_fetcher(tmp_path, server)
        manifest = fetcher.store.admit((folder / "manifest.json").read_bytes())
        assert manifest is not None
        fetcher.store.begin(manifest)
        fetcher.store.write(manifest, 0, (folder / "model.onnx").read_bytes()[:200_001])
        seen: list[int] = []
        fetcher._progress = lambda done, total: seen.append(done)
        assert fetcher.fetch().generation == 1
        assert min(seen) > 200_001
        fetcher.close()


def test_a_daemon_that_restarts_in_the_middle_is_waited_for(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        publish(root, 1, padding=5_000_000)
        fetcher = make_fetcher(tmp_path, server)
        middle = threading.Event()
        fetcher._progress = lambda done, total: middle.set() if done > total // 10 else None
        fetched: list[int] = []
        thread = threading.Thread(target=lambda: fetched.append(fetcher.fetch().generation))
        thread.start()
        assert middle.wait(10)
        endpoint = server.bind_endpoint
        server.stop()
    with daemon(tmp_path, bind=endpoint):
        thread.join(20)
    assert fetched == [1]
    fetcher.close()


@pytest.mark.parametrize("attack", ["flipped", "older", "swapped", "stranger"])
def test_what_must_not_be_trusted_is_refused_with_its_reason(tmp_path: Path, attack: str) -> None:
    with daemon(tmp_path) as (server, root):
        publish(root, 4)
        runtime = Runtime(
            tmp_path / "device", source(server, announcements=None, ask_s=0.01), [DAEMON.public], threads=1
        )
        assert runtime.poll(5.0) == 4
        if attack == "older":
            publish(root, 3)
        else:
            folder = publish(root, 5, identity=new_identity("mallory") if attack == "stranger" else DAEMON)
        if attack == "flipped":
            data = bytearray((folder / "manifest.json").read_bytes())
            at = data.index(b'"method":"average"') + 12
            data[at] ^= 1
            (folder / "manifest.json").write_bytes(data)
        if attack == "swapped":
            data = bytearray((folder / "model.onnx").read_bytes())
            data[len(data) // 2] ^= 1
            (folder / "model.onnx").write_bytes(data)
        codes = {
            "flipped": "bad-signature",
            "older": "generation-not-rising",
            "swapped": "artifact-digest",
            "stranger": "unknown-signer",
        }
        with pytest.raises(BadManifest) as raised:
            runtime.poll(5.0)
        assert raised.value.code == codes[attack]
        assert runtime.last_error is raised.value
        assert runtime.infer("cats", samples())[1] == 4
        publish(root, 6)
        assert runtime.poll(5.0) == 6
        runtime.stop()


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_device_recovers_from_a_damaged_generation(tmp_path: Path, name: str) -> None:
    with daemon(tmp_path) as (server, root):
        for generation in (1, 2):
            publish(root, generation)
            fetcher = make_fetcher(tmp_path, server)
            fetcher.fetch()
            fetcher.close()
        file = tmp_path / "device" / "current" / name
        content = file.read_bytes()
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        runtime = Runtime(tmp_path / "device", source(server), [DAEMON.public], threads=1)
        assert runtime.slot.generation == 1  # meanwhile
        runtime.start()
        wait_for(lambda: runtime.slot.generation == 2)
        runtime.stop()
        assert runtime.slot.last_error is None
        assert file.read_bytes() == content


def test_an_artifact_of_another_length_ends_at_the_signed_one(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        model = publish(root, 1) / "model.onnx"
        model.write_bytes(model.read_bytes()[:-100])
        fetcher = make_fetcher(tmp_path, server)
        with pytest.raises(BadManifest) as raised:
            fetcher.fetch()
        assert raised.value.code == "artifact-size"
        assert fetcher.store.current() is None
        fetcher.close()


def test_a_key_that_is_not_on_the_list_is_refused_and_may_come_back(tmp_path: Path) -> None:
    other = new_identity("other")
    with daemon(tmp_path) as (server, root):
        publish(root, 1)
        fetcher = Fetcher(source(server, other), Store(tmp_path / "device", [DAEMON.public]))
        with pytest.raises(BadSetup) as raised:
            fetcher.fetch()
        assert raised.value.code == "key-refused"
        write_file(tmp_path / "devices" / "other.pub", msgspec.json.encode(other.public))
        wait_for(lambda: other.public.curve_public in server._devices)
        assert fetcher.fetch().generation == 1
        fetcher.close()


def test_a_submitter_may_not_fetch(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        publish(root, 1)
        fetcher = Fetcher(source(server, SUBMITTER, announcements=None), Store(tmp_path / "device", [DAEMON.public]))
        with pytest.raises(BadRequest) as raised:
            fetcher.fetch()
        assert raised.value.code == "not-a-device"
        fetcher.close()


def test_before_the_first_fold_it_waits(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        fetcher = make_fetcher(tmp_path, server)
        with pytest.raises(Unavailable) as raised:
            fetcher.fetch()
        assert raised.value.code == "no-generation"
        assert fetcher.poll(0.1) is None
        publish(root, 1)
        server.announce()
        assert fetcher.poll(10.0) is not None
        fetcher.close()


def test_nobody_there_is_a_timeout_and_the_thread_goes_on(tmp_path: Path) -> None:
    nowhere = Source("tcp://127.0.0.1:9", DEVICE, DAEMON.public, timeout_s=0.2)
    runtime = Runtime(tmp_path / "device", nowhere, [DAEMON.public])
    runtime.start()
    wait_for(lambda: runtime.last_error is not None)
    assert runtime.alive
    runtime.stop()
    assert runtime.last_error is not None
    assert runtime.last_error.code == "bus-timeout"


def test_stopping_ends_a_transfer_and_keeps_what_came(tmp_path: Path) -> None:
    with daemon(tmp_path) as (server, root):
        publish(root, 1, padding=5_000_000)
        fetcher = make_fetcher(tmp_path, server)
        fetcher._progress = lambda done, total: fetcher.stopping.set() if done > total // 10 else None
        with pytest.raises(Unavailable) as raised:
            fetcher.fetch()
        assert raised.value.code == "stopped"
        part = next((tmp_path / "device" / "incoming").iterdir())
        assert part.stat().st_size > 500_000


def test_plaintext_to_another_machine_is_refused(tmp_path: Path) -> None:
    for where in (Source("tcp://192.0.2.1:5757"), Source("tcp://127.0.0.1:9", announcements="tcp://192.0.2.1:5758")):
        with pytest.raises(BadSetup) as raised:
            Fetcher(where, Store(tmp_path / "device", [DAEMON.public]))
        assert raised.value.code == "plaintext-not-loopback"
