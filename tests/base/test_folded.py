"""The network with folded BatchNorms against the captured one that it came from."""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured import Chain, captured, folded, inputs, known, seeded

from foldd.base.batch_norm import fold_norms
from foldd.base.folded import FoldedNetwork
from foldd.base.store import open_base, open_skeleton

NETWORKS = ["residual", "attention", "with_head"]


@pytest.mark.parametrize("name", NETWORKS)
def test_its_features_are_the_bases_at_every_batch_size(base_folder, name):
    """With weights that were folded for it; the sizes are formulas of the batch."""
    base = open_base(base_folder(name))
    arrays = {n: (1.1 * t).numpy() for n, t in base.weights.items()}
    weights = {n: torch.from_numpy(a) for n, a in fold_norms(arrays, base.folded.rules).items()}
    for n in (1, 2, 5):
        x = inputs(n, seed=n)
        expected = base.features({n: 1.1 * t for n, t in base.weights.items()}, x)
        assert (base.folded.features(weights, x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_its_rules_and_tensors_are_the_skeletons(base_folder, name):
    import onnx

    base = open_base(base_folder(name))
    path, rules = open_skeleton(base_folder(name))
    assert base.folded.rules == rules
    assert len(rules) == (0 if name == "attention" else 2)
    names = set(fold_norms({n: t.numpy() for n, t in base.weights.items()}, rules))
    assert names <= {tensor.name for tensor in onnx.load(path).graph.initializer}
    for layer in base.folded.layers:
        assert {layer.weight, layer.bias} - {None} <= names


def test_the_captured_network_is_left_as_it_was():
    module = captured(networks.residual())
    code, state = module.code, {n: t.clone() for n, t in module.state_dict().items()}
    network = FoldedNetwork(module)
    assert len(network.rules) == 2
    assert module.code == code
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(module.state_dict()[n], t) for n, t in state.items())
    assert "batch_norm" in code
    assert "batch_norm" not in network.module.code


def test_layers_are_linear_ones_and_convolutions_with_a_weight_of_their_own():
    network, _ = known("residual")
    names = [(layer.weight, layer.bias, layer.is_convolution) for layer in network.layers]
    assert names == [
        ("stem.weight", "stem.bias", True),  # the bias came with its BatchNorm
        ("conv.weight", "conv.bias", True),
        ("shortcut.weight", None, True),
    ]
    tied = {layer.weight for layer in known("with_head")[0].layers}
    assert not tied & {"mix.weight", "again.weight"}, "a tied weight cannot have two layers' integers"
    assert [layer.is_convolution for layer in known("attention")[0].layers] == [True, False, False, False, False]


def test_hooks_change_what_one_layer_takes_and_what_all_take():
    """Against the same arithmetic by hand: `conv` and `shortcut` both take what the first ReLU gives."""
    network, w = known("residual")
    x, (_, conv, shortcut) = inputs(3), network.layers

    def by_hand(taken_by_conv, after_relu):
        y = after_relu(F.relu(F.conv2d(x, w["stem.weight"], w["stem.bias"], 2, 1)))
        left = F.conv2d(taken_by_conv(y), w["conv.weight"], w["conv.bias"], 1, 1)
        return F.relu(left + F.conv2d(y, w["shortcut.weight"])).mean((2, 3))

    def run(**hooks):
        values = {network.entry: x}
        network.run(network.body, values, w, **hooks)
        return values[network.exit]

    def same(y):
        return y

    relu = conv.source
    assert relu is shortcut.source
    before = run(before=lambda layer, y: 3 * y if layer is conv else y)
    after = run(after=lambda node, y: y - 1 if node is relu else y)
    torch.testing.assert_close(before, by_hand(lambda y: 3 * y, same))
    torch.testing.assert_close(after, by_hand(same, lambda y: y - 1))
    torch.testing.assert_close(run(), by_hand(same, same))
    assert not torch.allclose(before, run(), atol=1e-2)
    assert not torch.allclose(after, run(), atol=1e-2)


def test_every_node_is_shown_once_in_order_and_layers_before_their_values():
    network, w = known("attention")
    seen = []

    def before(layer, x):
        seen.append(("before", layer.node))
        return x

    def after(node, x):
        seen.append(("after", node))
        return x

    network.run(network.body, {network.entry: inputs(2)}, w, before=before, after=after)
    shown = [node for kind, node in seen if kind == "after"]
    assert shown == [node for node in network.body if network.is_activation(node)]
    for layer in network.layers:
        at = seen.index(("before", layer.node))
        assert seen[at + 1] == ("after", layer.node)


def test_what_is_computed_already_is_not_computed_again():
    network, w = known("residual")
    relu = network.layers[1].source
    values = {network.entry: inputs(2), relu: torch.ones(2, 8, 4, 4)}
    network.run(network.body, values, {n: t for n, t in w.items() if not n.startswith("stem.bias")})
    expected = F.relu(
        F.conv2d(values[relu], w["conv.weight"], w["conv.bias"], 1, 1) + F.conv2d(values[relu], w["shortcut.weight"])
    )
    torch.testing.assert_close(values[network.exit], expected.mean((2, 3)))


def test_gradients_reach_the_weights():
    """Against a difference of the loss, in float64."""
    network, w = folded(seeded(Chain))
    w = {n: t.double() for n, t in w.items()}
    x = inputs(3).double()
    w["two.weight"].requires_grad_()
    network.features(w, x).square().sum().backward()
    moved, epsilon = w["two.weight"].detach().clone(), 1e-6
    losses = []
    for sign in (1, -1):
        moved[2, 3] += sign * epsilon
        losses.append(float(network.features(w | {"two.weight": moved}, x).square().sum()))
        moved[2, 3] -= sign * epsilon
    assert np.isclose((losses[0] - losses[1]) / (2 * epsilon), float(w["two.weight"].grad[2, 3]), rtol=1e-6)


def test_a_run_that_forgets_holds_no_more_than_is_needed():
    """Of a residual network a block's input and what is under way, never all."""
    made, weights = known("residual")
    held: list[int] = []
    values = {made.entry: inputs(3)}

    def count(_, x):
        held.append(len(values))
        return x

    made.run(made.body, values, weights, after=count, forget=True)
    assert list(values) == [made.exit]
    assert max(held) <= 3 < len(made.body)
    everything = {made.entry: inputs(3)}
    made.run(made.body, everything, weights)
    assert len(everything) == 1 + sum(made.is_activation(node) for node in made.body)
    assert torch.equal(everything[made.exit], values[made.exit])
