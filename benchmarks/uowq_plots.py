"""UOWQ's weights and shares as heat maps: a row for each target domain, a column for each source. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pacs import DOMAINS

SHOTS = 10


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One picture for each UOWQ variant: weights above, shares below; all source samples left, half of them right."""
    told = [row for row in rows if row.get("weights") and row.get("part") == "few-shot" and row["shots"] == SHOTS]
    for method in dict.fromkeys(row["method"] for row in told):
        chosen = [row for row in told if row["method"] == method]
        counts = sorted({row["source_samples"] for row in chosen}, reverse=True)
        figure, axes = plt.subplots(
            2, len(counts), figsize=(4.6 * len(counts), 7.6), layout="constrained", squeeze=False
        )
        for column, count in enumerate(counts):
            here = [row for row in chosen if row["source_samples"] == count]
            for line, key in enumerate(("weights", "shares")):
                _map(
                    axes[line][column], f"{key}, {count} samples a source", [(row["target"], row[key]) for row in here]
                )
        figure.suptitle(f"{method}, {SHOTS} images a class")
        figure.savefig(folder / f"weights-{method}.png", dpi=110)
        plt.close(figure)


def _map(axes: Any, title: str, told: Sequence[tuple[str, str]]) -> None:
    grid = np.full((len(DOMAINS), len(DOMAINS)), np.nan)
    for target in DOMAINS:
        texts = [text for domain, text in told if domain == target]
        for source in DOMAINS:
            values = [float(part.split("=")[1]) for text in texts for part in text.split() if part.startswith(source)]
            if values:
                grid[DOMAINS.index(target), DOMAINS.index(source)] = np.mean(values)
    top = max(1.0, float(np.nanmax(grid))) if np.isfinite(grid).any() else 1.0
    axes.imshow(grid, vmin=0, vmax=top, cmap="viridis")
    for (target, source), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "white" if value < 0.6 * top else "black"
            axes.text(source, target, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set(title=title, xlabel="source", ylabel="target")
    axes.set_xticks(range(len(DOMAINS)), DOMAINS)
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
