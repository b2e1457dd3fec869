"""Networks captured as foldd does it, with their BatchNorms folded, and inputs for them."""

from __future__ import annotations

import networks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldd.base.batch_norm import fold_norms
from foldd.base.features import cut_at_features
from foldd.base.folded import FoldedNetwork
from foldd.base.load import capture

IMAGE = (1, 8, 8)


def captured(model: nn.Module, shape: tuple[int, ...] = IMAGE, *, head: str = "") -> torch.fx.GraphModule:
    """The feature network as a graph, as a base has it."""
    return cut_at_features(capture(model, shape), head=head).module(check_guards=False)


def folded(
    model: nn.Module, shape: tuple[int, ...] = IMAGE, *, head: str = ""
) -> tuple[FoldedNetwork, dict[str, Tensor]]:
    """The network without its BatchNorms, and the weights that fit it."""
    network = FoldedNetwork(captured(model, shape, head=head))
    state = {n: t.numpy() for n, t in model.state_dict().items() if t.is_floating_point()}
    arrays = fold_norms({n: a for n, a in state.items() if not (head and n.startswith(f"{head}."))}, network.rules)
    return network, {name: torch.from_numpy(array) for name, array in arrays.items()}


def known(name: str) -> tuple[FoldedNetwork, dict[str, Tensor]]:
    """A network of networks.py."""
    return folded(getattr(networks, name)(), head="fc" if name == "with_head" else "")


def inputs(n: int = 16, seed: int = 0, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def seeded(kind: type[nn.Module], seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().eval()


class Chain(nn.Module):
    """A convolution and two linear layers, with weightless nodes before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(64, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(2 * x - 1)).flatten(1)
        return F.softplus(self.two(torch.tanh(self.one(x)))).mul(3)


class Dense(nn.Module):
    """Each layer takes what all before it gave: no cut between the first and the last of nine layers."""

    LAYERS = 9

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 4)
        self.layers = nn.ModuleList(nn.Linear(4 * (i + 1), 4) for i in range(self.LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        seen = [torch.relu(self.stem(x.flatten(1)))]
        for layer in self.layers:
            seen.append(torch.relu(layer(torch.cat(seen, 1))))
        return torch.cat(seen, 1)


class Split(nn.Module):
    """As in ShuffleNet: a value's halves go different ways, and meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        return torch.cat([self.left(left), self.right(right)], 1).mean((2, 3))


class SequenceFirst(nn.Module):
    """As in CLIP: tokens come first and the batch second, from the patches to the end."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)).reshape(4, x.shape[1], 8)
        return self.out(x).permute(1, 0, 2)[:, 0]
