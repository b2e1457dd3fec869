"""`[heads]` on its way from the configuration to what is served."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from simulator import Box

from foldd.daemon.plan import make_plan, stored_plan
from foldd.daemon.settings import Heads, Settings


def plan_of(heads: Heads) -> dict:
    return make_plan(Settings(heads=heads), "digest", None)


def folded(box: Box, *bundles: Path) -> dict:
    """Folds bundles one by one; the last report."""
    box.start()
    for number, bundle in enumerate(bundles, 1):
        box.drop(bundle)
        box.wait_generation(number)
    return json.loads((box.layout.current / "report.json").read_text())["fold"]


def without_labels(bundle: Path) -> Path:
    with safe_open(bundle, "np") as file:
        metadata = dict(file.metadata())
    metadata.pop("foldd.content")
    tensors = load_file(bundle)
    del tensors["calibration/labels"]
    save_file(tensors, bundle, metadata)
    return bundle


def served(box: Box, task: str) -> np.ndarray:
    session = onnxruntime.InferenceSession(box.layout.current / "model.onnx")
    x = np.random.default_rng(0).standard_normal((4, 1, 8, 8), dtype=np.float32)
    return session.run([f"logits/{task}"], {"input": x})[0]


def test_the_table_is_the_alignments_own_fields():
    """Settings are typed without torch; here they are held against the dataclass that does the work."""
    from foldd.fusion.alignment import Alignment, Mode, Weighting

    assert msgspec.structs.asdict(Heads()) == {field.name: field.default for field in dataclasses.fields(Alignment)}
    plan = stored_plan(plan_of(Heads()))
    assert Alignment(plan.heads, **plan.head_options) == Alignment()
    told = stored_plan(plan_of(Heads("tuned", pull=5.0, drift=0.5, labels=0.0)))
    assert Alignment(told.heads, **told.head_options) == Alignment("tuned", pull=5.0, drift=0.5, labels=0.0)
    assert Alignment(**msgspec.structs.asdict(Heads("tuned", weighting="uowq"))).weighting == "uowq"
    types = {field.name: field.type for field in msgspec.structs.fields(Heads)}
    assert (types["mode"], types["weighting"]) == (Mode, Weighting)


def test_a_plan_from_before_heads_could_move_leaves_them():
    old = plan_of(Heads())
    del old["heads"], old["head_options"]
    plan = stored_plan(old)
    assert (plan.heads, plan.head_options) == ("frozen", {})


def test_a_plan_from_before_samples_were_borrowed_borrows_none():
    from foldd.fusion.alignment import Alignment

    old = plan_of(Heads("tuned"))
    del old["head_options"]["weighting"]
    plan = stored_plan(old)
    assert Alignment(plan.heads, **plan.head_options) == Alignment("tuned")


@pytest.mark.parametrize(
    "wrong", [{"mode": "thawed"}, {"pull": 0.0}, {"drift": 1.5}, {"labels": -1.0}, {"ridge": 1}, {"weighting": 1}]
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Heads)


def test_heads_move_as_told_and_the_report_says_how_far(make_box):
    answers = {}
    for mode in ("frozen", "tuned"):
        box: Box = make_box(name=mode, heads={"mode": mode})
        report = folded(box, box.bundle("alpha", seed=1, scale=0.5), box.bundle("beta", seed=2, scale=0.5))
        assert report["heads"].keys() == (set() if mode == "frozen" else {"alpha", "beta"})
        assert report["warnings"] == []
        answers[mode] = [served(box, task) for task in ("alpha", "beta")]
    for frozen, tuned in zip(*answers.values(), strict=True):
        assert not np.allclose(frozen, tuned, atol=1e-4)


def test_tuning_without_labels_warns_and_aligns(make_box):
    boxes = {mode: make_box(name=mode, heads={"mode": mode}) for mode in ("aligned", "tuned")}
    made = [boxes["tuned"].bundle(name, seed=seed, scale=0.5) for seed, name in enumerate(("alpha", "beta"))]
    bundles = [without_labels(bundle) for bundle in made]  # the same files for both: a fold's seed is their digest
    aligned, tuned = (folded(box, *bundles) for box in boxes.values())
    assert tuned["warnings"] == ["beta brings no labels: its head is aligned, and not tuned."]
    assert aligned["warnings"] == []
    assert tuned["heads"] == aligned["heads"]
    np.testing.assert_array_equal(*(served(box, "beta") for box in boxes.values()))


def test_domains_of_equal_classes_borrow_samples_and_the_report_says_by_what_weight(make_box):
    names = ("cat", "dog", "owl")
    answers, weights = {}, {}
    for weighting in ("none", "uowq"):
        box: Box = make_box(name=weighting, heads={"mode": "tuned", "weighting": weighting})
        bundles = [box.bundle(n, seed=i, scale=0.5, names=names) for i, n in enumerate(("photo", "sketch"))]
        report = folded(box, *bundles)
        assert report["warnings"] == []
        weights[weighting] = report["source_weights"]
        answers[weighting] = [served(box, task) for task in ("photo", "sketch")]
        for state in box.layout.blobs.iterdir():
            with safe_open(state, "np") as file:
                assert ("calibration/labels" in set(file.keys())) == (weighting == "uowq")
    assert weights["none"] == {}
    assert weights["uowq"].keys() == {"photo", "sketch"}
    assert all(0 < weight < 1 for weight in weights["uowq"].values())
    for plain, weighed in zip(*answers.values(), strict=True):
        assert not np.allclose(plain, weighed, atol=1e-4)
