"""Affine layers as matrices on rows, against the network's own layers; and the walk through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldd.base.layers import AffineLayer, find_layers
from foldd.base.load import capture
from foldd.base.store import network_of
from foldd.base.walk import Lane


class Mixed(nn.Module):
    """[n, 4, 9, 9] → [n, 6]: convolutions of many kinds, BatchNorm with and without a shift, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.dn = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3), nn.BatchNorm2d(6)
        self.bare, self.an = nn.Conv2d(6, 8, (1, 3)), nn.BatchNorm2d(8, affine=False)
        self.plain = nn.Conv2d(8, 8, 1)
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.dn(self.deep(x)))
        x = F.relu(self.an(self.bare(x)))
        x = self.plain(x).mean((2, 3))
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


@pytest.fixture(scope="module")
def mixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.uniform_(-1, 1)
                    module.bias.data.normal_()
    program = capture(model, (4, 9, 9))
    return model, *network_of(program)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


X = torch.randn(5, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def test_every_layer_of_its_own_is_found_and_a_shared_one_is_not(mixed):
    _, _, walker, _ = mixed
    assert [layer.weight for layer in walker.layers] == [
        "stem.weight", "deep.weight", "bare.weight", "plain.weight", "last.weight",
    ]  # fmt: skip
    assert [layer.bias for layer in walker.layers] == ["bn.bias", "dn.bias", "bare.bias", "plain.bias", None]
    assert [layer.groups for layer in walker.layers] == [1, 3, 1, 1, 1]


def test_a_convolution_that_cuts_an_image_into_patches_is_a_linear_layer_of_them():
    class Patches(nn.Module):
        """[n, 3, 8, 8] → [n, 4]."""

        def __init__(self) -> None:
            super().__init__()
            self.patch, self.near, self.point = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 1)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.point(self.near(self.patch(x))).mean((2, 3)))

    model = Patches().eval()
    walker = network_of(capture(model, (3, 8, 8)))[1]
    weights = weights_of(model)
    assert [layer.is_linear(weights[layer.weight]) for layer in walker.layers] == [True, False, False, True]


def test_a_matrix_on_rows_is_the_layer_with_its_norm(mixed):
    model, _, walker, _ = mixed
    outputs: dict[str, Tensor] = {}
    for name in ("bn", "dn", "an", "plain", "last"):
        getattr(model, name).register_forward_hook(lambda m, a, o, name=name: outputs.update({name: o.detach()}))
    weights = weights_of(model)
    with torch.no_grad():
        model(X)
    for layer, (inputs,) in walker.walk([Lane(weights, X)]):
        name = {"stem": "bn", "deep": "dn", "bare": "an"}.get(owner := layer.weight.removesuffix(".weight"), owner)
        rows = layer.rows(inputs, weights[layer.weight]).double()
        got = rows @ layer.matrix(weights).transpose(1, 2)
        torch.testing.assert_close(got, layer.picked(outputs[name]).double(), rtol=1e-5, atol=1e-5)


def test_assign_is_the_inverse_of_matrix(mixed):
    model, _, walker, _ = mixed
    weights = weights_of(model)
    g = torch.Generator().manual_seed(2)
    for layer in walker.layers:
        matrix = layer.matrix(weights)
        wanted = matrix + torch.randn(matrix.shape, generator=g, dtype=torch.float64)
        changed = weights | layer.assign(wanted, weights)
        torch.testing.assert_close(layer.matrix(changed), wanted, rtol=1e-4, atol=1e-5)
        assert {n for n in changed if changed[n] is not weights[n]} == {layer.weight, layer.bias} - {None}


def test_a_dead_channel_is_left_alone(mixed):
    model, _, walker, _ = mixed
    weights = weights_of(model)
    weights = weights | {"bn.weight": torch.cat([torch.zeros(1), weights["bn.weight"][1:]])}
    layer = walker.layers[0]
    changed = layer.assign(layer.matrix(weights) + 1, weights)
    assert torch.equal(changed["stem.weight"][0], weights["stem.weight"][0])
    assert all(bool(tensor.isfinite().all()) for tensor in changed.values())


def test_a_walk_ends_with_the_networks_features(mixed):
    model, features, walker, _ = mixed
    weights = weights_of(model)
    lanes = [Lane(weights, X), Lane({n: w * 1.1 for n, w in weights.items()}, X[:2])]
    for _ in walker.walk(lanes):
        pass
    for lane in lanes:
        inputs = X[: len(lane.features)]
        torch.testing.assert_close(lane.features, features(lane.weights, inputs).detach(), rtol=1e-5, atol=1e-5)
        assert lane.values == {}, "activations are let go"


def test_what_is_changed_on_the_way_counts_from_there_on(mixed):
    model, features, walker, _ = mixed
    weights = dict(weights_of(model))
    lane = Lane(weights, X)
    for layer, _ in walker.walk([lane]):
        weights[layer.weight] = 2 * weights[layer.weight]
    torch.testing.assert_close(lane.features, features(weights, X).detach(), rtol=1e-5, atol=1e-5)
    assert torch.is_grad_enabled(), "the caller's grad mode is untouched"


def test_gradients_are_those_of_each_row(mixed):
    model, _, walker, _ = mixed
    kept: dict[str, Tensor] = {}

    def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
        output.retain_grad()
        kept["deep"] = output

    handle = model.deep.register_forward_hook(hook)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    handle.remove()
    found: dict[str, Tensor] = {}
    walker.gradients(
        weights_of(model), X, lambda f: f.square().sum(), lambda layer, g: found.update({layer.node: layer.picked(g)})
    )
    layer = next(layer for layer in walker.layers if layer.weight == "deep.weight")
    expected = kept["deep"].grad.reshape(5, 3, 2, -1).permute(1, 0, 3, 2).reshape(3, -1, 2)
    torch.testing.assert_close(found[layer.node], expected, rtol=1e-4, atol=1e-8)
    assert found.keys() == {layer.node for layer in walker.layers}


def test_places_of_a_large_image_are_thinned_alike():
    layer = AffineLayer("conv", "w", "b", kernel=((1, 1), (1, 1), (1, 1)))
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    rows = layer.rows(x, weight, 16)
    assert rows.shape[1] == 2 * 16
    matrix = layer.matrix({"w": weight, "b": bias}).float()
    expected = layer.picked(F.conv2d(x, weight, bias, padding=1), 16)
    torch.testing.assert_close(rows @ matrix.transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_tokens_are_thinned_alike_and_all_of_them_are_seen():
    layer = AffineLayer("linear", "w", "b")
    x = torch.arange(65.0)[None, :, None] + torch.zeros(65, 65, 1)  # each token says which it is
    rows = layer.rows(x, torch.randn(4, 1), 16)
    assert rows.shape == (1, 65 * 16, 2)
    assert torch.equal(rows[..., :1], layer.picked(x, 16))
    assert set(rows[0, :, 0].tolist()) == set(range(65))
    assert torch.equal(layer.rows(x[:, :16], torch.randn(4, 1), 16)[0, :, 0], x[:, :16].flatten())
    assert layer.rows(x[:, 0], torch.randn(4, 1), 16).shape == (1, 65, 2), "no tokens: one row an input"


def test_layers_of_the_whole_network_are_found_without_names():
    from networks import attention

    module = capture(attention(), (1, 8, 8)).module(check_guards=False)
    found = {layer.weight for layer in find_layers(module)}
    assert found == {"patch.weight", "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"}
