"""Whole networks quantized: better than nearest, replayed to the bit, within the bits, one block at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from captured import Chain, Dense, SequenceFirst, Split, folded, inputs, known, seeded

from foldd.base.blocks import find_blocks
from foldd.base.lazy import Lazy
from foldd.quantize.calibrate import choose_ranges, observe_network
from foldd.quantize.descent import Descent
from foldd.quantize.hdrq import PIECE, Hdrq, as_published, as_shipped
from foldd.quantize.places import find_places
from foldd.quantize.reconstruct import reconstruct
from foldd.quantize.simulate import simulated_features
from foldd.quantize.steps import best_step, nearest_codes

KINDS = {"chain": Chain, "dense": Dense, "split": Split, "sequence-first": SequenceFirst}
ALL = ["residual", "attention", "with_head", *KINDS]


@cache
def network(name):
    return folded(seeded(KINDS[name])) if name in KINDS else known(name)


@cache
def ranges_of(name):
    return choose_ranges(network(name)[0], observe_network(*network(name), inputs(64)), 8)


def quantize(name, how, *, base=None, x=None, seed=1, weights=None, **more):
    made, w = network(name)
    ranges = ranges_of(name) if how.activation_bits else {}
    x = inputs(64) if x is None else x
    return how.quantize(made, w if weights is None else weights, base, ranges, x, seed=seed, **more)


def content(model):
    return (
        {n: (w.codes.tobytes(), w.step.tobytes(), w.bits) for n, w in model.weights.items()},
        {n: a.tobytes() for n, a in model.floats.items()},
        dict(model.activations),
        dict(model.report),
    )


def error_on(name, model, x):
    """Mean squared error of the features on inputs that nothing was learned from, relative to their variance."""
    made, w = network(name)
    with torch.no_grad():
        expected = made.features(w, x).double()
    return float((simulated_features(made, model, x) - expected).square().mean() / expected.var())


@pytest.mark.parametrize("name", ["residual", "attention"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("activations", [8, None])
def test_reconstruction_beats_rounding_to_the_nearest_on_other_inputs(name, bits, activations):
    """By 6 dB and more; half of the error is asked for."""
    held_out = inputs(128, seed=9)
    nearest = error_on(name, quantize(name, as_shipped(bits, activations, 0)), held_out)
    learned = error_on(name, quantize(name, as_shipped(bits, activations, 60)), held_out)
    assert learned < 0.5 * nearest


@pytest.mark.parametrize("name", ["attention", "dense"])
def test_a_long_stretch_is_learned_layer_by_layer(name, monkeypatch):
    """As if more than one layer were too many for one block."""
    monkeypatch.setattr("foldd.base.blocks.MAX_LAYERS", 0)
    held_out = inputs(128, seed=9)
    nearest = error_on(name, quantize(name, as_shipped(3, 8, 0)), held_out)
    model = quantize(name, as_shipped(3, 8, 60))
    assert error_on(name, model, held_out) < 0.75 * nearest
    assert model.report["losses"].keys() == {layer.weight for layer in network(name)[0].layers}


@pytest.mark.parametrize("n", [3, PIECE + 6])
@pytest.mark.parametrize("name", ["dense", "sequence-first", "split"])
def test_odd_networks_are_quantized(name, n, monkeypatch):
    """Long skips, tokens before the batch, split values; more inputs than are computed at a time, and fewer."""
    for most in (8, 1):
        monkeypatch.setattr("foldd.base.blocks.MAX_LAYERS", most)
        model = quantize(name, as_shipped(6, 8, 3), x=inputs(n, seed=2))
        assert model.weights.keys() == {layer.weight for layer in network(name)[0].layers}
        assert error_on(name, model, inputs(70, seed=9)) < 0.01


@pytest.mark.parametrize("make", [as_shipped, as_published])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_within_their_bits_and_the_first_layer_has_eight(make, bits):
    model = quantize("residual", make(bits, 8, 5), base=network("residual")[1])
    found = {name: w.bits for name, w in model.weights.items()}
    assert found == {"stem.weight": 8, "conv.weight": bits, "shortcut.weight": bits}
    for name, w in model.weights.items():
        assert w.codes.dtype == np.int8
        assert w.step.dtype == np.float32
        assert (w.step > 0).all()
        assert w.codes.min() >= -(2 ** (w.bits - 1))
        assert w.codes.max() <= 2 ** (w.bits - 1) - 1
        assert len(np.unique(w.codes)) > 2 ** min(w.bits - 1, 4) - 1, "hardly any of the codes is used"
        assert w.codes.shape == network("residual")[1][name].shape
        assert w.step.shape == ((len(w.codes),) if make is as_shipped else ())


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_and_place_is_in_the_model_once(name):
    made, w = network(name)
    model = quantize(name, as_shipped(4, 8, 1))
    assert model.weights.keys() == {layer.weight for layer in made.layers}
    assert model.floats.keys() == w.keys() - model.weights.keys()
    assert all(np.array_equal(array, w[n]) for n, array in model.floats.items())
    assert model.activations.keys() == {key for place in find_places(made) for key in place.keys}
    for place in find_places(made):
        assert len({model.activations[key] for key in place.keys}) == 1, "one tensor, one range"
    assert quantize(name, as_shipped(4, None, 0)).activations == {}


@pytest.mark.parametrize("name", ["residual", "attention", "dense"])
@pytest.mark.parametrize("make", [as_shipped, as_published])
def test_the_same_seed_gives_the_same_bits(name, make):
    base = {n: 0.9 * t for n, t in network(name)[1].items()}
    one, again, other = (content(quantize(name, make(4, 8, 6), base=base, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one[0] != other[0]


def test_what_is_given_is_left_as_it_was():
    made, w = network("residual")
    copies, x = {n: t.clone() for n, t in w.items()}, inputs(8)
    ranges = dict(ranges_of("residual"))
    as_shipped(4, 8, 5).quantize(made, w, None, ranges, x, seed=0)
    assert all(torch.equal(copies[n], t) for n, t in w.items())
    assert torch.equal(x, inputs(8))
    assert ranges == ranges_of("residual")


@pytest.mark.parametrize("per_channel", [True, False])
def test_without_inputs_or_effort_weights_are_rounded_to_the_nearest(per_channel):
    made, w = network("attention")
    how = Hdrq(4, None, per_channel=per_channel)
    without = how.quantize(made, w, None, {}, None, seed=3)
    idle = replace(how, descent=None).quantize(made, w, None, {}, inputs(8), seed=4)
    assert content(without) == content(idle)
    assert without.report["iterations"] == 0
    assert without.report["losses"] == {}
    for name, made_of in without.weights.items():
        bits = 8 if name == "patch.weight" else 4
        step = best_step(w[name], bits, per_channel=per_channel)
        assert np.array_equal(made_of.step, step.numpy())
        assert np.array_equal(made_of.codes, nearest_codes(w[name], step, bits).numpy())


def test_without_inputs_ranges_are_kept_as_they_are():
    made, w = network("residual")
    model = as_shipped(8, 8, 50).quantize(made, w, None, ranges_of("residual"), None, seed=0)
    given = ranges_of("residual")
    for key, r in model.activations.items():
        start = given.get(key) or given["stem.weight:output" if "input" in key else "conv.weight:sum"]
        assert (r.zero_point, r.bits) == (start.zero_point, start.bits)
        assert r.step == pytest.approx(start.step, rel=1e-6)


def test_a_strong_pull_leaves_weights_nearer_to_the_base():
    """The merged weights are far from θ⁰ in all directions; equation 10 is what brings models near each other."""
    made, w = network("residual")
    base = {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(4)) for n, t in w.items()}

    def distance(pull):
        how = Hdrq(8, None, noise=False, pull=pull, descent=Descent(60, rate=5e-3, in_steps=False))
        model = how.quantize(made, w, base, {}, inputs(32), seed=1)
        return sum(float((torch.from_numpy(q.values()) - base[n]).double().norm()) for n, q in model.weights.items())

    free, weak, strong = (distance(pull) for pull in (0.0, 0.05, 5.0))
    assert strong < 0.7 * free
    assert strong < weak < free


def test_the_pull_needs_a_base():
    assert (
        content(quantize("residual", as_published(4, None, 5)))[0]
        == content(quantize("residual", replace(as_published(4, None, 5), pull=0.0), base=network("residual")[1]))[0]
    )


def test_a_published_run_learns_from_noise():
    """Under noise the result is another one than without, and no worse than nearest rounding with steps a tensor."""
    held_out = inputs(128, seed=9)
    nearest = error_on("attention", quantize("attention", as_published(3, None, 0)), held_out)
    noisy = quantize("attention", as_published(3, None, 60), base=network("attention")[1])
    plain = quantize("attention", replace(as_published(3, None, 60), noise=False), base=network("attention")[1])
    assert content(noisy)[0] != content(plain)[0]
    assert error_on("attention", noisy, held_out) < 0.8 * nearest


def test_progress_rises_from_layer_to_layer_and_ends_at_one():
    for name in ("attention", "dense"):
        seen = []
        quantize(name, as_shipped(4, 8, 4), progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(1)
        assert len(seen) >= 4 * len(find_blocks(network(name)[0]))


def test_the_report_tells_what_was_done():
    report = quantize("residual", as_shipped(4, 8, 30)).report
    assert {k: v for k, v in report.items() if k != "losses"} == {
        "weight_bits": 4, "activation_bits": 8, "layers": 3, "iterations": 30,
    }  # fmt: skip
    assert report["losses"].keys() == {"stem.weight", "shortcut.weight"}
    first, last = report["losses"]["shortcut.weight"]
    assert 0 < last < first
    assert quantize("residual", as_shipped(4, None, 1)).report["activation_bits"] is None


@pytest.mark.parametrize("name", ["attention", "dense"])
def test_weights_are_read_block_by_block(name):
    """A model larger than memory must not be held whole: of its layers' weights, one block's are alive at a time."""
    made, w = network(name)
    layers = {layer.weight for layer in made.layers}
    alive, most, reads = set(), 0, Counter()

    def make(key):
        nonlocal most
        tensor = w[key].clone()
        if key in layers:
            token = (key, reads[key])
            reads[key] += 1
            alive.add(token)
            weakref.finalize(tensor, alive.discard, token)
            most = max(most, len(alive))
        return tensor

    quantize(name, as_shipped(4, 8, 3), weights=Lazy(w, make), x=inputs(PIECE + 1))
    largest = max(len(block.layers) if block.together else 1 for block in find_blocks(made))
    assert most <= largest + 2
    if name == "attention":
        assert set(reads.values()) == {3}, "once to learn, once for each piece of the targets"


@pytest.mark.parametrize("make", [as_shipped, as_published])
def test_a_weight_of_zeros_stays_one(make):
    """As a convolution has whose BatchNorm's scale is 0."""
    made, w = network("residual")
    w = w | {"shortcut.weight": torch.zeros_like(w["shortcut.weight"])}
    x = inputs(32)
    ranges = choose_ranges(made, observe_network(made, w, x), 8)
    model = make(4, 8, 20).quantize(made, w, w, ranges, x, seed=0)
    with torch.no_grad():
        expected = made.features(w, x)
    actual = simulated_features(made, model, x)
    assert torch.isfinite(actual).all()
    assert float((actual - expected).square().mean() / expected.var()) < 0.02
    assert np.abs(model.weights["shortcut.weight"].values()).max() < 0.02


