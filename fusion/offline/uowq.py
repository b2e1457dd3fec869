"""`uowq`: models weigh by their counts of samples and by how far they are apart (arXiv 2601.10779)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foldd.core.errors import BadSetup
from foldd.fusion.method import Progress
from foldd.fusion.offline.contract import (
    Models,
    Piece,
    elementwise,
    elementwise_workspace,
    require_share,
    size_of,
    weight_names,
)
from foldd.fusion.uowq_merge import TaskModel, merge_products, shares_for_all, shares_for_target


@dataclass(frozen=True)
class OfflineUowq:
    """θ = Σ β_i·θ_i with the shares β of `fusion.uowq_merge`, each model's Fisher information on its own inputs.

    Unlike other methods this one holds all models' task vectors at once, while their inner products are computed.

    Attributes:
        dimension: d; 0: the number of parameters, as published.
        target: place of the one model that the others are sources for, from 1 on, as published (Lemma 8);
            0: one model that serves all tasks.
        samples: counts of training samples in the models' order, with commas; empty: what the bundles tell.
    """

    name: ClassVar[str] = "uowq"
    needs_base: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = False

    dimension: float = 0.0
    target: int = 0
    samples: str = ""

    def __post_init__(self) -> None:
        require_share(self.name, "dimension", self.dimension, low=0, high=float("inf"))

    def merge(self, models: Models, progress: Progress) -> Iterator[Piece]:
        shares = self.shares(models)
        progress(0.9)

        def combine(_name: str, _start: int, parts: list[Tensor]) -> Tensor:
            merged = parts[0].clone()
            for part, share in zip(parts[1:], shares[1:], strict=True):
                merged += share * (part - parts[0])
            return merged

        yield from elementwise(models, combine, progress, vectors=False, begin=0.9)

    def shares(self, models: Models) -> tuple[float, ...]:
        """β of each model.

        Raises:
            BadSetup: `no-samples` where a bundle does not tell its count, `bad-option` for a target that is not there.
        """
        calibration = models.calibration
        assert calibration is not None
        if not 0 <= self.target <= models.count:
            raise BadSetup("bad-option", f"uowq: target is {self.target}, there are {models.count} models.")
        counts = self._counts(calibration.samples)
        base = calibration.network
        vectors = [
            {
                name: models.weights(model, name, 0, size_of(models, name)).view(models.shape(name))
                - base.weights[name]
                for name in models.names
            }
            for model in range(models.count)
        ]
        tasks = [
            TaskModel(vector, count, head, inputs)
            for vector, count, head, inputs in zip(vectors, counts, calibration.heads, calibration.inputs, strict=True)
        ]
        products = merge_products(base, tasks)
        dimension = self.dimension or float(sum(size_of(models, name) for name in weight_names(models)))
        if self.target:
            return shares_for_target(counts, products, dimension, self.target - 1)[0]
        return shares_for_all(counts, products, dimension)

    def _counts(self, told: Sequence[int | None]) -> list[float]:
        if self.samples:
            words = self.samples.split(",")
            if len(words) != len(told) or not all(word.strip().isdecimal() and int(word) for word in words):
                raise BadSetup(
                    "bad-option", f"uowq: samples is {self.samples!r}, for {len(told)} models.",
                    remedy="Give one positive count for each model, as --option samples=900,60.",
                )  # fmt: skip
            return [float(word) for word in words]
        counts = [float(count) for count in told if count]
        if len(counts) < len(told):
            raise BadSetup(
                "no-samples",
                "uowq weighs models by their counts of training samples, and a bundle does not tell its own.",
                remedy="Give --option samples=900,60 with a count for each model, or pack with `foldd pack --samples`.",
            )
        return counts

    def workspace(self, sizes: Sequence[int], count: int) -> int:
        return 4 * sum(sizes) * (count + 3) + elementwise_workspace(count)
