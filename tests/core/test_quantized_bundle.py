"""Bundles of 8-bit integers: read as the floats that they stand for, and each way to be malformed by its name."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_bundle import HEAD, SPEC, code_of, raw, weights

from foldd.core.bundle import open_bundle, write_bundle
from foldd.core.errors import BadCheckpoint
from foldd.core.quantized import QuantizedTensor
from foldd.core.roles import Role
from foldd.core.scaled import ScaledTensor
from foldd.core.tensorfile import open_tensors
from foldd.daemon.verify import verify_values

CODES = np.array([[127, -3, 0], [1, 2, -127], [0, 0, 0], [5, -128, 9]], np.int8)
STEPS = np.array([0.5, 0.003, 1e-30, 7], np.float32)
CODED = {"delta__a.weight": CODES, "step__a.weight": STEPS, "delta__a.bias": np.ones(4, np.float32)}
PLAIN = ["model/a.weight", "model/a.bias"]


def coded(path, **changes):
    """A valid bundle of codes with changes; None takes a tensor out."""
    tensors = {name: array for name, array in (CODED | changes).items() if array is not None}
    return raw(path, drop=PLAIN, **tensors)


@pytest.mark.parametrize("steps", [STEPS, np.array(0.25, np.float32)])
@pytest.mark.parametrize("is_delta", [True, False])
def test_round_trip(tmp_path, steps, is_delta):
    path = tmp_path / "x.safetensors"
    parameters = weights() | {"a.weight": QuantizedTensor(CODES, steps, 8)}
    write_bundle(path, parameters, HEAD, task="digits", base=SPEC, is_delta=is_delta)
    stored = load_file(path)
    kind = "delta" if is_delta else "model"
    assert stored[f"{kind}/a.weight"].dtype == np.int8
    assert stored["step/a.weight"].tobytes() == steps.tobytes()
    assert open_tensors(path).metadata["foldd.format"] == "1"
    read = open_bundle(path, SPEC)
    assert read.is_delta == is_delta
    tensor = read.parameters["a.weight"]
    expected = CODES * (steps[:, None] if steps.ndim else steps)
    assert isinstance(tensor, ScaledTensor)
    assert (tensor.is_float, tensor.dtype, tensor.shape, tensor.size, tensor.nbytes) == (True, "I8", (4, 3), 12, 12)
    assert (tensor.stored() == CODES).all()
    for values in (tensor.float32(), np.concatenate(list(tensor.slices(5))), np.concatenate(list(tensor.slices(1)))):
        assert values.dtype == np.float32
        assert values.tobytes() == expected.astype(np.float32).tobytes()
    for start, stop in ((0, 0), (2, 7), (11, 12), (9, 99)):
        assert (tensor.piece(start, stop) == expected.reshape(-1)[start:stop]).all()
    assert (read.parameters["a.bias"].float32() == 1).all()


def test_packed_twice_is_equal_bytes(tmp_path):
    for name in ("a", "b", "c"):
        parameters = weights() | {"a.weight": QuantizedTensor(CODES, STEPS, 8)}
        write_bundle(tmp_path / name, parameters, HEAD, task="digits", base=SPEC, is_delta=True)
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c")}) == 1


def test_a_bundle_of_floats_is_the_bytes_that_it_always_was(tmp_path):
    """The digest is of a bundle from before there were integers: the same content must never fold twice."""
    inputs, labels = np.ones((5, 3), np.float32), np.array([0, 1, 1, 0, 1])
    write_bundle(
        tmp_path / "x", weights(), HEAD, task="digits", base=SPEC, is_delta=True, inputs=inputs, labels=labels,
        samples=9, classes=("x", "y"),
    )  # fmt: skip
    assert (
        hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
        == "38424de6cfa48057a6b34d18276e11ce04b7274a2f70553f7c219e89dc413987"
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"step__a.weight": None}, "codes-without-step"),
        ({"delta__a.bias": np.ones(4, np.int8)}, "codes-without-step"),
        ({"step__a.bias": np.ones(4, np.float32)}, "step-without-codes"),
        ({"step__nope": np.ones(4, np.float32)}, "step-without-codes"),
        ({"delta__a.weight": CODES.astype(np.int16)}, "step-without-codes"),
        ({"delta__a.weight": CODES.astype(np.uint8)}, "step-without-codes"),
        ({"step__a.weight": np.ones(3, np.float32)}, "bad-step"),
        ({"step__a.weight": np.ones((4, 1), np.float32)}, "bad-step"),
        ({"step__a.weight": np.ones(4, np.float64)}, "bad-step"),
        ({"step__a.weight": np.ones(4, np.int8)}, "bad-step"),
        ({"step__a.weight": np.array([1, 0, 1, 1], np.float32)}, "bad-step"),
        ({"step__a.weight": np.array([1, -1, 1, 1], np.float32)}, "bad-step"),
        ({"step__a.weight": np.array([1, np.nan, 1, 1], np.float32)}, "bad-step"),
        ({"step__a.weight": np.array([1, np.inf, 1, 1], np.float32)}, "bad-step"),
        ({"delta__a.weight": CODES[:, :2]}, "wrong-shape"),
        ({"delta__a.weight": np.zeros((), np.int8), "step__a.weight": np.ones(1, np.float32)}, "bad-step"),
        ({"steps__a.weight": STEPS}, "unknown-tensors"),
        ({"delta__a.weight": None, "step__a.weight": None}, "missing-tensors"),
    ],
)
def test_malformed(tmp_path, changes, code):
    assert open_bundle(coded(tmp_path / "good"), SPEC).parameters["a.weight"].is_float
    assert code_of(coded(tmp_path / "x", **changes)) == code


def test_an_integer_counter_needs_no_step(tmp_path):
    path = coded(tmp_path / "x", **{"delta__bn.count": np.array(3, np.int8), "delta__extra": np.ones(2, np.int8)})
    assert set(open_bundle(path, SPEC).parameters) == {"a.weight", "a.bias"}


def test_the_content_digest_covers_the_steps(tmp_path):
    path = tmp_path / "x.safetensors"
    parameters = weights() | {"a.weight": QuantizedTensor(CODES, STEPS, 8)}
    write_bundle(path, parameters, HEAD, task="digits", base=SPEC, is_delta=True)
    content = path.read_bytes()
    assert content.count(STEPS.tobytes()) == 1
    path.write_bytes(content.replace(STEPS.tobytes(), (2 * STEPS).tobytes()))
    assert code_of(path) == "content-mismatch"


def test_tied_tensors_are_compared_by_what_they_stand_for(tmp_path):
    alias = {"delta__b.weight": CODES, "step__b.weight": STEPS}
    assert "b.weight" not in open_bundle(coded(tmp_path / "x", **alias), SPEC).parameters
    same = CODES * STEPS[:, None]
    assert "a.weight" in open_bundle(coded(tmp_path / "y", **{"delta__b.weight": same}), SPEC).parameters
    alias["step__b.weight"] = 2 * STEPS
    assert code_of(coded(tmp_path / "z", **alias)) == "untied"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"delta__a.weight": 0 * CODES, "delta__a.bias": np.zeros(4, np.float32)}, "all-zero"),
        ({"step__a.weight": np.full(4, 3e38, np.float32)}, "not-finite"),
        ({}, None),
    ],
)
def test_values_are_looked_at_as_floats(tmp_path, changes, code):
    checkpoint = open_bundle(coded(tmp_path / "x", **changes), SPEC)
    found = None
    try:
        verify_values(checkpoint, lambda _: Role.MATRIX, lambda _: np.zeros(0, np.float32))
    except BadCheckpoint as error:
        found = error.code
    assert found == code


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_gets_past_the_reader_unnamed(tmp_path_factory, data):
    """As for bundles of floats, without the digest of the content that would find most of it."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    content = bytearray(coded(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(BadCheckpoint):
        for tensor in open_bundle(path, SPEC).parameters.values():
            assert tensor.float32().shape == tensor.shape


def test_a_plain_checkpoint_has_no_integers(tmp_path):
    save_file(weights() | {"a.weight": CODES, "fc.weight": HEAD.weight}, tmp_path / "birds.safetensors")
    assert code_of(tmp_path / "birds.safetensors") == "codes-without-step"
