"""A checkpoint that would harm older tasks: folded with a warning, refused, or held until somebody decides."""

from __future__ import annotations

import json

import pytest
from simulator import Box

from foldd.core.errors import BadSetup, Held, Refused
from foldd.daemon.cli import main
from foldd.daemon.conflicts import decide, find_conflicts

# Two models far from each other harm each other so, and no head makes up for it.
HARSH = {"fold": {"method": "average"}, "heads": {"mode": "frozen"}}


def gentle_then_rough(box: Box) -> None:
    box.start()
    box.drop(box.bundle("gentle", seed=1, scale=0.5, calibration=64))
    box.wait_generation(1)
    box.drop(box.bundle("rough", seed=2, scale=3.0, calibration=64))


def order(box: Box, *words: str) -> int:
    return main([*words, "--config", str(box.config_path)])


def test_conflicts_are_the_shares_under_the_limit_worst_first() -> None:
    scores = {"parity": 1e-7, "retained/a": 0.9, "retained/b": 0.4, "retained/c": 0.1, "accuracy/d": 0.2}
    assert list(find_conflicts(scores, 0.5).items()) == [("c", 0.1), ("b", 0.4)]
    assert find_conflicts(scores, 0.1) == {}


def test_what_is_decided() -> None:
    assert decide("x", {}, "refuse") == ()
    (warning,) = decide("x", {"a": 0.25}, "fold")
    assert "x conflicts with a (25%)" in warning
    with pytest.raises(Held):
        decide("x", {"a": 0.25}, "hold")
    with pytest.raises(Refused) as caught:
        decide("x", {"a": 0.25}, "refuse")
    assert not isinstance(caught.value, Held)


def test_by_default_it_is_folded_and_said(make_box) -> None:
    box: Box = make_box(gate={"conflict": 0.99}, **HARSH)
    gentle_then_rough(box)
    box.wait_generation(2)
    report = json.loads((box.layout.generation(2) / "report.json").read_text())
    assert report["conflicts"] == {"gentle": report["scores"]["retained/gentle"]} == box.status()["conflicts"]
    box.wait(lambda: "rough conflicts with gentle" in box.log.read_text(), "the warning")


def test_a_held_checkpoint_lets_others_pass_and_is_folded_on_a_word(make_box, capsys) -> None:
    box: Box = make_box(gate={"conflict": 0.99, "on_conflict": "hold"}, **HARSH)
    gentle_then_rough(box)
    box.wait(lambda: box.status()["held"], "the holding")
    (held,) = box.status()["held"]
    assert (held["file"], held["code"]) == ("rough.safetensors", "conflict")
    assert box.status()["generation"] == 1
    box.drop(box.bundle("gentle", seed=3, scale=0.5, calibration=64))  # the same task again conflicts with nothing
    box.wait_generation(2)
    assert box.stop() == 0
    box.start()
    assert len(box.status()["held"]) == 1, "a restart does not forget it"
    assert order(box, "retry", held["id"]) == 0
    box.wait_generation(3)
    assert box.history()[-1]["task"] == "rough"
    capsys.readouterr()
    assert order(box, "status") == 0
    assert "held  " not in capsys.readouterr().out
    assert order(box, "retry", held["id"]) == 2, "what is folded cannot be tried again"


def test_a_held_checkpoint_can_be_forgotten_and_come_again(make_box) -> None:
    box: Box = make_box(gate={"conflict": 0.99, "on_conflict": "hold"}, **HARSH)
    gentle_then_rough(box)
    box.wait(lambda: box.status()["held"], "the holding")
    assert order(box, "forget", box.status()["held"][0]["id"]) == 0
    assert box.status()["held"] == []
    assert [a.name for a in box.arrivals()] == ["gentle.safetensors"]
    assert not [p for p in box.layout.work.iterdir() if len(p.name) == 64]
    box.drop(box.folder / "made" / "rough.safetensors")
    box.wait(lambda: box.status()["held"], "the holding of the same file")


def test_what_was_set_aside_is_tried_again_under_other_settings(make_box) -> None:
    """Ordered while no daemon runs: the order waits for its start."""
    box: Box = make_box(gate={"conflict": 0.99, "on_conflict": "refuse"}, **HARSH)
    gentle_then_rough(box)
    box.wait(box.reasons, "the refusal")
    (arrival,) = box.arrivals("quarantined")
    box.stop()
    box.configure(gate={"conflict": 0.0}, **HARSH)
    assert order(box, "retry", arrival.sha256[:8]) == 0
    box.start()
    box.wait_generation(2)
    assert box.reasons() == {}
    assert not list(box.layout.orders.iterdir())


@pytest.mark.parametrize("identifier", ["abc", "0123456789ab"])
def test_an_unknown_id_is_named(make_box, identifier: str, capsys) -> None:
    assert order(make_box(), "retry", identifier) == 2
    assert "checkpoints have an ID" in capsys.readouterr().err


def test_strangers_in_the_order_folder_do_no_harm(make_box) -> None:
    box: Box = make_box()
    box.layout.orders.mkdir()
    (box.layout.orders / "dance-now").touch()
    (box.layout.orders / f"retry-{'0' * 64}").touch()
    box.start()
    box.drop(box.bundle("alpha"))
    box.wait_generation(1)
    assert [p.name for p in box.layout.orders.iterdir()] == ["dance-now"]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(Held) as caught:
        decide("x", {"a": 0.25}, "hold")
    assert "foldd retry" in caught.value.remedy
    assert not isinstance(caught.value, BadSetup)
