"""One loaded generation: an onnxruntime session that answers one task at a time."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import onnxruntime as ort

from foldd.core.errors import BadManifest, BadRequest, Unavailable
from foldd.core.manifest import Manifest

INPUT, FEATURES, LOGITS = "input", "features", "logits/"
_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
          "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8}  # fmt: skip


class Session:
    """`model.onnx` of one generation, on the CPU. Safe for use from several threads at once."""

    def __init__(self, model: Path, manifest: Manifest, *, threads: int = 0) -> None:
        """Loads a model; does not compare digests, that is the slot's and the store's duty.

        Args:
            threads: intra-op threads of one request; 0 leaves it to onnxruntime (one for each core).

        Raises:
            BadManifest: `artifact-unloadable`, `artifact-differs` (not the inputs and outputs that the manifest names).
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors come as exceptions, warnings are for whoever exports
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadManifest(
                "artifact-unloadable",
                f"onnxruntime cannot load generation {manifest.generation}: {error}",
                why="the artifact needs a newer onnxruntime, or is damaged.",
                remedy=f"This device has onnxruntime {ort.__version__}; upgrade it, or fold again.",
            ) from error
        self.manifest = manifest
        self.tasks = tuple(sorted(manifest.tasks))
        self._check_interface()
        # Builds for training compute only what is asked for; the ordinary ones ignore this and compute every head
        # (microsoft/onnxruntime#16013, seen with 1.32), which is one small matrix product each.
        self._run = ort.RunOptions()
        self._run.only_execute_path_to_fetches = True

    @property
    def generation(self) -> int:
        return self.manifest.generation

    def infer(self, task: str, inputs: np.ndarray) -> np.ndarray:
        """Logits [n, classes] of one task.

        Args:
            inputs: [n, *input_shape] of the model's own type (float32).

        Raises:
            BadRequest: `unknown-task`, `wrong-shape`, `wrong-type`.
            Unavailable: `inference-failed`.
        """
        if task not in self.manifest.tasks:
            near = difflib.get_close_matches(task, self.tasks, n=1)
            raise BadRequest(
                "unknown-task",
                f"Generation {self.generation} has no task {task[:64]!r}.",
                why="it has not been folded yet, or is spelt differently.",
                remedy=f"Did you mean {near[0]!r}?" if near else f"Its tasks: {', '.join(self.tasks) or 'none'}.",
            )
        return self._fetch(LOGITS + task, inputs)

    def features(self, inputs: np.ndarray) -> np.ndarray:
        """Features [n, features], the input of every head.

        Raises:
            BadRequest: `wrong-shape`, `wrong-type`.
            Unavailable: `inference-failed`.
        """
        return self._fetch(FEATURES, inputs)

    def warm_up(self) -> None:
        """Runs every task on one zero sample, so that neither the first request nor a broken head is a surprise.

        Raises:
            BadManifest: `artifact-differs`, `artifact-fails`.
        """
        zeros = np.zeros((1, *self.manifest.artifact.input_shape), self._type)
        for task, entry in self.manifest.tasks.items():
            try:
                logits = self.infer(task, zeros)
            except Unavailable as error:
                raise BadManifest(
                    "artifact-fails", f"Generation {self.generation} fails on zeros: {error.what}"
                ) from error
            if logits.shape != (1, entry.classes):
                raise self._differs(
                    f"logits/{task} has shape {logits.shape}, the manifest says {entry.classes} classes"
                )

    def _fetch(self, output: str, inputs: np.ndarray) -> np.ndarray:
        expected = self.manifest.artifact.input_shape
        if inputs.ndim != len(expected) + 1 or inputs.shape[1:] != expected or inputs.shape[0] == 0:
            raise BadRequest(
                "wrong-shape",
                f"The input has shape {list(inputs.shape)}, needed is [n, {', '.join(map(str, expected))}] with n ≥ 1.",
                why="a single sample needs a batch dimension too." if inputs.shape == expected else "",
                remedy="Use x[None] for one sample." if inputs.shape == expected else "Prepare inputs as in training.",
            )
        if inputs.dtype != self._type:
            name = np.dtype(self._type).name
            raise BadRequest(
                "wrong-type",
                f"The input is {inputs.dtype}, the model takes {name}.",
                remedy=f"Convert it with x.astype('{name}'), scaled as in training.",
            )
        try:
            return np.asarray(self._session.run([output], {INPUT: inputs}, self._run)[0])
        except Exception as error:
            raise Unavailable("inference-failed", f"onnxruntime failed on {output}: {error}") from error

    def _check_interface(self) -> None:
        inputs = {node.name: node for node in self._session.get_inputs()}
        if set(inputs) != {INPUT}:
            raise self._differs(f"its inputs are {', '.join(sorted(inputs)) or 'none'}, not `{INPUT}`")
        if inputs[INPUT].type not in _TYPES:
            raise self._differs(f"its input is of type {inputs[INPUT].type}")
        self._type = _TYPES[inputs[INPUT].type]
        outputs = {node.name for node in self._session.get_outputs()}
        if missing := {FEATURES, *(LOGITS + task for task in self.tasks)} - outputs:
            raise self._differs(f"it lacks the outputs {', '.join(sorted(missing))}")

    def _differs(self, how: str) -> BadManifest:
        return BadManifest(
            "artifact-differs",
            f"The model of generation {self.generation} does not fit its manifest: {how}.",
            why="artifact and manifest come from different exports.",
        )
