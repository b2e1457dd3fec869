"""What quantized artifacts cost on a device: bytes, and the time of one inference in onnxruntime.

Beside foldd's own formats stands onnxruntime's static quantization of the float artifact, as its documentation has it:
QDQ, unsigned activations, signed weights per channel, after its own preprocessing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from benchmarks.quant_models import Subject, Subjects, quantizer
from foldd.base.store import open_skeleton
from foldd.core.bundle import Head
from foldd.export.artifact import build_artifact
from foldd.export.audit import audit_artifact
from foldd.export.parity import agreement, run_artifact, signal_to_noise
from foldd.export.quantized import build_quantized_artifact
from foldd.quantize.hdrq import as_shipped

FORMATS = {"w8a8": (8, 8), "w4a8": (4, 8), "w8": (8, None), "w4": (4, None)}
REPEATS, INNER = 60, 10  # interleaved rounds, and inferences in each


def artifacts(
    subjects: Subjects, base_folder: Path, subject: Subject, inputs: Tensor, heads: Mapping[str, Head], iterations: int,
    folder: Path,
) -> dict[str, Path]:  # fmt: skip
    """Method and bits → artifact, with all heads."""
    skeleton, _ = open_skeleton(base_folder)
    made = {"float": folder / "float.onnx"}
    build_artifact(
        skeleton, {name: t.numpy() for name, t in subject.weights.items()}, heads, made["float"], metadata={}
    )
    for bits, (weight_bits, activation_bits) in FORMATS.items():
        how = as_shipped(weight_bits, activation_bits, iterations)
        model = subjects.quantize(how, subject, inputs, 0)
        made[f"shipped {bits}"] = folder / f"{bits}.onnx"
        build_quantized_artifact(skeleton, model, heads, made[f"shipped {bits}"], metadata={})
    nearest, _ = quantizer("mse", "w8a8", 0)
    made["mse w8a8"] = folder / "mse.onnx"
    build_quantized_artifact(
        skeleton, subjects.quantize(nearest, subject, inputs, 0), heads, made["mse w8a8"], metadata={}
    )
    made["ort-static w8a8"] = _static(made["float"], inputs, folder)
    return made


def static_hits(subjects: Subjects, base_folder: Path, subject: Subject, inputs: Tensor) -> np.ndarray:
    """Which images onnxruntime's static quantization of a subject's artifact decides rightly: bool [n]."""
    skeleton, _ = open_skeleton(base_folder)
    head = Head(subject.head.weight.numpy(), subject.head.bias.numpy())
    weights = {name: tensor.numpy() for name, tensor in subject.weights.items()}
    logits = f"logits/{subject.name}"
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "float.onnx"
        build_artifact(skeleton, weights, {subject.name: head}, model, metadata={})
        static = _static(model, inputs, Path(name))
        answers = (run_artifact(static, batch.numpy(), [logits]) for batch in subjects.batches(subject))
        decided = np.concatenate([answer[logits].argmax(1) for answer in answers])
    return np.asarray(decided == subjects.bench.images[subject.images].y)


def _static(model: Path, inputs: Tensor, folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(inputs.numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self._rows, None)
            return None if row is None else {"input": row[None]}

    prepared, target = folder / "prepared.onnx", folder / "static.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    return target


def device_rows(base: str, made: Mapping[str, Path], probe: np.ndarray, head: str) -> list[dict[str, Any]]:
    """One row for each artifact: bytes, seconds of one inference, and how it decides beside the float one.

    One thread, batch 1, one task asked for, as the runtime does; interleaved: in each round every artifact runs a few
    inferences. `seconds` is the median over
    rounds of this process's CPU time, `ratio` the median over rounds of float's time by the artifact's.
    """
    sessions = {}
    for name, path in made.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    one, times = {"input": probe[:1]}, {name: [] for name in made}  # type: dict[str, Any], dict[str, list[float]]
    for session in sessions.values():
        for _ in range(INNER):
            session.run([head], one)
    for _ in range(REPEATS):
        for name, session in sessions.items():
            started = time.process_time()
            for _ in range(INNER):
                session.run([head], one)
            times[name].append((time.process_time() - started) / INNER)
    expected = run_artifact(made["float"], probe, [head])[head]
    rows = []
    for name, path in made.items():
        method, _, bits = name.partition(" ")
        actual = run_artifact(path, probe, [head])[head]
        ratios = np.divide(times["float"], times[name])
        audit, noise = audit_artifact(path), min(200.0, signal_to_noise(actual, expected))
        rows.append({
            "base": base, "method": method, "bits": bits or "float", "merged": None, "bytes": path.stat().st_size,
            "size_ratio": path.stat().st_size / made["float"].stat().st_size,
            "seconds": float(np.median(times[name])), "ratio": float(np.median(ratios)),
            "ratio_low": float(np.quantile(ratios, 0.25)), "ratio_high": float(np.quantile(ratios, 0.75)),
            "agreement": agreement(actual, expected), "signal_to_noise_db": noise,
            "kernels": " ".join(f"{kind}:{count}" for kind, count in sorted(audit.kernels.items())),
        })  # fmt: skip
    return rows
