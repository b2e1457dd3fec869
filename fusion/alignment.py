"""What happens to heads after a fold, whatever its method: nothing, alignment without labels, or tuning with them.

A fold moves the features that every head sees. There are three kinds of heads, by what is known of their inputs:

- the **incoming** task's: its inputs and its own model are here. On the merge's features the head is to say what it
  says on its own model's. Where the bundle has labels, `tuned` moves these targets a step towards them.
- the **previous** task's: its inputs are still here, and the merge before the fold is the teacher.
- all **older** ones: nothing is left of their inputs. How features move is seen on the inputs at hand; for others that
  is a guess, so only a share of the correction is made.

Where `weighting` is `uowq` and the incoming and the previous task have equal class names, `tuned` then moves both
their heads once more, each with the other task's labelled inputs beside its own: they count as much as UOWQ says
(foldd.fusion.borrowing). For that the merge state keeps the previous task's labels and class names, and for nothing
else does it get more to keep. docs/heads.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from foldd.core.bundle import Checkpoint
from foldd.fusion.batches import check_finite, features_of
from foldd.fusion.borrowing import Tuning, sample_weight
from foldd.fusion.heads import Fit, moved, prepare, urge
from foldd.fusion.method import FoldReport
from foldd.fusion.state import HeadTensors, MergeState, as_tensor
from foldd.fusion.task_vector import applied, task_vector

Mode = Literal["frozen", "aligned", "tuned"]
Weighting = Literal["none", "uowq"]
MAX_INPUTS = 256  # of a calibration set, as `otmf` takes


@dataclass(frozen=True)
class Alignment:
    """The settings, chosen on validation images: eight tasks in several orders, two networks.

    Attributes:
        mode: `frozen` leaves every head as it came, `aligned` uses no labels, `tuned` those of the incoming bundle.
        pull: how many inputs the old head's word counts as.
        drift: share of their correction that older heads get.
        labels: how far `tuned` moves the targets, in units of the logits' spread.
        weighting: whether `tuned` borrows samples between tasks of equal class names, and by what weight they count.
    """

    mode: Mode = "aligned"
    pull: float = 96.0
    drift: float = 0.2
    labels: float = 0.2
    weighting: Weighting = "none"

    def after_fold(
        self, before: MergeState, checkpoint: Checkpoint, after: MergeState, report: FoldReport
    ) -> tuple[MergeState, FoldReport]:
        """The state after a fold with its heads moved, and the report with how far; as deterministic as a fold.

        Held beside both states: one network's activations, and features.

        Args:
            before, after: the states around the fold; neither is changed.

        Raises:
            BadCheckpoint: `features-not-finite`.
        """
        if self.mode == "frozen":
            return after, report
        moves = _Moves(after.heads)
        seen = [
            *self._incoming(moves, before, checkpoint, after),
            *self._previous(moves, before, checkpoint.task, after),
        ]
        weights = self._borrow(moves, before, checkpoint, seen[0][0]) if self._borrows(before, checkpoint) else {}
        older = [task for task in after.heads if task not in moves.by and task != checkpoint.task]
        if seen and older and self.drift:
            was, now = (torch.cat(features) for features in zip(*seen, strict=True))
            fit = prepare(now, self.pull)
            for task in older:
                moves.make(task, fit, after.heads[task].logits(was.double()), self.drift)
        warnings = report.warnings + self._warnings(before, checkpoint)
        after = replace(self._with_labels(after, checkpoint), heads=moves.heads)
        return after, replace(report, heads=moves.by, source_weights=weights, warnings=warnings)

    def _incoming(
        self, moves: _Moves, before: MergeState, checkpoint: Checkpoint, after: MergeState
    ) -> list[tuple[Tensor, Tensor]]:
        """Moves the incoming task's head; the old and the new merge's features of its inputs, if there are both."""
        if checkpoint.inputs is None:
            return []
        base, task = before.base, checkpoint.task
        inputs = as_tensor(checkpoint.inputs[:MAX_INPUTS])
        own = features_of(base, applied(base, task_vector(base, checkpoint)), inputs)
        now = features_of(base, applied(base, after.merged), inputs)
        check_finite(task, own, now)
        targets = after.heads[task].logits(own.double())
        if self.mode == "tuned" and checkpoint.labels is not None:
            targets = urge(targets, as_tensor(checkpoint.labels[:MAX_INPUTS]), self.labels)
        moves.make(task, prepare(now, self.pull), targets)
        return [(features_of(base, applied(base, before.merged), inputs), now)] if before.count else []

    def _previous(
        self, moves: _Moves, before: MergeState, incoming: str, after: MergeState
    ) -> list[tuple[Tensor, Tensor]]:
        """Moves the previous task's head; the old and the new merge's features of its inputs, if it left any."""
        if before.calibration is None:
            return []
        inputs = before.calibration[:MAX_INPUTS]
        was, now = (features_of(before.base, applied(before.base, s.merged), inputs) for s in (before, after))
        check_finite(incoming, was, now)
        task = before.previous
        if task in after.heads and task != incoming:
            moves.make(task, prepare(now, self.pull), after.heads[task].logits(was.double()))
        return [(was, now)]

    def _borrows(self, before: MergeState, checkpoint: Checkpoint) -> bool:
        if before.labels is None or self.mode != "tuned" or self.weighting == "none":
            return False
        alike = bool(checkpoint.classes) and checkpoint.classes == before.classes
        # A task that comes again may bring the same samples again.
        return alike and checkpoint.labels is not None and checkpoint.task != before.previous

    def _borrow(self, moves: _Moves, before: MergeState, checkpoint: Checkpoint, was: Tensor) -> dict[str, float]:
        """Moves the incoming and the previous head by both tasks' samples; task → weight of the other's samples.

        A borrowed sample is treated as the task's own are: its target is what the task's teacher says of it, moved a
        step towards its label.

        Args:
            was: features of the incoming task's inputs in the merge before the fold.
        """
        assert checkpoint.labels is not None
        assert before.calibration is not None
        assert before.labels is not None
        assert before.previous is not None
        base, new, old = before.base, checkpoint.task, before.previous
        own = features_of(base, applied(base, task_vector(base, checkpoint)), before.calibration[:MAX_INPUTS])
        check_finite(new, own)
        alone = {task: moves.made[task] for task in (new, old)}
        weights = {}
        for task, other, teacher, labels in (
            (new, old, own, before.labels[:MAX_INPUTS]),
            (old, new, was, as_tensor(checkpoint.labels[:MAX_INPUTS])),
        ):
            target, source = alone[task], alone[other]
            weights[task] = sample_weight(target, source)
            counts = torch.ones(len(target.targets) + len(labels), dtype=torch.float64)
            counts[len(target.targets) :] = weights[task]
            both = prepare(torch.cat([target.fit.features, source.fit.features]), self.pull, counts)
            borrowed = urge(target.old.logits(teacher.double()), labels, self.labels)
            moves.make(task, both, torch.cat([target.targets, borrowed]))
        return weights

    def _with_labels(self, after: MergeState, checkpoint: Checkpoint) -> MergeState:
        """The state with what the next fold needs to borrow from this task."""
        if self.mode != "tuned" or self.weighting == "none" or checkpoint.labels is None or not checkpoint.classes:
            return after
        return replace(after, labels=as_tensor(checkpoint.labels), classes=checkpoint.classes)

    def _warnings(self, before: MergeState, checkpoint: Checkpoint) -> tuple[str, ...]:
        task = checkpoint.task
        if checkpoint.inputs is None:
            return (f"{task} brings no calibration inputs: its head stays as it came.",) if before.count else ()
        if self.mode == "tuned" and checkpoint.labels is None:
            return (f"{task} brings no labels: its head is aligned, and not tuned.",)
        return ()


class _Moves:
    """Heads after a fold, some of them moved: by what, and how far. One that is moved again starts anew."""

    def __init__(self, heads: dict[str, HeadTensors]) -> None:
        self.old, self.heads = heads, dict(heads)
        self.made: dict[str, Tuning] = {}
        self.by: dict[str, float] = {}

    def make(self, task: str, fit: Fit, targets: Tensor, share: float = 1.0) -> None:
        old = self.old[task]
        self.made[task] = Tuning(old, fit, targets)
        self.heads[task] = fit.move(old, targets, share)
        self.by[task] = moved(old, self.heads[task], fit.features)
