"""Where activations are quantized: in the captured graph and in the artifact's, which must agree."""

from __future__ import annotations

from functools import cache

import onnx
import pytest
import torch
import torch.nn.functional as F
from captured import Chain, Dense, Split, folded, inputs, known, seeded
from torch import nn

from foldd.base.store import open_base, open_skeleton
from foldd.core.quantized import ActivationRange
from foldd.export.graph import Graph, resolve
from foldd.quantize.calibrate import add_histograms, choose_ranges, observe_network
from foldd.quantize.histogram import observe, widest_range
from foldd.quantize.places import find_places

KINDS = {"chain": Chain, "dense": Dense, "split": Split}


@cache
def network(name):
    return folded(seeded(KINDS[name])) if name in KINDS else known(name)


def described(name):
    return [(p.keys, p.node.name, p.everywhere, p.taken) for p in find_places(network(name)[0])]


def test_places_of_a_residual_network():
    assert described("residual") == [
        (("stem.weight:input",), "x", False, True),
        (("stem.weight:output", "conv.weight:input", "shortcut.weight:input"), "relu", True, True),
        (("conv.weight:output",), "conv2d_1", True, False),
        (("shortcut.weight:output",), "conv2d_2", True, False),
        (("conv.weight:sum", "shortcut.weight:sum"), "relu_1", True, False),
    ]


def test_places_of_a_transformer_are_what_its_linear_layers_take():
    assert described("attention") == [
        (("qkv.weight:input",), "layer_norm", False, True),
        (("proj.weight:input",), "reshape_1", False, True),
        (("fc1.weight:input",), "layer_norm_1", False, True),
        (("fc2.weight:input",), "gelu", False, True),
    ]


def test_what_linear_layers_take_is_quantized_for_them_alone():
    assert all(not everywhere for keys, _, everywhere, _ in described("dense") if "stem" not in keys[0])
    keys = [key for keys, *_ in described("dense") for key in keys]
    assert keys == ["stem.weight:input", *(f"layers.{i}.weight:input" for i in range(Dense.LAYERS))]


class Sums(nn.Module):
    """Additions of a constant, and of a convolution that something else takes too, are no sums."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        x = F.relu(self.stem(x))
        shifted, twice = self.a(x) + self.shift, self.b(x)
        return ((twice + self.c(x)) + torch.tanh(twice) + F.relu(shifted)).mean((2, 3))


def test_a_sum_is_of_activations_and_the_layers_only_user():
    made, _ = folded(seeded(Sums))
    kinds = {key for place in find_places(made) for key in place.keys}
    layers = {"stem.weight": "input output", "a.weight": "input output", "b.weight": "input output"}
    layers["c.weight"] = "input output sum"
    assert kinds == {f"{layer}:{kind}" for layer, kinds in layers.items() for kind in kinds.split()}


@pytest.mark.parametrize("name", ["residual", "attention", "with_head"])
def test_the_artifacts_graph_has_the_same_places(base_folder, name):
    """Each key is found there, keys of one place are one tensor, and of two places two."""
    base, (skeleton, _) = open_base(base_folder(name)), open_skeleton(base_folder(name))
    places = find_places(base.folded)
    ranges = {key: ActivationRange(1.0, i, 8) for i, place in enumerate(places) for key in place.keys}
    found = resolve(Graph(onnx.load(skeleton).graph), ranges)  # raises where one tensor had two ranges
    for place in places:
        if place.everywhere:
            assert sum(given == ranges[place.key] for _, given in found.everywhere.values()) == 1
    assert len(found.everywhere) == sum(place.everywhere for place in places)
    inputs_of = {key for place in places for key in place.keys if key.endswith(":input")}
    assert {place for place, _ in found.at_layers.values()} == inputs_of


@pytest.mark.parametrize("name", ["residual", "attention", "split"])
def test_histograms_are_of_what_the_network_gives_there(name):
    """Against the values themselves, looked at one place at a time; pieces of unequal length count as they are long."""
    made, weights = network(name)
    x = inputs(100)
    histograms = observe_network(made, weights, x)
    assert histograms.keys() == {place.key for place in find_places(made)}
    for place in find_places(made):
        values = {made.entry: x}
        with torch.no_grad():
            made.run(made.body, values, weights)
        expected = observe(values[place.node])
        assert histograms[place.key][:2].tolist() == pytest.approx(expected[:2].tolist(), rel=1e-5)
        assert (histograms[place.key] - expected)[2:].abs().sum() < 1e-3
        assert float(histograms[place.key][2:].sum()) == pytest.approx(1, abs=1e-5)


def test_histograms_of_tasks_add_up_and_keep_what_one_has_alone():
    old, new = {"a": torch.ones(5), "b": torch.ones(5)}, {"b": torch.full((5,), 2.0), "c": torch.zeros(5)}
    both = add_histograms(old, new)
    assert list(both) == ["a", "b", "c"]
    assert both["b"].tolist() == [1, 2, 3, 3, 3]
    assert torch.equal(both["a"], old["a"])
    assert torch.equal(both["c"], new["c"])


def test_ranges_have_eight_bits_at_the_input_and_where_no_layer_reads():
    made, weights = network("residual")
    histograms = observe_network(made, weights, inputs(32))
    bits = {key: given.bits for key, given in choose_ranges(made, histograms, 4).items()}
    assert bits == {
        "stem.weight:input": 8, "stem.weight:output": 4, "conv.weight:output": 8, "shortcut.weight:output": 8,
        "conv.weight:sum": 8,
    }  # fmt: skip
    widest = choose_ranges(made, histograms, 4, widest=True)
    assert widest["stem.weight:output"] == widest_range(histograms["stem.weight:output"], 4)
    assert widest["stem.weight:output"].step > choose_ranges(made, histograms, 4)["stem.weight:output"].step
    assert widest["stem.weight:output"].zero_point == 0, "behind a ReLU"


def test_a_place_without_a_histogram_has_no_range():
    made, weights = network("residual")
    histograms = observe_network(made, weights, inputs(8))
    del histograms["conv.weight:output"]
    assert "conv.weight:output" not in choose_ranges(made, histograms, 8)
    assert choose_ranges(made, {}, 8) == {}


def test_places_are_of_the_folded_network():
    """A BatchNorm lies between the convolution and its ReLU, and is gone."""
    made, weights = network("residual")
    values = {made.entry: inputs(4)}
    made.run(made.body, values, weights)
    place = next(p for p in find_places(made) if "stem.weight:output" in p.keys)
    assert float(values[place.node].min()) == 0.0
