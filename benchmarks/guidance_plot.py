"""The picture of `guidance --plots DIR`: what the models reach alone and merged, by how far they went from the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

CURVES = ("learning rate", "epochs", "scale", "bundles")
LINES = {"individual": ":", "otmf": "-", "average": "--", "unfolded": "-."}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row of two panels per base: accuracy and the share kept, both by the norm of the task vectors."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure, grid = plt.subplots(
        len(bases), 2, figsize=(12, 5 * len(bases)), layout="constrained", squeeze=False, width_ratios=(1.5, 1)
    )
    for (left, right), base in zip(grid, bases, strict=True):
        own = [row for row in rows if row["base"] == base]
        for colour, varied in enumerate(CURVES):
            _curve(left, right, [row for row in own if row["varied"] == varied], f"C{colour}")
        left.axhline(100 * own[0]["pretrained"], color="0.6", linewidth=1, label="unfolded base")
        left.set(
            title=f"{base}: alone (dotted), otmf (solid), average (dashed), unfolded (dash-dot)",
            ylabel="mean accuracy, %",
        )
        right.set(title=f"{base}: share of the gain kept by otmf", ylabel="gain")
        right.axhline(0, color="0.6", linewidth=1)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="norm of the task vectors / norm of the base")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _curve(left: Any, right: Any, rows: list[dict[str, Any]], colour: str) -> None:
    if not rows:
        return
    for method, style in LINES.items():
        key = "individual" if method == "individual" else "accuracy"
        line = [row for row in rows if row["method"] == (method if key == "accuracy" else "otmf")]
        norms = [row["norm"] for row in line]
        label = line[0]["varied"] if method == "otmf" else None
        left.plot(norms, [100 * row[key] for row in line], style, marker=".", color=colour, label=label)
        if method == "otmf":
            kept = [float("nan") if row["gain"] is None else row["gain"] for row in line]
            right.plot(norms, kept, "-", marker=".", color=colour, label=label)
            for row in line:
                left.annotate(
                    f"{row['value']:g}", (row["norm"], 100 * row["accuracy"]), xytext=(2, 4),
                    textcoords="offset points", fontsize=7, color=colour,
                )  # fmt: skip
