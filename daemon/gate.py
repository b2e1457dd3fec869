"""The gate: does the new artifact compute what torch computed, and how much does it answer as the last one did?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldd.core.bundle import Checkpoint
from foldd.daemon.conflicts import RETAINED
from foldd.export.parity import BATCH, agreement, check_parity, run_artifact
from foldd.fusion.state import MergeState, as_tensor, merged_weights

_PROBE_SAMPLES = 8


@dataclass(frozen=True)
class Gate:
    """Limits from `[gate]`.

    Attributes:
        parity: largest relative difference between onnxruntime and torch.
    """

    parity: float
    threads: int

    def check(
        self, model: Path, previous: Path | None, before: MergeState, after: MergeState, checkpoint: Checkpoint
    ) -> dict[str, float]:
        """Scores of a new artifact, if it passes.

        Returns:
            `parity`; `retained/<task>` of each older task: share of inputs on which its head decides as in the last
            generation, the previous task's own inputs for itself, all that are at hand for the others;
            `accuracy/<task>` on the incoming task's calibration set where it has labels.

        Raises:
            Refused: `parity`.
        """
        outputs = ["features", *(f"logits/{task}" for task in after.heads)]
        scores = {"parity": 0.0}
        weights = merged_weights(after)
        for inputs in self._probes(before, checkpoint):
            actual = run_artifact(model, inputs, outputs, threads=self.threads)
            scores["parity"] = max(scores["parity"], check_parity(actual, _torch(after, weights, inputs), self.parity))
            if inputs is checkpoint.inputs and checkpoint.labels is not None:
                decided = actual[f"logits/{checkpoint.task}"].argmax(1)
                scores[f"accuracy/{checkpoint.task}"] = float((decided == checkpoint.labels).mean())
        if previous is not None and previous.exists():
            scores |= self._retained(model, previous, before, checkpoint)
        return scores

    def _probes(self, before: MergeState, checkpoint: Checkpoint) -> list[np.ndarray]:
        """Real inputs where there are any, of this task and the previous one; otherwise noise of unit variance."""
        probes = [] if checkpoint.inputs is None else [checkpoint.inputs]
        if before.calibration is not None:
            probes.append(before.calibration.numpy())
        if not probes:
            generator = np.random.default_rng(0)
            shape = (_PROBE_SAMPLES, *before.base.spec.input_shape)
            probes = [generator.standard_normal(shape, dtype=np.float32)]
        return probes

    def _retained(self, model: Path, previous: Path, before: MergeState, checkpoint: Checkpoint) -> dict[str, float]:
        # A task that came again has a new head, perhaps with other classes: nothing to agree with.
        tasks = [task for task in before.heads if task != checkpoint.task]
        own = None if before.calibration is None else before.calibration.numpy()
        foreign = [inputs for inputs in (own, checkpoint.inputs) if inputs is not None]
        if not tasks or not foreign:
            return {}
        outputs, inputs = [f"logits/{task}" for task in tasks], np.concatenate(foreign)
        new, old = (run_artifact(path, inputs, outputs, threads=self.threads) for path in (model, previous))
        kept = {}
        for task, output in zip(tasks, outputs, strict=True):
            part = slice(len(own)) if own is not None and task == before.previous else slice(None)
            kept[f"{RETAINED}{task}"] = agreement(new[output][part], old[output][part])
        return kept


@torch.no_grad()
def _torch(state: MergeState, weights: dict[str, Tensor], inputs: np.ndarray) -> dict[str, np.ndarray]:
    features = torch.cat([state.base.features(weights, piece) for piece in torch.split(as_tensor(inputs), BATCH)])
    logits = {f"logits/{task}": head.logits(features).numpy() for task, head in state.heads.items()}
    return {"features": features.numpy(), **logits}
