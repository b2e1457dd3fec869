"""`otmf`, what foldd ships: a fold in closed form, layer by layer, that needs no labels and no old data.

It keeps the frame of OTMF (arXiv 2511.19561): two task vectors, two frozen teachers, the previous and the incoming
task's inputs, features pulled to the teachers' by transport. Two things are different, because validation said so.

- **The transport has a known plan.** The published form moves a cloud of merged features onto a teacher's cloud and
  has to find out which point goes where. But student and teacher see the same inputs: each feature's mate is known,
  and with the plan fixed the squared transport cost is a sum of squared distances.
- **It is minimised at every layer, not at the end.** For one affine layer that is least squares in its weights. In
  the place of masks that descend a loss for a hundred steps comes the minimum itself: the layer is
  W = (W_merged·G + W_incoming·G′)·(G + G′)⁻¹, a mask on either task vector that is a whole matrix on the input side
  instead of a number per element. G is the second moment of the layer's inputs over all folded tasks, G′ the incoming
  task's; G is a sum, so it has constant size and no old input is kept.

That is RegMean (Jin et al. 2023) made recursive, which is exact: the old tasks' normal equations are (G, W_merged·G).
Beyond it, each kept because the validation table says so: the merge under way feeds the layers behind it, so that they
take back what the ones before them changed; rows count by how much the heads' decisions depend on them; the previous
task's inputs, still at hand, are seen again; and the drift of the older tasks' inputs is estimated and allowed for.
Tensors outside affine layers (norms, embeddings) are means by count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.lazy import Lazy
from foldd.base.network import Base
from foldd.base.walk import Lane
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import calibration_sets, check_finite
from foldd.fusion.gram import moment, pack_gram, unpack_gram
from foldd.fusion.layer_fit import Sight, drift_map, fit, old_equations
from foldd.fusion.method import FoldReport, Progress, Training, finish, head_of, silent
from foldd.fusion.state import HeadTensors, MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import task_vector
from foldd.fusion.transport import sinkhorn_divergence

MAX_INPUTS = 256  # of a calibration set; more cost memory and time and change little
BACKWARD_BATCH = 16  # inputs per pass with gradients, which keeps all activations
_COVERED = "gram-count"  # how many tasks the moments have seen


@dataclass(frozen=True)
class Otmf:
    """The settings, chosen on validation images: eight tasks in several orders, a small transformer first.

    Attributes:
        incoming: weight of the incoming task's equations beside each older task's 1. Less keeps more of the old.
        previous: extra weight of the previous task's inputs, seen again through the merge under way.
        student: share of the merge's own inputs in the equations; the rest is the teachers' inputs.
        sensitivity: rows count as (their squared gradient) to this power; 0: all alike.
        drift: share of the equations of the older tasks' inputs as they probably are by now; the rest: as they were.
        ridge: pull to the mean by count, as a share of the mean input energy, where inputs say nothing.
    """

    name: ClassVar[str] = "otmf"
    needs_calibration: ClassVar[bool] = True

    incoming: float = 0.7
    previous: float = 0.5
    student: float = 0.5
    sensitivity: float = 0.5
    drift: float = 0.2
    ridge: float = 1e-3

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in.

        Held at a time beside θ⁰, the state and the incoming vector, which may all stay in their files: the new merged
        vector, the new moments (a triangle for each layer), and for one layer at a time its rows and at most four
        moments in float64.

        Raises:
            BadCheckpoint: `no-calibration` where it has no inputs (but for the first fold), `features-not-finite`
                where its network overflows on them, `missing-tensors`.
        """
        progress(0.0)
        vector = task_vector(state.base, checkpoint)
        if not state.count and checkpoint.inputs is None:
            progress(1.0)
            return finish(self.name, state, checkpoint, vector, vector)
        sets, warnings = calibration_sets(state, checkpoint)
        if not state.count:
            warnings = ()  # no task came before that could have left inputs
        fold = _Fold(self, state, vector, head_of(checkpoint), *(inputs[:MAX_INPUTS] for inputs in sets))
        del sets  # the walk lets them go when it is behind the first layer
        weights = fold.sensitivity(torch.Generator().manual_seed(seed))
        layers = len(fold.walker.layers)
        for done, _ in enumerate(fold.layers(weights), 1):
            progress(0.1 + 0.9 * done / (layers + 1))
        check_finite(checkpoint.task, *fold.features)
        training = Training(
            agreement=fold.agreement(checkpoint.task), transport=fold.transport(checkpoint.task), warnings=warnings
        )
        progress(1.0)
        statistics = fold.moments | {_COVERED: torch.tensor(float(state.count + 1))}
        return finish(self.name, state, checkpoint, vector, fold.merged, statistics=statistics, training=training)


