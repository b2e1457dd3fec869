"""Swapping generations under requests."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from runtime_kit import DAEMON, publish, samples

from foldd.core.errors import FolddError, Unavailable
from foldd.core.files import point
from foldd.core.signatures import new_identity
from foldd.runtime.slot import Slot, SwapPolicy


def test_an_empty_directory_serves_nothing_and_says_so(tmp_path: Path) -> None:
    slot = Slot(tmp_path)
    assert not slot.refresh()
    with pytest.raises(Unavailable) as raised:
        slot.infer("cats", samples())
    assert raised.value.code == "no-generation"


def test_follows_current(tmp_path: Path) -> None:
    slot = Slot(tmp_path, [DAEMON.public], threads=1)
    for generation in (1, 2):
        publish(tmp_path, generation)
        assert slot.refresh()
        assert not slot.refresh()
        logits, served = slot.infer("cats", samples())
        assert served == generation
        assert np.all(logits == generation)


def test_a_directory_that_vanishes_unloads_nothing(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    slot = Slot(tmp_path, threads=1)
    slot.refresh()
    (tmp_path / "current").unlink()
    assert not slot.refresh()
    assert slot.infer("cats", samples())[1] == 1


@pytest.mark.parametrize("policy", list(SwapPolicy))
def test_rolls_back_until_current_moves_on(tmp_path: Path, policy: SwapPolicy) -> None:
    slot = Slot(tmp_path, policy=policy, threads=1)
    with pytest.raises(Unavailable):
        slot.rollback()
    for generation in (1, 2):
        publish(tmp_path, generation)
        slot.refresh()
    assert slot.rollback() == 1
    assert not slot.refresh()
    assert slot.infer("cats", samples())[1] == 1
    publish(tmp_path, 3)
    assert slot.refresh()
    assert slot.generation == 3


def test_the_memory_policy_holds_one_session(tmp_path: Path) -> None:
    slot = Slot(tmp_path, policy=SwapPolicy.MEMORY, threads=1)
    for generation in (1, 2, 3):
        publish(tmp_path, generation)
        slot.refresh()
    assert slot._previous is None


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda data: data[:-1], "artifact-size"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "artifact-digest"),
    ],
)
def test_a_corrupt_artifact_keeps_the_old_one_serving(tmp_path: Path, damage: object, code: str) -> None:
    publish(tmp_path, 1)
    slot = Slot(tmp_path, threads=1)
    slot.refresh()
    model = publish(tmp_path, 2) / "model.onnx"
    model.write_bytes(damage(model.read_bytes()))  # type: ignore[operator]
    assert not slot.refresh()
    assert not slot.refresh()
    assert slot.last_error is not None
    assert slot.last_error.code == code
    assert slot.infer("cats", samples())[1] == 1
    publish(tmp_path, 3)
    assert slot.refresh()
    assert slot.last_error is None


def test_an_artifact_of_another_generation_is_noticed(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    slot = Slot(tmp_path, threads=1)
    slot.refresh()
    folder = publish(tmp_path, 2)
    (folder / "model.onnx").write_bytes((tmp_path / "generations/000001/model.onnx").read_bytes())
    assert not slot.refresh()
    assert slot.last_error is not None
    assert slot.last_error.code in ("artifact-digest", "artifact-size")


def test_another_signer_is_refused_where_signatures_count(tmp_path: Path) -> None:
    publish(tmp_path, 1, identity=new_identity("somebody"))
    slot = Slot(tmp_path, [DAEMON.public])
    assert not slot.refresh()
    with pytest.raises(FolddError) as raised:
        slot.infer("cats", samples())
    assert raised.value.code == "unknown-signer"


def test_a_cold_start_falls_back_to_an_older_generation(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (publish(tmp_path, 2) / "model.onnx").write_bytes(b"")
    slot = Slot(tmp_path, threads=1)
    assert slot.refresh()
    assert slot.generation == 1
    assert slot.last_error is not None


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    (folder / "model.onnx").rename(tmp_path / "away")
    slot = Slot(tmp_path, threads=1)
    assert not slot.refresh()
    (tmp_path / "away").rename(folder / "model.onnx")
    assert slot.refresh()


@pytest.mark.parametrize("policy", list(SwapPolicy))
def test_no_request_fails_or_mixes_generations_while_swapping(tmp_path: Path, policy: SwapPolicy) -> None:
    for generation in range(1, 5):
        publish(tmp_path, generation)
    slot = Slot(tmp_path, policy=policy, threads=1)
    slot.refresh()
    done = threading.Event()
    answered, wrong = [0, 0, 0], []

    def ask(who: int) -> None:
        while not done.is_set():
            try:
                logits, generation = slot.infer("dogs", samples(3))
                if not np.all(logits == generation):
                    wrong.append(f"generation {generation} answered {logits}")
                answered[who] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, a request failed
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        point(tmp_path / "current", f"generations/{turn % 4 + 1:06d}")
        assert slot.refresh()
    done.set()
    for thread in threads:
        thread.join(10)
    assert wrong == []
    assert min(answered) > 0
