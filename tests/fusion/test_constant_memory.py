"""Folding leaves nothing behind but heads: bytes of all tensors alive, counted after each of a few folds."""

from __future__ import annotations

import pytest

from foldd.daemon.methods import METHODS
from foldd.daemon.pipeline import tensor_bytes


@pytest.mark.parametrize("name", METHODS)
def test_tensors_alive_grow_by_heads_alone(name, cnn, make):
    options = {"steps": 2} if name == "otmf-paper" else {}
    method = METHODS[name](**options)
    state = method.init(cnn)
    alive = []
    for number in range(5):
        checkpoint = make(cnn, f"task{number}", seed=number)
        state, _ = method.fold(state, checkpoint, seed=0)
        heads = sum(4 * (head.weight.numel() + head.bias.numel()) for head in state.heads.values())
        del checkpoint
        alive.append(tensor_bytes() - heads)
    assert alive[1:] == [alive[1]] * 4
