"""The pictures of `quant --plots DIR`: the loss around quantized models, and what noise sampling does to a merge.

The paper's figures 2 and 3, drawn from our own models: the loss on a grid in the plane of two random directions, each
layer's scaled to its weights' norm; and the spread of a merge's accuracy over noise samples, with and without the
choice by cosine similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.bench_data import pixels
from benchmarks.quant_merged import harmonic
from benchmarks.quant_models import Subject, Subjects
from foldd.core.quantized import QuantizedModel
from foldd.quantize.merge import merge_models
from foldd.quantize.rounding import Noise

GRID, REACH, IMAGES = 11, 0.3, 200
SAMPLES, CHOICES = 20, 20


def loss_surface(subjects: Subjects, subject: Subject, model: QuantizedModel) -> np.ndarray:
    """Cross-entropy [GRID, GRID] around a quantized model's weights, activations in float."""
    images = subjects.bench.images[subject.images]
    x, y = pixels(images.x[:IMAGES]), torch.from_numpy(images.y[:IMAGES])
    centre = {name: torch.from_numpy(weight.values()) for name, weight in model.weights.items()}
    floats = {name: torch.from_numpy(array) for name, array in model.floats.items()}
    generator = torch.Generator().manual_seed(0)
    first, second = ({n: _direction(w, generator) for n, w in centre.items()} for _ in range(2))
    reach, losses = np.linspace(-REACH, REACH, GRID), np.zeros((GRID, GRID))
    with torch.no_grad():
        for i, a in enumerate(reach):
            for j, b in enumerate(reach):
                moved = {n: w + a * first[n] + b * second[n] for n, w in centre.items()}
                logits = subject.head.logits(subjects.base.folded.features({**floats, **moved}, x))
                losses[i, j] = float(F.cross_entropy(logits, y))
    return losses


def _direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    return noise * (weight.norm() / noise.norm())


def draw_surfaces(path: Path, surfaces: dict[str, np.ndarray]) -> None:
    """Contours side by side on one scale, and a cut through the middle of each."""
    figure, axes = plt.subplots(1, len(surfaces) + 1, figsize=(4 * (len(surfaces) + 1), 3.6))
    reach = np.linspace(-REACH, REACH, GRID)
    levels = np.linspace(min(s.min() for s in surfaces.values()), max(s.max() for s in surfaces.values()), 14)
    for axis, (name, losses) in zip(axes, surfaces.items(), strict=False):
        axis.contourf(reach, reach, losses, levels=levels)
        axis.set(title=name, xlabel="share of the weights' norm")
        axes[-1].plot(reach, losses[:, GRID // 2], label=name)
    axes[-1].set(title="a cut", xlabel="share of the weights' norm", ylabel="loss")
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def noise_spread(
    subjects: Subjects, models: Sequence[Subject], quantized: Sequence[QuantizedModel]
) -> dict[str, list[float]]:
    """Harmonic mean of the merge over noise samples: one sample each, and the most similar of several."""
    spread = {}
    weights = [1 / len(models)] * len(models)
    for name, samples in (("one sample", 1), (f"best of {CHOICES}", CHOICES)):
        rounding = Noise(samples=samples)
        spread[name] = [
            harmonic([float(subjects.hits(merged, model).mean()) for model in models])
            for merged in (merge_models(quantized, weights, rounding, seed=seed) for seed in range(SAMPLES))
        ]
    return spread


def draw_spread(path: Path, spreads: dict[str, dict[str, list[float]]]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6))
    labels, values = [], []
    for method, spread in spreads.items():
        for name, shares in spread.items():
            labels.append(f"{method}\n{name}")
            values.append([100 * share for share in shares])
    axis.boxplot(values, tick_labels=labels)
    axis.set(ylabel="harmonic mean, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
