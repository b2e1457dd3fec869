"""What the demo prints: accuracies by task and generation, their summary, the cost of each fold, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

Steps = Sequence[Sequence[float]]  # accuracy after fold t (row) of each task folded so far (columns), as shares


@dataclass(frozen=True)
class Results:
    """Everything measured on the held-back images; shares from 0 to 1, tasks in the order of their folds.

    Attributes:
        folded: after each generation, of the tasks folded by then; from the runtime's answers.
        averaged: the same for the plain mean of the task vectors.
        unfolded: of the base as it is, with each task's head.
        individual: of each task's own fine-tuned model.
    """

    tasks: tuple[str, ...]
    method: str
    folded: Steps
    averaged: Steps
    unfolded: Sequence[float]
    individual: Sequence[float]


@dataclass(frozen=True)
class Cost:
    """What one fold took. `stages`: stage → seconds, as in `foldd history`."""

    generation: int
    task: str
    stages: dict[str, float]
    peak_rss_bytes: int
    artifact_bytes: int

    @property
    def seconds(self) -> float:
        """Of work; the quiet time that a dropped file waits for is none."""
        return sum(value for stage, value in self.stages.items() if stage != "settle")


def backward_transfer(steps: Steps) -> float:
    """Mean over all tasks but the last of (accuracy in the end − accuracy right after the task's own fold).

    Raises:
        ValueError: fewer than two folds, where nothing can be forgotten.
    """
    if len(steps) < 2:
        raise ValueError("backward transfer needs two folds or more")
    final = steps[-1]
    return fmean(final[task] - steps[task][task] for task in range(len(steps) - 1))


def accuracy_table(results: Results) -> list[str]:
    """Tasks down, generations across, between the unfolded base and the individual models; in percent."""
    width = max(map(len, results.tasks))
    count = len(results.folded)
    header = "".join(f"{f'gen {n + 1}':>7}" for n in range(count))
    lines = [f"  {'task':<{width}}  {'unfolded':>8} |{header} | {'averaged':>8}  {'individual':>10}"]
    for row, task in enumerate(results.tasks):
        cells = "".join(_percent(step[row] if row < len(step) else None, 7) for step in results.folded)
        lines.append(
            f"  {task:<{width}}  {_percent(results.unfolded[row], 8)} |{cells} "
            f"| {_percent(results.averaged[-1][row], 8)}  {_percent(results.individual[row], 10)}"
        )
    return lines


def summary_table(results: Results) -> list[str]:
    """Average accuracy and backward transfer in the end, in percent and points."""
    rows = [
        ("unfolded base", fmean(results.unfolded), None),
        ("plain averaging", fmean(results.averaged[-1]), backward_transfer(results.averaged)),
        (f"foldd ({results.method})", fmean(results.folded[-1]), backward_transfer(results.folded)),
        ("individual models, one file each", fmean(results.individual), None),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {'':<{width}}  {'accuracy':>8}  {'backward transfer':>17}"]
    for name, accuracy, transfer in rows:
        forgotten = "–" if transfer is None else f"{100 * transfer:+.1f}"
        lines.append(f"  {name:<{width}}  {_percent(accuracy, 8)}  {forgotten:>17}")
    return lines


def cost_table(costs: Sequence[Cost]) -> list[str]:
    """Seconds of work, peak memory of the worker above its imports, and the size of what a device gets."""
    width = max(len(cost.task) for cost in costs)
    lines = [f"  gen  {'task':<{width}}  {'seconds':>7}  {'of it folding':>13}  {'peak RSS':>8}  {'artifact':>9}"]
    for cost in costs:
        lines.append(
            f"  {cost.generation:>3}  {cost.task:<{width}}  {cost.seconds:>7.2f}  {cost.stages.get('fold', 0.0):>13.2f}"
            f"  {cost.peak_rss_bytes / 1e6:>5.0f} MB  {cost.artifact_bytes / 1e3:>6.0f} kB"
        )
    return lines


def verdict(results: Results) -> list[str]:
    """What went wrong with the accuracy: empty where the fold beats the base and is no worse than averaging."""
    folded = fmean(results.folded[-1])
    unfolded, averaged = fmean(results.unfolded), fmean(results.averaged[-1])
    wrong = []
    if folded <= unfolded:
        wrong.append(
            f"the folded model ({folded:.1%}) is on average not better than the unfolded base ({unfolded:.1%})"
        )
    if folded < averaged:
        wrong.append(f"the folded model ({folded:.1%}) is on average worse than plain averaging ({averaged:.1%})")
    return wrong


def as_dict(results: Results, costs: Sequence[Cost]) -> dict[str, Any]:
    """Everything that the tables say, for JSON."""
    return asdict(results) | {"folds": [asdict(cost) | {"seconds": cost.seconds} for cost in costs]}


def _percent(share: float | None, width: int) -> str:
    return " " * width if share is None else f"{100 * share:>{width}.1f}"
