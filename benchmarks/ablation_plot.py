"""The picture of `ablation --plots DIR`: accuracy against backward transfer, and both along α."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

LINES = {
    "incoming": "otmf, incoming 0.03 … 1",
    "drift": "otmf, drift 0 … 1",
    "previous": "otmf, previous 0 … 2",
    "inputs": "otmf, 8 … 64 inputs",
}
MARKS = {"plain": "s", "paper": "^", "otmf": "o", "ridge": "D"}
ALPHA = {"alpha": "otmf-paper", "alpha-between": "otmf-paper", "alpha-masks-off": "masks off"}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row of two panels per base: the frontier, and accuracy and backward transfer along α."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure, grid = plt.subplots(
        len(bases), 2, figsize=(13.5, 5.4 * len(bases)), layout="constrained", squeeze=False, width_ratios=(1.7, 1)
    )
    for (left, right), base in zip(grid, bases, strict=True):
        own = [row for row in rows if row["base"] == base]
        _frontier(left, [row for row in own if row["bwt"] is not None])
        left.set(title=f"{base}: one point per variant", xlabel="backward transfer, points", ylabel="accuracy, %")
        for line in [row for row in own if row["method"] == "pretrained"][:1]:
            left.axhline(100 * line["accuracy"], color="0.6", linestyle=":", label="unfolded base")
        left.legend(loc="best", fontsize=8, frameon=False)
        _alpha(right, [row for row in own if row["part"] in ALPHA])
        right.set(title=f"{base}: α of otmf-paper", xlabel="α, share of the merge so far", ylabel="%, points")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _frontier(axes: Any, rows: list[dict[str, Any]]) -> None:
    for colour, (part, label) in enumerate(LINES.items()):
        line = [row for row in rows if row["part"] == part]
        if line:
            axes.plot(*_places(line), ".-", color=f"C{colour}", label=label, linewidth=1.2)
            axes.annotate("first", _place(line[0]), color=f"C{colour}", fontsize=7, ha="right", va="top")
    named: list[tuple[dict[str, Any], str]] = []
    for colour, (part, mark) in enumerate(MARKS.items(), len(LINES)):
        seen = [row for row in rows if row["part"] == part]
        if not seen:
            continue
        axes.plot(*_places(seen), mark, color=f"C{colour}", markersize=5)
        named += [(row, f"C{colour}") for row in seen]
    _names(axes, named)
    axes.grid(alpha=0.3)


def _names(axes: Any, named: list[tuple[dict[str, Any], str]]) -> None:
    """The variants' names beside the panel, in the order of their accuracy, none on top of another."""
    bottom, top = axes.get_ylim()
    gap, height = (top - bottom) / 32, bottom
    for row, colour in sorted(named, key=lambda pair: float(pair[0]["accuracy"])):
        height = max(height + gap, 100 * row["accuracy"])
        axes.annotate(
            row["method"], _place(row), xytext=(1.02, height), textcoords=("axes fraction", "data"), fontsize=7,
            color=colour, va="center", arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.6},
        )  # fmt: skip


def _alpha(axes: Any, rows: list[dict[str, Any]]) -> None:
    for colour, label in enumerate(dict.fromkeys(ALPHA[row["part"]] for row in rows)):
        line = sorted(((_value(row), row) for row in rows if ALPHA[row["part"]] == label), key=lambda pair: pair[0])
        alphas = [alpha for alpha, _ in line]
        for key, style in (("accuracy", "-"), ("bwt", "--")):
            values = [100 * row[key] for _, row in line]
            axes.plot(alphas, values, style, marker=".", color=f"C{colour}", label=f"{label}: {key}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _value(row: dict[str, Any]) -> float:
    name = str(row["method"])
    return float(name.rpartition("-")[2]) if "alpha" in name else 0.8


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return 100 * row["bwt"], 100 * row["accuracy"]


def _places(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    places = [_place(row) for row in rows]
    return [x for x, _ in places], [y for _, y in places]
