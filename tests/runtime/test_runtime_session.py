"""One loaded generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runtime_kit import make_manifest, make_model, samples

from foldd.core.errors import BadManifest, BadRequest, Unavailable
from foldd.runtime.session import Session


def open_session(tmp_path: Path, **how: object) -> Session:
    model = tmp_path / "model.onnx"
    make_model(model, 5.0, **how)  # type: ignore[arg-type]
    return Session(model, make_manifest(model, 1), threads=1)


def test_answers_one_task_and_the_features(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    assert np.array_equal(session.infer("dogs", samples(4)), np.full((4, 3), 5.0))
    assert session.features(samples(4)).shape == (4, 3)


def test_a_head_that_fails_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as raised:
        open_session(tmp_path, broken="dogs").infer("dogs", samples())
    assert raised.value.code == "inference-failed"


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as raised:
        open_session(tmp_path).infer("cat", samples())
    assert raised.value.code == "unknown-task"
    assert "'cats'" in raised.value.remedy


@pytest.mark.parametrize("inputs", [np.ones(4), np.ones((2, 5)), np.ones((2, 4, 1)), np.ones((0, 4)), np.float32(1)])
def test_a_wrong_shape_says_what_is_needed(tmp_path: Path, inputs: np.ndarray) -> None:
    with pytest.raises(BadRequest) as raised:
        open_session(tmp_path).infer("cats", np.asarray(inputs, np.float32))
    assert raised.value.code == "wrong-shape"
    assert "[n, 4]" in raised.value.what


def test_a_single_sample_is_told_to_add_the_batch(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"x\[None\]"):
        open_session(tmp_path).infer("cats", np.ones(4, np.float32))


def test_a_wrong_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as raised:
        open_session(tmp_path).infer("cats", np.ones((1, 4)))
    assert raised.value.code == "wrong-type"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"nothing like it")
    with pytest.raises(BadManifest) as raised:
        Session(model, make_manifest(model, 1))
    assert raised.value.code == "artifact-unloadable"


def test_a_model_that_lacks_a_task_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    make_model(model, 1.0, {"cats": 2})
    with pytest.raises(BadManifest, match="logits/dogs") as raised:
        Session(model, make_manifest(model, 1))
    assert raised.value.code == "artifact-differs"


def test_warming_up_finds_a_broken_head_and_a_wrong_width(tmp_path: Path) -> None:
    with pytest.raises(BadManifest) as raised:
        open_session(tmp_path, broken="dogs").warm_up()
    assert raised.value.code == "artifact-fails"
    model = tmp_path / "model.onnx"
    make_model(model, 1.0, {"cats": 2, "dogs": 4})
    with pytest.raises(BadManifest) as raised:
        Session(model, make_manifest(model, 1)).warm_up()
    assert raised.value.code == "artifact-differs"
