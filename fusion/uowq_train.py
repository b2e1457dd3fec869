"""UOWQ as a way to train: algorithms 1 and 2 of arXiv 2601.10779, for whoever has labels and source samples.

Both are plain loops over functions of parameters. A model is any callable `logits(parameters, inputs)`, so what is
trained may be a whole network, an adapter or a head; the callable holds what stays frozen.

A target with 100 samples, a source like it and one unlike it:

>>> import torch
>>> from foldd.fusion.uowq_train import Samples, Source, TransferTraining, train_target
>>> g = torch.Generator().manual_seed(0)
>>> def draw(weight, count):
...     x = torch.randn(count, 2, generator=g)
...     return Samples(x, torch.bernoulli(torch.sigmoid(x @ weight), generator=g).long())
>>> def logits(parameters, x):
...     z = x @ parameters["w"]
...     return torch.stack([torch.zeros_like(z), z], 1)
>>> near, far = torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.0])
>>> sources = [Source(draw(near, 500), {"w": near}), Source(draw(far, 500), {"w": far})]
>>> training = TransferTraining(epochs=20, batch=20, learning_rate=0.1)
>>> found = train_target(logits, {"w": torch.zeros(2)}, draw(near, 100), sources, training, seed=0)
>>> like, unlike = found.weights[-1].weights
>>> like > 3 * unlike
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.fusion.fisher import Logits, Parameters, fisher_products
from foldd.fusion.method import Progress, silent
from foldd.fusion.transfer_weights import TransferWeights, transfer_weights


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled samples: inputs [n, …], labels [n], integers."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Source:
    """A domain with its samples and the parameters of a model that was trained on them."""

    samples: Samples
    parameters: Parameters


@dataclass(frozen=True)
class TransferTraining:
    """Settings of both algorithms.

    Attributes:
        epochs: the first one sees the target's samples alone, since weights start at 0.
        batch, learning_rate: of Adam, at a constant rate.
        dynamic: weights are computed anew after every epoch; False: once, after the first.
        dimension: d; 0: the number of parameters that are trained, as published. See foldd.fusion.transfer_weights.
    """

    epochs: int = 5
    batch: int = 32
    learning_rate: float = 1e-4
    dynamic: bool = True
    dimension: float = 0.0


@dataclass(frozen=True, eq=False)
class Transferred:
    """What algorithm 1 gives: the target's parameters, and the weights after each update, the last ones last."""

    parameters: dict[str, Tensor]
    weights: tuple[TransferWeights, ...]


@dataclass(frozen=True, eq=False)
class MultiTask:
    """What algorithm 2 gives: M models, not one, and for each as a target the weights of the others, in their order."""

    parameters: tuple[dict[str, Tensor], ...]
    weights: tuple[TransferWeights, ...]


def source_weights(
    logits: Logits, parameters: Parameters, target: Samples, sources: Sequence[Source], dimension: float = 0.0
) -> TransferWeights:
    """Lines 6 to 8 of algorithm 1: the weights of the sources for a target model as it is.

    J is the empirical Fisher information on the target's samples: K forward-mode derivatives of each.
    """
    theta = [{name: source.parameters[name] - value for name, value in parameters.items()} for source in sources]
    products = fisher_products(logits, parameters, theta, target.inputs, target.labels)
    used = dimension or sum(value.numel() for value in parameters.values())
    return transfer_weights([len(source.samples) for source in sources], products, used)


def train_target(
    logits: Logits,
    parameters: Parameters,
    target: Samples,
    sources: Sequence[Source],
    training: TransferTraining,
    *,
    seed: int,
    fixed: Sequence[float] | None = None,
    progress: Progress = silent,
) -> Transferred:
    """Algorithm 1: one target that borrows from K sources.

    Args:
        parameters: where training starts: the pre-trained model's.
        fixed: weights that stay, from the first epoch on, in the place of computed ones: 1 for each source trains on
            all samples alike.
        progress: gets the share of epochs that are done.
    """
    learner, generator = _Learner(logits, parameters, training), torch.Generator().manual_seed(seed)
    weights: Sequence[float] = [0.0] * len(sources) if fixed is None else fixed
    updates: list[TransferWeights] = []
    for epoch in range(training.epochs):
        learner.epoch(target, [source.samples for source in sources], weights, generator)
        if sources and fixed is None and (training.dynamic or not updates) and epoch + 1 < training.epochs:
            updates.append(source_weights(logits, learner.parameters, target, sources, training.dimension))
            weights = updates[-1].weights
        progress((epoch + 1) / training.epochs)
    return Transferred(learner.parameters, tuple(updates))


def train_tasks(
    logits: Logits,
    parameters: Parameters,
    tasks: Sequence[Samples],
    training: TransferTraining,
    *,
    seed: int,
    fixed: float | None = None,
    progress: Progress = silent,
) -> MultiTask:
    """Algorithm 2: M tasks of one output space, each the target of its own model and a source of all others.

    In every epoch one task after the other is trained with the weights that the models give as they are then.

    Args:
        parameters: where all models start.
        fixed: a weight for all sources that stays, in the place of computed ones.
    """
    learners = [_Learner(logits, parameters, training) for _ in tasks]
    generator = torch.Generator().manual_seed(seed)
    weights = [TransferWeights((0.0,) * (len(tasks) - 1), (0.0,) * (len(tasks) - 1), 0.0) for _ in tasks]
    for epoch in range(training.epochs):
        for place, (learner, target) in enumerate(zip(learners, tasks, strict=True)):
            others = [number for number in range(len(tasks)) if number != place]
            if others and fixed is None and (epoch == 1 or (training.dynamic and epoch)):
                sources = [Source(tasks[number], learners[number].parameters) for number in others]
                weights[place] = source_weights(logits, learner.parameters, target, sources, training.dimension)
            used = weights[place].weights if fixed is None else (fixed,) * len(others)
            learner.epoch(target, [tasks[number] for number in others], used, generator)
            progress((epoch + (place + 1) / len(tasks)) / training.epochs)
    return MultiTask(tuple(learner.parameters for learner in learners), tuple(weights))


class _Learner:
    """One model under training: its parameters and its optimiser's moments."""

    def __init__(self, logits: Logits, parameters: Parameters, training: TransferTraining) -> None:
        self._logits, self._batch = logits, training.batch
        self._leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self._optimiser = torch.optim.Adam(list(self._leaves.values()), lr=training.learning_rate)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Copies: training goes on without them."""
        return {name: value.detach().clone() for name, value in self._leaves.items()}

    def epoch(
        self, target: Samples, sources: Sequence[Samples], weights: Sequence[float], generator: torch.Generator
    ) -> None:
        """One pass over the target's samples and those of every source that has a weight; equation (5) as a loss."""
        used = [(target, 1.0), *((s, w) for s, w in zip(sources, weights, strict=True) if w > 0)]
        inputs = torch.cat([samples.inputs for samples, _ in used])
        labels = torch.cat([samples.labels for samples, _ in used]).long()
        each = torch.cat([torch.full((len(samples),), weight) for samples, weight in used])
        for index in torch.split(torch.randperm(len(labels), generator=generator), self._batch):
            losses = F.cross_entropy(self._logits(self._leaves, inputs[index]), labels[index], reduction="none")
            loss = (each[index].to(losses.dtype) * losses).sum() / len(index)
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
