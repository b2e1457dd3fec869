"""`otmf`, what foldd ships: a fold in closed form, layer by layer, that needs no labels and no old data.

It keeps the frame of OTMF (arXiv 2511.19561): two task vectors, two frozen teachers, the previous and the incoming
task's inputs, features pulled to the teachers' by transport. Four things are different, because validation said so.

- **The transport has a known plan.** The published form moves a cloud of merged features onto a teacher's cloud and
  has to find out which point goes where. But student and teacher see the same inputs: each feature's mate is known,
  and with the plan fixed the squared transport cost is a sum of squared distances.
- **It is minimised at every layer, not at the end.** For one affine layer that is least squares in its weights. In
  the place of masks that descend a loss for a hundred steps comes the minimum itself.
- **Distances count as decisions depend on them.** An error at a layer's output is measured by B, the second moment of
  the gradients there, as G is that of the layer's inputs: its Fisher information in Kronecker factors (K-FAC). The
  layer W is the one with B·W·G + B′·W·G′ = B·W_merged·G + B′·W_incoming·G′: in the common basis of (G, G′) and (B, B′)
  a mask on either task vector, element by element, with known values. G and B are sums over all folded tasks, so they
  have constant size and no old input is kept.
- **A convolution is a sum over spatial frequencies** (`Modes`), each with a G of its own.

Without B that is RegMean (Jin et al. 2023) made recursive, with it MaTS (Tam et al. 2023) for two. Beyond them: the
merge under way feeds the layers behind it, so that they take back what the ones before them changed; the previous
task's inputs, still at hand, are seen again; and the drift of the older tasks' inputs is estimated and allowed for.
Tensors outside affine layers (norms, embeddings) are means by count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foldd.base.layers import AffineLayer
from foldd.base.network import Base
from foldd.base.walk import Lane
from foldd.core.bundle import Checkpoint
from foldd.core.roles import Role
from foldd.fusion.batches import calibration_sets, check_finite
from foldd.fusion.drift import drift
from foldd.fusion.gram import add_moment, is_root, mirror, moment, pack_gram, root_of, unpack_gram
from foldd.fusion.layer_fit import WIDE, Equations, Sight, damped, fit, old_equations
from foldd.fusion.method import FoldReport, Progress, Training, finish, head_of, silent
from foldd.fusion.modes import Modes
from foldd.fusion.state import HeadTensors, MergeState, empty_state
from foldd.fusion.statistics import merge_statistics
from foldd.fusion.task_vector import applied, task_vector
from foldd.fusion.transport import sinkhorn_divergence

MAX_INPUTS = 256  # of a calibration set; more cost memory and time and change little
POSITIONS = 16  # rows of an input's places or tokens; four times as many bring nothing
BACKWARD_BATCH = 16  # inputs per pass with gradients, which keeps all activations
_GRAM, _CURVATURE = "gram", "curvature"
_COVERED = "gram-count"  # how many tasks the moments have seen


@dataclass(frozen=True)
class Otmf:
    """The settings, chosen on validation images: eight tasks in several orders, a small transformer first.

    Attributes:
        incoming: weight of the incoming task's equations beside each older task's 1, in linear layers. Less keeps more
            of the old.
        incoming_convolution: the same in convolutions, divided by the number of older tasks. They stand more, but every
            fold takes a little from every older task, and by the twelfth that adds up.
        previous: extra weight of the previous task's inputs, seen again through the merge under way.
        student: share of the merge's own inputs in the equations; the rest is the teachers' inputs.
        damping: share of the identity in B; 1 leaves the gradients out.
        drift: share of the equations of the older tasks' inputs as they probably are by now; the rest: as they were.
        ridge: pull to the mean by count, as a share of the mean input energy, where inputs say nothing.
    """

    name: ClassVar[str] = "otmf"
    needs_calibration: ClassVar[bool] = True

    incoming: float = 0.07
    incoming_convolution: float = 0.6
    previous: float = 1.0
    student: float = 0.5
    damping: float = 0.1
    drift: float = 0.2
    ridge: float = 1e-3

    def init(self, base: Base) -> MergeState:
        return empty_state(base)

    def weight(self, count: int, *, linear: bool) -> float:
        """Of the incoming task's equations for a layer, beside a weight of 1 of each of `count` older tasks."""
        return self.incoming if linear else self.incoming_convolution / count

    def fold(
        self, state: MergeState, checkpoint: Checkpoint, *, seed: int, progress: Progress = silent
    ) -> tuple[MergeState, FoldReport]:
        """Folds one checkpoint in.

        Held at a time beside θ⁰, the state and the incoming vector, which may all stay in their files: the new merged
        vector, the new moments (two triangles for each layer), and for one layer at a time its rows and a few moments
        in float64.

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
        fold.measure_curvature(torch.Generator().manual_seed(seed))
        layers = len(fold.walker.layers)
        for done, _ in enumerate(fold.layers(), 1):
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
        self.vector = vector
        self.merged: dict[str, Tensor] = {}  # filled when the walk begins: the gradients' pass needs the room
        self.moments: dict[str, Tensor] = {}
        self.lanes = [
            Lane(applied(base, change), inputs)
            for change, inputs in (
                (vector, incoming), (self.merged, incoming), (state.merged, previous), (self.merged, previous),
                (state.merged, incoming),
            )
        ][: 1 if self.first else None]  # fmt: skip
        self.teacher = self.lanes[0]

    @property
    def features(self) -> list[Tensor]:
        """Of the incoming inputs by the incoming model and the merge, of the previous task's by the old merge and the
        new one; and of the incoming inputs by the old merge."""
        return [lane.features for lane in self.lanes if lane.features is not None]

    def measure_curvature(self, generator: torch.Generator) -> None:
        """Each layer's B of the incoming task, where its own network makes a difference to what it decides.

        Gradients are those of log p(class), the class drawn from what the incoming model itself decides, as for a
        Fisher information.
        """
        inputs = self.teacher.inputs
        noise = torch.empty(len(inputs), len(self.head.bias)).exponential_(generator=generator)

        def surprise(features: Tensor, noise: Tensor) -> Tensor:
            logits = self.head.logits(features)
            # Of values p/e with e exponential, each is the largest with probability p.
            drawn = (logits.detach().softmax(1) / noise).argmax(1)
            return F.cross_entropy(logits, drawn, reduction="sum")

        def take(layer: AffineLayer, gradient: Tensor) -> None:
            rows = layer.picked(gradient, POSITIONS)
            if rows.shape[2] > WIDE:
                rows = rows[:, :: -(-rows.shape[1] * len(inputs) // (len(gradient) * WIDE))]
            key, part = f"{_CURVATURE}/{layer.weight}", pack_gram(rows.mT @ rows)
            known = self.moments.get(key)
            self.moments[key] = part if known is None else known.add_(part)

        if self.method.damping < 1:
            weights = dict(self.teacher.weights)  # of which each pass keeps all anyway
            for piece, e in zip(torch.split(inputs, BACKWARD_BATCH), torch.split(noise, BACKWARD_BATCH), strict=True):
                self.walker.gradients(weights, piece, partial(surprise, noise=e), take)

    def layers(self) -> Iterator[None]:
        """Fits one layer after the other, and lets the merge go on with it."""
        self.merged.update(_means(self.state, self.vector))
        for layer, inputs in self.walker.walk(self.lanes):
            shape = self.state.base.weights[layer.weight]
            modes = Modes.of(layer, shape)
            rows = [modes.split(layer.rows(x, shape, POSITIONS)) for x in inputs]
            del inputs, shape
            if self.first:
                self.moments[f"{_GRAM}/{layer.weight}"] = pack_gram(moment(rows[0], rows[0]))
                curvature = self._curvature(layer, layer.matrix(self.teacher.weights))
                self.moments[f"{_CURVATURE}/{layer.weight}"] = pack_gram(curvature)
            else:
                self._fit(layer, modes, rows)
            del rows  # before the walk goes on
            yield

    def _fit(self, layer: AffineLayer, modes: Modes, rows: list[Tensor]) -> None:
        """Sets one layer of the merge, and adds to its moments.

        Args:
            rows: what each lane's network feeds into it, by frequency.
        """
        own, merged, before, again, still = rows
        new, old, count = Sight(own, merged), Sight(before, again), self.state.count
        new_layer, old_layer = (modes.split(layer.matrix(self.lanes[i].weights)) for i in (0, 2))
        new_rows, new_missed = new.equations(new_layer, self.method.student)
        key = f"{_GRAM}/{layer.weight}"
        gram, missed = self._gram(key, modes, old.teacher), torch.zeros_like(old_layer)
        new_gram = moment(new_rows, new_rows)
        self.moments[key] = pack_gram(gram, new_gram)
        if is_root(new_rows):
            new_gram = root_of(new_rows)
        if self.method.drift:
            moves = drift((before, again), (still, merged))
            gram, missed = old_equations(gram, old_layer, moves, self.method.drift)
        if self.method.previous:
            extra, wanted = old.equations(old_layer, 1.0)
            add_moment(gram, extra, extra, self.method.previous)
            mirror(gram)
            missed.add_(wanted, alpha=self.method.previous)
            del extra, wanted
        curvature, stored = self._curvature(layer, new_layer), f"{_CURVATURE}/{layer.weight}"
        size = new_layer.shape[1]
        total = self._stored(
            stored,
            partial(unpack_gram, size=size),
            lambda: torch.eye(size, dtype=torch.float64).expand_as(curvature),
        )
        self.moments[stored] = pack_gram(total, curvature)
        weight = self.method.weight(count, linear=layer.is_linear(self.state.base.weights[layer.weight]))
        matrix = fit(
            Equations(old_layer, gram, missed, total.div_(count)),
            Equations(new_layer, new_gram, new_missed, curvature).weigh(weight),
            torch.lerp(old_layer, new_layer, 1 / (count + 1)),
            self.method.ridge,
        )
        for name, tensor in layer.assign(modes.join(matrix), self.lanes[1].weights).items():
            self.merged[name] = tensor.sub_(self.state.base.weights[name])

    def _gram(self, key: str, modes: Modes, before: Tensor) -> Tensor:
        """G of all folded tasks; where there are no moments, of the inputs at hand as the merged network sees them."""
        size = before.shape[2]

        def unpack(stored: Tensor) -> Tensor:
            if stored.shape[1] == size * (size + 1) // 2:
                return unpack_gram(stored, size)
            # From before frequencies had moments of their own.
            return modes.of_moment(unpack_gram(stored, (size - modes.biased) * modes.count + modes.biased))

        return self._stored(key, unpack, lambda: moment(before, before))

    def _curvature(self, layer: AffineLayer, matrix: Tensor) -> Tensor:
        """B of the incoming task, as measured, damped."""
        measured = self.moments.get(f"{_CURVATURE}/{layer.weight}")
        size = matrix.shape[1]
        empty = matrix.new_zeros(layer.groups, size, size)
        return damped(empty if measured is None else unpack_gram(measured, size), self.method.damping)

    def _stored(self, key: str, unpack: Callable[[Tensor], Tensor], stand_in: Callable[[], Tensor]) -> Tensor:
        """A moment summed over all folded tasks, float64; `stand_in` for each of the tasks that another method folded,
        which left none."""
        stored = self.state.statistics.get(key)
        if stored is None:
            return stand_in() * self.state.count
        missing = self.state.count - float(self.state.statistics[_COVERED])
        total = unpack(stored)
        return total.add_(stand_in(), alpha=missing) if missing else total

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
        own, merged, before, again, _ = self.features
        yield task, self.head, (merged, own)
        previous = self.state.previous
        if previous is not None and previous != task and previous in self.state.heads:
            yield previous, self.state.heads[previous], (again, before)


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
