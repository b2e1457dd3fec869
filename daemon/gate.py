"""The gate: does the new artifact compute what torch computed, and how much does it answer as the last one did?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foldd.core.bundle import Checkpoint
from foldd.core.errors import Refused
from foldd.core.quantized import QuantizedModel
from foldd.daemon.conflicts import RETAINED
from foldd.export.parity import BATCH, agreement, check_parity, run_artifact, signal_to_noise
from foldd.fusion.state import MergeState, as_tensor, merged_weights
from foldd.quantize.simulate import simulated_features

Outputs = dict[str, np.ndarray]  # of a network, by name

_PROBE_SAMPLES = 8
_LEAST_SIGNAL = 20.0  # dB: integer kernels round a code here and there otherwise, which measured 33 dB and more


@dataclass(frozen=True)
class Gate:
    """Limits from `[gate]`.

    Attributes:
        parity: largest relative difference between onnxruntime and torch.
        agreement: smallest share of inputs on which a quantized artifact decides as its float version.
    """

    parity: float
    agreement: float
    threads: int

    def check(
        self,
        model: Path,
        previous: Path | None,
        before: MergeState,
        after: MergeState,
        checkpoint: Checkpoint,
        quantized: QuantizedModel | None = None,
    ) -> dict[str, float]:
        """Scores of a new artifact, if it passes.

        Returns:
            `parity`; `retained/<task>` of each older task: share of inputs on which its head decides as in the last
            generation, the previous task's own inputs for itself, all that are at hand for the others;
            `accuracy/<task>` on the incoming task's calibration set where it has labels. Of a quantized artifact
            `signal_to_noise` in dB against the simulation in torch, in place of `parity`, and `agreement`: the share of
            a task's own inputs on which its head decides as that of the float network, of the worst task.

        Raises:
            Refused: `parity`, `quantized-worse`.
        """
        outputs = ["features", *(f"logits/{task}" for task in after.heads)]
        scores: dict[str, float] = {}
        weights = merged_weights(after)
        answered: list[tuple[str, np.ndarray, Outputs]] = []
        for inputs, task in self._probes(before, checkpoint):
            actual = run_artifact(model, inputs, outputs, threads=self.threads)
            expected = _torch(after, weights, inputs)
            if quantized is None:
                scores["parity"] = max(scores.get("parity", 0.0), check_parity(actual, expected, self.parity))
            else:
                noise = self._signal_to_noise(actual["features"], after, quantized, inputs)
                scores["signal_to_noise"] = min(scores.get("signal_to_noise", noise), noise)
                if task is not None:
                    alike = self._agreement(task, actual[f"logits/{task}"], expected[f"logits/{task}"])
                    scores["agreement"] = min(scores.get("agreement", alike), alike)
            if task is not None:
                answered.append((task, inputs, actual))
            if inputs is checkpoint.inputs and checkpoint.labels is not None:
                decided = actual[f"logits/{checkpoint.task}"].argmax(1)
                scores[f"accuracy/{checkpoint.task}"] = float((decided == checkpoint.labels).mean())
        if previous is not None and previous.exists():
            older = [task for task in before.heads if task != checkpoint.task]  # come again, it has another head
            scores |= self._retained(previous, older, answered)
        return scores

    def _signal_to_noise(
        self, actual: np.ndarray, after: MergeState, quantized: QuantizedModel, inputs: np.ndarray
    ) -> float:
        """Of features in onnxruntime against those of the simulation, in dB."""
        simulated = simulated_features(after.base.folded, quantized, as_tensor(inputs)).numpy()
        noise = signal_to_noise(actual, simulated)
        if not noise >= _LEAST_SIGNAL:
            raise Refused(
                "parity",
                f"onnxruntime and the simulation of the quantized network differ: {noise:.1f} dB, at least "
                f"{_LEAST_SIGNAL:.0f} dB are expected.",
                why="a fault in the export of this architecture, or weights so large that their products overflow.",
                remedy='Keep the state directory and report it; quantize.format = "float" serves meanwhile.',
            )
        return noise

    def _agreement(self, task: str, actual: np.ndarray, expected: np.ndarray) -> float:
        alike = agreement(actual, expected)
        if alike < self.agreement:
            raise Refused(
                "quantized-worse",
                f"Quantized, the network decides {alike:.0%} of {task}'s calibration inputs as the float one does; "
                f"the limit is {self.agreement:.0%}.",
                why="too few bits for this network, or activations far outside what was seen before.",
                remedy="Choose more bits in quantize.format, more effort in quantize.effort, or lower gate.agreement.",
            )
        return alike

    def _probes(self, before: MergeState, checkpoint: Checkpoint) -> list[tuple[np.ndarray, str | None]]:
        """Real inputs and whose they are, of this task and the previous one; otherwise noise of unit variance."""
        probes: list[tuple[np.ndarray, str | None]] = []
        if checkpoint.inputs is not None:
            probes.append((checkpoint.inputs, checkpoint.task))
        if before.calibration is not None:
            probes.append((before.calibration.numpy(), before.previous))
        if not probes:
            generator = np.random.default_rng(0)
            shape = (_PROBE_SAMPLES, *before.base.spec.input_shape)
            probes.append((generator.standard_normal(shape, dtype=np.float32), None))
        return probes

    def _retained(
        self, previous: Path, tasks: list[str], answered: list[tuple[str, np.ndarray, Outputs]]
    ) -> dict[str, float]:
        """Share of decisions that stayed, by task.

        Args:
            answered: whose inputs, the inputs, and what the new artifact gives for them.
        """
        if not tasks or not answered:
            return {}
        owners, inputs, new = zip(*answered, strict=True)
        whose = np.repeat(owners, [len(own) for own in inputs])
        old = run_artifact(previous, np.concatenate(inputs), [f"logits/{task}" for task in tasks], threads=self.threads)
        kept = {}
        for task in tasks:
            own = whose == task
            asked = own if own.any() else slice(None)
            decided = np.concatenate([outputs[f"logits/{task}"] for outputs in new])
            kept[f"{RETAINED}{task}"] = agreement(decided[asked], old[f"logits/{task}"][asked])
        return kept


@torch.no_grad()
def _torch(state: MergeState, weights: Mapping[str, Tensor], inputs: np.ndarray) -> Outputs:
    held = dict(weights)  # each access adds them up anew
    features = torch.cat([state.base.features(held, piece) for piece in torch.split(as_tensor(inputs), BATCH)])
    logits = {f"logits/{task}": head.logits(features).numpy() for task, head in state.heads.items()}
    return {"features": features.numpy(), **logits}