def test_ranges_that_some_places_lack_are_no_obstacle():
    made, w = network("residual")
    ranges = {key: r for key, r in ranges_of("residual").items() if key != "conv.weight:output"}
    model = as_shipped(8, 8, 2).quantize(made, w, None, ranges, inputs(8), seed=0)
    assert "conv.weight:output" not in model.activations
    assert "conv.weight:sum" in model.activations


def test_descents_of_their_own():
    """What a caller sets is what is done: more iterations, another batch, no dropping."""
    how = Hdrq(4, None, pull=0.0, noise=False, descent=Descent(30, batch=4, drop=0.0))
    model = quantize("residual", how)
    assert model.report["iterations"] == 30
    assert content(model)[0] != content(quantize("residual", replace(how, descent=Descent(30, batch=8, drop=0.0))))[0]


@pytest.mark.parametrize("most", [8, 0])
def test_blocks_learn_from_what_really_reaches_them(monkeypatch, most):
    """Float inputs and targets are the float network's; quantized inputs come through all that was rounded before,
    with the ranges that were learned there. At `most` = 0 for each layer by itself."""
    monkeypatch.setattr("foldd.base.blocks.MAX_LAYERS", most)
    made, w = network("attention")
    seen, x = [], inputs(PIECE + 6)

    def record(stretch, layers, roundings, weights, quantized, plain, targets, *rest):
        seen.append((stretch.entry, stretch.nodes[-1], quantized, plain, targets))
        return reconstruct(stretch, layers, roundings, weights, quantized, plain, targets, *rest)

    monkeypatch.setattr("foldd.quantize.hdrq.reconstruct", record)
    model = quantize("attention", as_shipped(3, 8, 4), x=x)
    assert len(seen) == (3 if most else 5)
    exact, rounded = {made.entry: x}, {made.entry: x}
    with torch.no_grad():
        made.run(made.body, exact, w)
        done = {n: torch.from_numpy(q.values()) for n, q in model.weights.items()}
        places = find_places(made)
        everywhere = {p.node: model.activations[p.key] for p in places if p.everywhere}
        at_layers = {p.node: model.activations[p.key] for p in places if not p.everywhere}

        def coarse(values, given):
            if given is None:
                return values
            return torch.fake_quantize_per_tensor_affine(values, given.step, given.zero_point, 0, 255)

        made.run(
            made.body, rounded, w | done,
            before=lambda layer, v: coarse(v, at_layers.get(layer.source)),
            after=lambda node, v: coarse(v, everywhere.get(node)),
        )  # fmt: skip
    for entry, end, quantized, plain, targets in seen:
        torch.testing.assert_close(plain, exact[entry], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(targets, exact[end], rtol=1e-4, atol=1e-5)
        # A code may round to the other side here and there.
        assert (quantized - rounded[entry]).square().mean() < 1e-3 * rounded[entry].square().mean()
        if entry is not made.entry:
            assert (quantized - exact[entry]).square().mean() > 4 * (quantized - rounded[entry]).square().mean()
