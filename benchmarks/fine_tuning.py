"""Checkpoints fine-tuned from a base under a given recipe, kept as bundles that a `Bench` can be pointed at."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_data import Bench, pixels
from benchmarks.report import say
from benchmarks.rivals.finetune import one_cycle
from foldd.core.bundle import Head, write_bundle
from foldd.core.roles import Role
from foldd.fusion.method import head_of
from foldd.fusion.state import HeadTensors
from foldd.fusion.task_vector import norm, task_vector


@dataclass(frozen=True)
class Recipe:
    """How a task's model is made from the base.

    Attributes:
        learning_rate: the peak of a one-cycle schedule of AdamW.
        epochs: over the task's training images; 0: none, the folder's own bundle is taken.
        trains_head: the head learns too; else it stays the bundle's, the class means of the base's features.
        scale: what the task vector is multiplied by in the end.
    """

    learning_rate: float = 1.5e-4
    epochs: int = 2
    batch: int = 32
    weight_decay: float = 0.01
    trains_head: bool = False
    scale: float = 1.0


def fine_tuned(bench: Bench, tasks: tuple[str, ...], recipe: Recipe, folder: Path) -> Bench:
    """The bench with all tasks' models made by a recipe; those that `folder` has already are taken from there."""
    source = hashlib.sha256(Path(__file__).read_bytes() + repr(recipe).encode() + bench.base.spec.digest.encode())
    home = folder / source.hexdigest()[:16]
    (home / bench.name).mkdir(parents=True, exist_ok=True)
    if not (home / "data").exists():
        (home / "data").symlink_to((bench.data / "data").resolve())
    for task in tasks:
        path = home / bench.name / f"{task}.safetensors"
        if not path.is_file():
            _write(bench, task, recipe, path, folder)
    other = copy.copy(bench)
    other.data = home
    for cached in ("digests", "own_features"):  # they were of the other bundles
        other.__dict__.pop(cached, None)
    return other


def mean_norm(bench: Bench, tasks: tuple[str, ...]) -> float:
    """Mean L2 norm of the task vectors, statistics left out, as a share of the base's own norm."""
    whole = norm(bench.base, bench.base.weights)
    return float(np.mean([norm(bench.base, task_vector(bench.base, bench.checkpoint(task))) for task in tasks])) / whole


def _write(bench: Bench, task: str, recipe: Recipe, path: Path, folder: Path) -> None:
    checkpoint = bench.checkpoint(task)
    if recipe.scale != 1 and recipe.epochs:
        source = fine_tuned(bench, (task,), replace(recipe, scale=1.0), folder).checkpoint(task)
        vector, head = task_vector(bench.base, source), source.head
    elif not recipe.epochs:
        vector, head = task_vector(bench.base, checkpoint), checkpoint.head
    else:
        vector, tensors = _train(bench, task, recipe)
        head = Head(tensors.weight.numpy(), tensors.bias.numpy())
    arrays = {name: (recipe.scale * tensor).numpy() for name, tensor in vector.items()}
    write_bundle(path, arrays, head, task=task, base=bench.base.spec, is_delta=True, inputs=checkpoint.inputs)


def _train(bench: Bench, task: str, recipe: Recipe) -> tuple[dict[str, Tensor], HeadTensors]:
    """The task vector and the head. BatchNorm statistics stay the base's."""
    base, images = bench.base, bench.load(task, "train")
    inputs, labels = pixels(images.x), torch.from_numpy(images.y)
    head = head_of(bench.checkpoint(task))
    weights = {name: weight.clone() for name, weight in base.weights.items()}
    trained = [weights[name] for name in weights if base.role(name) is not Role.STATISTIC]
    if recipe.trains_head:
        head = HeadTensors(head.weight.clone(), head.bias.clone())
        trained += [head.weight, head.bias]
    for tensor in trained:
        tensor.requires_grad_()
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(base.features(weights, inputs[index])), labels[index])

    losses = one_cycle(optimiser, loss_of, len(inputs), epochs=recipe.epochs, batch=recipe.batch, seed=0)
    say(f"{bench.name} {task}, {recipe}: loss {np.mean(losses[:10]):.2f} → {np.mean(losses[-10:]):.2f}")
    vector = {name: weight.detach() - base.weights[name] for name, weight in weights.items()}
    return vector, HeadTensors(head.weight.detach(), head.bias.detach())
