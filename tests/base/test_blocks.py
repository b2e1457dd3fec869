"""Cutting networks into blocks: what belongs together, and that running them one by one changes nothing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from captured import Chain, Dense, SequenceFirst, Split, folded, inputs, known, seeded

from foldd.base.blocks import MAX_LAYERS, find_blocks

KINDS = {"chain": Chain, "dense": Dense, "split": Split, "sequence-first": SequenceFirst}
ALL = ["residual", "attention", "with_head", *KINDS]


@cache
def network(name):
    return folded(seeded(KINDS[name])) if name in KINDS else known(name)


def weights_of(blocks):
    return [[layer.weight for layer in block.layers] for block in blocks]


@pytest.mark.parametrize("name", ALL)
def test_each_node_is_in_one_block_and_each_block_has_a_weight(name):
    made, _ = network(name)
    blocks = find_blocks(made)
    assert [n for block in blocks for n in block.nodes] == [n for n in made.body if made.is_activation(n)]
    assert [layer for block in blocks for layer in block.layers] == list(made.layers)
    assert all(block.layers for block in blocks)
    assert [block.entry for block in blocks] == [made.entry, *(block.exit for block in blocks[:-1])]
    assert blocks[-1].exit is made.exit


@pytest.mark.parametrize("name", ALL)
def test_a_block_takes_nothing_but_its_entry(name):
    made, _ = network(name)
    for block in find_blocks(made):
        inside = {block.entry, *block.nodes}
        taken = {a for node in block.nodes for a in node.all_input_nodes if made.is_activation(a)}
        assert taken <= inside


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [1, 7])
def test_block_by_block_is_the_whole_to_the_last_bit(name, n):
    """What a block gives is all that the next one knows: its batch comes first, so that inputs can be drawn from it."""
    made, weights = network(name)
    x = inputs(n)
    with torch.no_grad():
        whole, value = made.features(weights, x), x
        for block in find_blocks(made):
            values = {block.entry: value}
            made.run(block.nodes, values, weights)
            value = values[block.exit]
            assert value.shape[0] == n
    assert value.shape == whole.shape
    assert torch.equal(value, whole)


def test_a_residual_connection_lies_inside_and_its_block_ends_behind_the_addition():
    blocks = find_blocks(known("residual")[0])
    assert weights_of(blocks) == [["stem.weight"], ["conv.weight", "shortcut.weight"]]
    assert [node.name for node in blocks[1].nodes][-3:] == ["add", "relu_1", "mean"]
    attention = find_blocks(known("attention")[0])
    assert weights_of(attention) == [["patch.weight"], ["qkv.weight", "proj.weight"], ["fc1.weight", "fc2.weight"]]
    assert [block.exit.name for block in attention[:2]] == ["add", "add_1"]


def test_a_tied_pair_is_no_layer_but_belongs_to_the_block_before():
    blocks = find_blocks(known("with_head")[0])
    assert weights_of(blocks) == [["body.stem.weight"], ["body.conv.weight", "body.shortcut.weight"]]
    assert {"linear", "linear_1"} <= {node.name for node in blocks[-1].nodes}


def test_a_chain_is_cut_behind_every_layer_and_weightless_ends_join():
    made, _ = network("chain")
    blocks = find_blocks(made)
    assert weights_of(blocks) == [["conv.weight"], ["one.weight"], ["two.weight"]]
    assert [node.name for node in blocks[0].nodes] == ["mul", "sub", "conv2d", "relu", "flatten"]
    assert [node.name for node in blocks[2].nodes] == ["linear_1", "softplus", "mul_1"]
    assert all(block.together for block in blocks)


def test_a_long_stretch_without_a_cut_is_not_taken_together():
    (only,) = find_blocks(network("dense")[0])[-1:]
    blocks = find_blocks(network("dense")[0])
    assert [len(block.layers) for block in blocks] == [1, Dense.LAYERS]
    assert len(only.layers) > MAX_LAYERS
    assert [block.together for block in blocks] == [True, False]


def test_as_many_layers_as_allowed_are_taken_together(monkeypatch):
    monkeypatch.setattr("foldd.base.blocks.MAX_LAYERS", Dense.LAYERS)
    assert all(block.together for block in find_blocks(network("dense")[0]))


def test_halves_of_a_value_are_no_place_to_cut():
    """A group of tensors is one node of the graph, but nothing that can be quantized or drawn from."""
    blocks = find_blocks(network("split")[0])
    assert weights_of(blocks) == [["stem.weight"], ["left.weight", "right.weight"]]
    assert all(isinstance(block.exit.meta["val"], torch.Tensor) for block in blocks)


def test_there_is_no_cut_where_the_batch_is_not_the_first_axis():
    blocks = find_blocks(network("sequence-first")[0])
    assert weights_of(blocks) == [["patch.weight"], ["layers.0.weight", "layers.1.weight", "out.weight"]]
