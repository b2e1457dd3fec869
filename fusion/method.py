"""What a fold method is, and what all of them share: the first fold, heads, calibration sets, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.state import HeadTensors, MergeState, as_tensor
from foldd.fusion.task_vector import compare, norm

Progress = Callable[[float], None]  # gets 0…1, never falling


def silent(_: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class FoldReport:
    """What a fold did, for people and for `report.json`.

    Attributes:
        count: folds so far, this one included.
        task_vector_norm, merged_norm: L2 norms over all tensors but statistics.
        cosine: between the merged task vector before the fold and the incoming one; None on the first fold.
        refolded: the task's name was known already: its head was replaced and it was folded once more.
        steps: optimisation steps; 0 where the fold is a formula.
        loss_first, loss_last, loss_best: of the optimisation; None where there is none.
        agreement: task → share of calibration inputs on which the merged model decides as its teacher did.
        transport: task → debiased Sinkhorn divergence between the merged model's and its teacher's normalised
            features on calibration inputs: how far the features moved.
        shares: what part of the new merge the `merged` one before is, and what the `incoming` task; empty for methods
            that do not choose it.
        heads: task → how far its head moved: the spread of its logits' change on the inputs at hand, as a share of
            their spread; empty where heads are frozen.
        source_weights: task → what each sample of the other task counted beside 1 of its own in tuning its head; empty
            where no samples were borrowed.
        warnings: sentences for the operator.
    """

    method: str
    task: str
    count: int
    task_vector_norm: float
    merged_norm: float
    cosine: float | None = None
    refolded: bool = False
    steps: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_best: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    transport: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    heads: Mapping[str, float] = field(default_factory=dict)
    source_weights: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        names = ("agreement", "transport", "shares", "heads", "source_weights")
        plain = {name: dict(getattr(self, name)) for name in names}
        return {**asdict(self), **plain, "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Training:
    """What a fold has to tell beside its vectors; the plain formulas have nothing."""

    steps: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_best: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    transport: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class FoldMethod(Protocol):
    """A frozen strategy that folds one checkpoint after another into a state of constant size.

    The first fold takes the task vector as it is. Folds are deterministic: the same state, checkpoint, seed and
    thread count give the same bits.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]  # of the incoming task; without it the caller takes a data-free method

    def init(self, base: Base) -> MergeState:
        """The state before the first fold."""
        ...

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = ...
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in; `state` stays as it was."""
        ...


def head_of(checkpoint: Checkpoint) -> HeadTensors:
    """A checkpoint's head as tensors."""
    return HeadTensors(as_tensor(checkpoint.head.weight), as_tensor(checkpoint.head.bias))


def finish(
    method: str,
    state: MergeState,
    checkpoint: Checkpoint,
    vector: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    *,
    statistics: Mapping[str, Tensor] | None = None,
    training: Training | None = None,
) -> tuple[MergeState, FoldReport]:
    """The state after a fold and its report: the one place where heads, calibration and count change.

    A task that was folded before gets its new head, and its new vector is folded like any other: what the old one
    left in the merge cannot be taken out again. The calibration set becomes the incoming task's, or none.

    Args:
        vector: the incoming task vector.
        merged: the merged task vector after the fold.
        statistics: the method's own tensors after the fold; the old ones stay where None.
    """
    base, task, training = state.base, checkpoint.task, training or Training()
    refolded = task in state.heads
    heads = state.heads | {task: head_of(checkpoint)}
    new = MergeState(
        base=base,
        merged={name: merged[name] for name in base.weights},
        statistics=state.statistics if statistics is None else dict(statistics),
        heads={name: heads[name] for name in sorted(heads, key=str.encode)},
        histograms=state.histograms,
        calibration=None if checkpoint.inputs is None else as_tensor(checkpoint.inputs),
        previous=task,
        count=state.count + 1,
    )
    before = compare(base, state.merged, vector)
    warnings = training.warnings
    if refolded:
        warnings += (f"{task} was folded before: its head is replaced, and the old fold stays in the merged weights.",)
    if not before.second_norm:
        warnings += (f"{task} is the base itself, only its head is new: was it packed before it was fine-tuned?",)
    report = FoldReport(
        method=method,
        task=task,
        count=new.count,
        task_vector_norm=before.second_norm,
        merged_norm=norm(base, new.merged),
        cosine=before.cosine if state.count else None,
        refolded=refolded,
        steps=training.steps,
        loss_first=training.loss_first,
        loss_last=training.loss_last,
        loss_best=training.loss_best,
        agreement=training.agreement,
        transport=training.transport,
        shares=training.shares,
        warnings=warnings,
    )
    return new, report
