"""Training for the demo: a base, heads of nearest class means, and backbones fine-tuned under frozen heads.

As in the experiments of the merging papers: a task's head is made from the unfolded base's features and stays frozen,
so the unfolded base with each head is the row to beat, and everything that fine-tuning adds is in the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldd.daemon.demo.network import HEAD, DemoNetwork

Weights = dict[str, Tensor]  # backbone only: parameters and BatchNorm's statistics, no counters, no head
Head = tuple[Tensor, Tensor]  # weight [classes, features], bias [classes]
Report = Callable[[float], None]  # fraction done

SHOTS = 10  # training images per class behind a class mean
BATCH = 64
BASE_EPOCHS, BASE_RATE = 40, 3e-3
TUNE_EPOCHS, TUNE_RATE = 6, 1e-3
_SHARPNESS = 3.0  # mean squared length of a head's rows in units of logits: neither flat nor saturated at the start


def train_base(images: Tensor, labels: Tensor, *, classes: int, seed: int, report: Report) -> DemoNetwork:
    """A network trained from scratch on slightly turned, shifted, dimmed and noisy copies of the images.

    Args:
        images: [n, 1, 16, 16].
        labels: [n].
    """
    torch.manual_seed(seed)
    network = DemoNetwork(classes).train()
    generator = torch.Generator().manual_seed(seed)

    def loss(rows: Tensor) -> Tensor:
        logits = network(_varied(images[rows], generator))
        return F.cross_entropy(logits, labels[rows], label_smoothing=0.1)

    _optimise(list(network.parameters()), loss, len(images), BASE_EPOCHS, BASE_RATE, generator, report)
    return network.eval()


def fine_tune(
    base: DemoNetwork, head: Head, images: Tensor, labels: Tensor, *, seed: int, report: Report
) -> DemoNetwork:
    """A copy of the base whose backbone was trained under the frozen head; BatchNorm's statistics stay the base's."""
    network = copy.deepcopy(base).eval()
    generator = torch.Generator().manual_seed(seed)
    tuned = [p for name, p in network.named_parameters() if not name.startswith(f"{HEAD}.")]

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(network.features(images[rows]), *head), labels[rows])

    _optimise(tuned, loss, len(images), TUNE_EPOCHS, TUNE_RATE, generator, report)
    return network


def nearest_class_mean(network: DemoNetwork, images: Tensor, labels: Tensor) -> Head:
    """The linear head that picks the class whose mean feature, over its first ten images, is nearest."""
    with torch.no_grad():
        features = network.features(images)
    means = torch.stack([features[labels == c][:SHOTS].mean(0) for c in range(int(labels.max()) + 1)])
    # −|f − μ|²/2 = f·μ − |μ|²/2 − |f|²/2, where the last term and any mean over the classes change no softmax.
    weight, bias = means - means.mean(0), -means.square().sum(1) / 2
    scale = _SHARPNESS / weight.norm(dim=1).mean() ** 2
    return weight * scale, (bias - bias.mean()) * scale


def accuracy(network: DemoNetwork, head: Head, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        answers = F.linear(network.features(images), *head).argmax(1)
    return float((answers == labels).double().mean())


def backbone(network: nn.Module) -> Weights:
    """The floating-point tensors of a network but its head's."""
    return {
        name: tensor.detach().clone()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(f"{HEAD}.")
    }


def averaged(base: DemoNetwork, tuned: list[DemoNetwork]) -> DemoNetwork:
    """The base plus the plain mean of the task vectors."""
    start, vectors = backbone(base), [backbone(network) for network in tuned]
    merged = {name: start[name] + sum(v[name] - start[name] for v in vectors) / len(vectors) for name in start}
    network = copy.deepcopy(base)
    network.load_state_dict(merged, strict=False)  # head and counters stay the base's
    return network.eval()


def _optimise(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    rate: float,
    generator: torch.Generator,
    report: Report,
) -> None:
    batches = -(-count // BATCH)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    for step, rows in enumerate(_batches(count, epochs, generator)):
        loss = loss_of(rows)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        report((step + 1) / (epochs * batches))


def _batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from (order[first : first + BATCH] for first in range(0, count, BATCH))


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Copies turned by up to 20°, scaled by up to 15 %, shifted by up to 1.6 pixels, with other contrast and noise."""
    n = len(images)

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    angle, scale, shift = 0.7 * draw() - 0.35, 0.85 + 0.3 * draw(), 0.4 * draw(2) - 0.2
    rows = [
        torch.stack([scale * angle.cos(), -angle.sin(), shift[:, 0]], 1),
        torch.stack([angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(images.shape, generator=generator)
    return turned * (0.7 + 0.6 * draw(1, 1, 1)) + 0.2 * draw(1, 1, 1) * noise
