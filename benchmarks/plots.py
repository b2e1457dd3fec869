"""The pictures of `continual --plots DIR`: accuracy by folds, task × generation, features in the plane, peak memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from sklearn.manifold import TSNE

Results = Mapping[Any, dict[str, Any]]  # Job → result


def draw_all(folder: Path, results: Results) -> list[dict[str, Any]]:
    """Draws everything into `folder`; the feature shift as rows."""
    groups: dict[tuple[str, int], dict[str, list[tuple[int, dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for job, result in results.items():
        groups[job.base, job.tasks][job.method].append((job.order, result))
    shifts = []
    for (base, tasks), methods in groups.items():
        name = f"{base}-{tasks}"
        _accuracy(folder / f"accuracy-{name}.png", f"{base}, {tasks} tasks", methods)
        _memory(folder / f"memory-{name}.png", f"{base}, {tasks} tasks", methods)
        listed = {method: result for method, runs in methods.items() for order, result in runs if order == 0}
        if "otmf" in listed:
            _heat_map(folder / f"heat-map-{name}.png", f"otmf on {base}", listed["otmf"])
        _features(folder / f"features-{name}.png", listed)
        shifts += [
            {"base": base, "tasks": tasks, "method": method, "task": task, "l1": shift}
            for method, result in listed.items()
            for task, shift in result["shift"].items()
            if method != "individual"
        ]
    return shifts


def _accuracy(path: Path, title: str, methods: Mapping[str, list[tuple[int, dict[str, Any]]]]) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    curves = {}
    for method, runs in methods.items():
        tables = [result["table"] for _, result in runs if result["table"]]
        if tables:
            curves[method] = np.mean([[100 * np.mean(row) for row in table] for table in tables], 0)
    for rank, (method, curve) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1])):
        bold = method == "otmf"
        axes.plot(
            range(1, len(curve) + 1), curve, ("-", "--", ":")[rank // 10 % 3], marker=".", label=method,
            linewidth=3 if bold else 1.3, color="black" if bold else f"C{rank % 10}",
        )  # fmt: skip
    axes.set(xlabel="folds", ylabel="mean accuracy of the tasks folded so far, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def _memory(path: Path, title: str, methods: Mapping[str, list[tuple[int, dict[str, Any]]]]) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for rank, (method, runs) in enumerate(methods.items()):
        peaks = [result["fold_peak_bytes"] for _, result in runs if len(result["fold_peak_bytes"]) > 1]
        if peaks:
            mean = np.mean(peaks, 0) / 1e6
            axes.plot(range(1, len(mean) + 1), mean, ("-", "--", ":")[rank // 10 % 3], marker=".", label=method)
    axes.set(xlabel="fold", ylabel="peak RSS above the start, MB", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def _heat_map(path: Path, title: str, result: dict[str, Any]) -> None:
    tasks, table = result["order"], result["table"]
    grid = np.full((len(tasks), len(tasks)), np.nan)
    for generation, row in enumerate(table):
        grid[: len(row), generation] = [100 * score for score in row]
    figure, axes = plt.subplots(figsize=(1.5 + 0.62 * len(tasks), 1 + 0.5 * len(tasks)), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (task, generation), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(
                generation, task, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black"
            )
    axes.set(xlabel="generation", title=title, yticks=range(len(tasks)), yticklabels=tasks)
    axes.set_xticks(range(len(tasks)), [str(n + 1) for n in range(len(tasks))])
    figure.colorbar(image, label="accuracy, %")
    _save(figure, path)


def _features(path: Path, listed: Mapping[str, dict[str, Any]]) -> None:
    """Two tasks' features in one plane for each network, by t-SNE: classes by colour, tasks by mark."""
    kept = {
        method: dict(np.load(listed[method]["features"]))
        for method in ("individual", "average", "otmf")
        if method in listed and Path(listed[method]["features"]).is_file()
    }
    if not kept:
        return
    figure, rows = plt.subplots(1, len(kept), figsize=(4.6 * len(kept), 4.6), layout="constrained", squeeze=False)
    for axes, (method, arrays) in zip(rows[0], kept.items(), strict=True):
        tasks = sorted({name.split("/")[0] for name in arrays})
        features = np.concatenate([arrays[f"{task}/features"] for task in tasks])
        places = TSNE(random_state=0, perplexity=min(30, len(features) // 4)).fit_transform(features)
        start = 0
        for task, mark in zip(tasks, "ox", strict=False):
            labels = arrays[f"{task}/labels"]
            part = places[start : start + len(labels)]
            axes.scatter(part[:, 0], part[:, 1], c=labels, cmap="tab20", marker=mark, s=14, linewidths=0.8, label=task)
            start += len(labels)
        axes.set(title=method, xticks=[], yticks=[])
        axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
