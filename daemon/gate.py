"""The gate: does the new artifact compute what torch computed, and does it still answer as the last one did?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldd.core.bundle import Checkpoint
from foldd.core.errors import Refused
from foldd.export.parity import BATCH, agreement, check_parity, run_artifact
from foldd.fusion.state import MergeState, as_tensor, merged_weights

_PROBE_SAMPLES = 8


@dataclass(frozen=True)
class Gate:
    """Limits from `[gate]`.

    Attributes:
        parity: largest relative difference between onnxruntime and torch.
        agreement: least share of the previous task's calibration inputs on which the new generation must decide
            as the last one did; 0 only reports it.
    """

    parity: float
    agreement: float
    threads: int

    def check(
        self, model: Path, previous: Path | None, before: MergeState, after: MergeState, checkpoint: Checkpoint
    ) -> dict[str, float]:
        """Scores of a new artifact, if it passes.

        Returns:
            `parity`; `retained/<task>`: agreement with the last generation on the previous task's inputs;
            `accuracy/<task>` on the incoming task's calibration set where it has labels.

        Raises:
            Refused: `parity`, `agreement`.
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
        # A task that came again has a new head, perhaps with other classes: nothing to agree with.
        comparable = previous is not None and previous.exists() and before.previous != checkpoint.task
        if comparable and previous is not None and before.calibration is not None:
            scores[f"retained/{before.previous}"] = self._retained(model, previous, before)
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

    def _retained(self, model: Path, previous: Path, before: MergeState) -> float:
        assert before.calibration is not None
        output, inputs = f"logits/{before.previous}", before.calibration.numpy()
        new, old = (run_artifact(path, inputs, [output], threads=self.threads)[output] for path in (model, previous))
        share = agreement(new, old)
        if share < self.agreement:
            raise Refused(
                "agreement",
                f"On {before.previous}'s calibration inputs the new generation decides as the last one in "
                f"{share:.0%} of cases, the limit is {self.agreement:.0%}.",
                why="the incoming task conflicts with the folded ones.",
                remedy="Lower gate.agreement if that is acceptable; the last generation goes on serving.",
            )
        return share


@torch.no_grad()
def _torch(state: MergeState, weights: dict[str, Tensor], inputs: np.ndarray) -> dict[str, np.ndarray]:
    features = torch.cat([state.base.features(weights, piece) for piece in torch.split(as_tensor(inputs), BATCH)])
    logits = {f"logits/{task}": head.logits(features).numpy() for task, head in state.heads.items()}
    return {"features": features.numpy(), **logits}