class _Fold:
    """One fold under way: three networks on their walk, the merge among them."""

    def __init__(
        self,
        method: Otmf,
        state: MergeState,
        vector: Mapping[str, Tensor],
        head: HeadTensors,
        previous: Tensor,
        incoming: Tensor,
    ) -> None:
        base = state.base
        assert base.walker is not None, "otmf looks into the layers, so it needs the captured network"
        self.method, self.state, self.head, self.walker = method, state, head, base.walker
        self.first = not state.count
        self.split = len(incoming)
        self.vector = vector
        self.merged: dict[str, Tensor] = {}  # filled when the walk begins: the gradients' pass needs the room
        self.moments: dict[str, Tensor] = {}
        both = incoming if self.first else torch.cat([incoming, previous])
        self.teacher, self.before, self.student = (
            Lane(_sum(base, change), inputs)
            for change, inputs in ((vector, incoming), (state.merged, both), (self.merged, both))
        )

    @property
    def features(self) -> list[Tensor]:
        lanes = [self.teacher] if self.first else [self.teacher, self.before, self.student]
        return [lane.features for lane in lanes if lane.features is not None]

    def sensitivity(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Layer's node → weight of each row of the incoming inputs [g, rows]: (‖∂ log p(class)/∂y‖²)^sensitivity.

        The classes are drawn from what the incoming model itself decides, as for a Fisher information.
        """
        power, inputs = self.method.sensitivity, self.teacher.inputs
        if not power:
            return {}
        noise = torch.empty(len(inputs), len(self.head.bias)).exponential_(generator=generator)

        def surprise(features: Tensor, noise: Tensor) -> Tensor:
            logits = self.head.logits(features)
            # Of values p/e with e exponential, each is the largest with probability p.
            drawn = (logits.detach().softmax(1) / noise).argmax(1)
            return F.cross_entropy(logits, drawn, reduction="sum")

        pieces = [
            self.walker.sensitivity(self.teacher.weights, piece, partial(surprise, noise=e))
            for piece, e in zip(torch.split(inputs, BACKWARD_BATCH), torch.split(noise, BACKWARD_BATCH), strict=True)
        ]
        return {node: torch.cat([piece[node] for piece in pieces], 1) ** power for node in pieces[0]}

    def layers(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Fits one layer after the other, and lets the merge go on with it."""
        lanes = [self.teacher] if self.first else [self.teacher, self.before, self.student]
        self.merged.update(_means(self.state, self.vector))
        for layer, inputs in self.walker.walk(lanes):
            key, weight = f"gram/{layer.weight}", weights.get(layer.node)
            shape = self.state.base.weights[layer.weight]
            own, *rest = (layer.rows(x, shape) for x in inputs)
            del inputs, shape
            if self.first:
                self.moments[key] = pack_gram(moment(own, own, weight))
                yield
                continue
            before, student = rest
            old_layer, new_layer = layer.matrix(self.before.weights), layer.matrix(self.teacher.weights)
            prior = torch.lerp(old_layer, new_layer, 1 / (self.state.count + 1))
            parts = self._parts(key, (own, before, student), weight, (old_layer, new_layer))
            tensors = layer.assign(fit(parts, prior, self.method.ridge), self.student.weights)
            for name, tensor in tensors.items():
                self.merged[name] = tensor.sub_(self.state.base.weights[name])
            del (
                own,
                before,
                student,
                rest,
                parts,
                prior,
                old_layer,
                new_layer,
                tensors,
            )  # before the walk goes on
            yield

    def _parts(
        self, key: str, rows: tuple[Tensor, Tensor, Tensor], weight: Tensor | None, layers: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Weights and equations: of all older tasks, of the previous task's inputs again, of the incoming task."""
        own, before, student = rows
        old_layer, new_layer = layers
        seen = own.shape[1]  # rows of the incoming inputs; the previous task's follow
        drift = drift_map(before, student) if self.method.drift else None
        yield 1.0, *old_equations(self._gram(key, before), old_layer, drift, self.method.drift)
        del drift
        if self.method.previous:
            again = Sight(before[:, seen:], student[:, seen:])
            yield self.method.previous, *again.equations(old_layer, 1.0)
        gram, target = Sight(own, student[:, :seen], weight).equations(new_layer, self.method.student)
        self.moments[key] = pack_gram(self._gram(key, before), gram)
        yield self.method.incoming, gram, target

    def _gram(self, key: str, before: Tensor) -> Tensor:
        """The moments of all folded tasks, float64. For tasks that another method folded, without moments, those of
        the inputs at hand stand in, as the merged network sees them."""
        stored, size = self.state.statistics.get(key), before.shape[2]
        covered = 0.0 if stored is None else float(self.state.statistics[_COVERED])
        missing = max(0.0, self.state.count - covered)
        gram = 0.0 if stored is None else unpack_gram(stored, size)
        return gram + missing * moment(before, before) if missing or stored is None else gram  # type: ignore[return-value]

    def agreement(self, task: str) -> dict[str, float]:
        """Share of inputs on which the merge decides as its teacher: the incoming and the previous task."""
        return {name: _same(head, *pair) for name, head, pair in self._pairs(task)}

    def transport(self, task: str) -> dict[str, float]:
        """Sinkhorn divergence between the merge's and its teacher's normalised features, for the same two tasks."""
        return {
            name: float(sinkhorn_divergence(*(F.normalize(features, dim=1) for features in pair)))
            for name, _, pair in self._pairs(task)
        }

    def _pairs(self, task: str) -> Iterator[tuple[str, HeadTensors, tuple[Tensor, Tensor]]]:
        if self.first:
            return
        own, before, student = self.features
        yield task, self.head, (student[: self.split], own)
        previous = self.state.previous
        if previous is not None and previous != task and previous in self.state.heads:
            yield previous, self.state.heads[previous], (student[self.split :], before[self.split :])


def _sum(base: Base, vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """θ⁰ + a vector, summed when it is asked for: no copy of the weights is held."""
    return Lazy(base.weights, lambda name: base.weights[name] + vector[name])


def _means(state: MergeState, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the merge starts: means by count, statistics as moments merge."""
    if not state.count:
        return dict(vector)
    statistics = merge_statistics(state.base, state.merged, vector, state.count)
    share = 1 / (state.count + 1)
    return {
        name: statistics[name]
        if state.base.role(name) is Role.STATISTIC
        else torch.lerp(state.merged[name], vector[name], share)
        for name in state.base.weights
    }


def _same(head: HeadTensors, student: Tensor, teacher: Tensor) -> float:
    return float((head.logits(student).argmax(1) == head.logits(teacher).argmax(1)).double().mean())
