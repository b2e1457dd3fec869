"""A checkpoint's numbers: what no network can have is named, with what to do."""

from __future__ import annotations

import numpy as np
import pytest

from foldd.core.base_spec import BaseSpec, TensorSpec
from foldd.core.bundle import Head, open_bundle, write_bundle
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.daemon.verify import verify_values

SPEC = BaseSpec(
    digest="ab" * 32,
    tensors={"a.weight": TensorSpec((4, 3), Role.MATRIX), "bn.running_var": TensorSpec((2,), Role.STATISTIC)},
    input_shape=(3,),
    features=4,
    head="fc",
)


@pytest.mark.parametrize(("is_delta", "variance"), [(False, -0.25), (True, -1.25)])
def test_negative_variance(tmp_path, is_delta, variance):
    weights = {"a.weight": np.ones((4, 3), np.float32), "bn.running_var": np.array([1, variance], np.float32)}
    head = Head(np.ones((2, 4), np.float32), np.zeros(2, np.float32))
    write_bundle(tmp_path / "t.safetensors", weights, head, task="t", base=SPEC, is_delta=is_delta)
    checkpoint = open_bundle(tmp_path / "t.safetensors", SPEC)
    with pytest.raises(BadCheckpoint) as caught:
        verify_values(checkpoint, lambda name: SPEC.tensors[name].role, lambda name: np.ones(2, np.float32))
    assert caught.value.code == "negative-variance"
    assert "-0.25" in caught.value.what
    assert caught.value.why
    assert caught.value.remedy
