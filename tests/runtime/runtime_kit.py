"""What the runtime's tests share: tiny models, signed generations, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from foldd.core.digests import sha256_file
from foldd.core.files import point
from foldd.core.manifest import ArtifactEntry, Manifest, TaskEntry, sign_manifest
from foldd.core.signatures import Identity, new_identity

DAEMON = new_identity("daemon")
TASKS = {"cats": 2, "dogs": 3}
INPUT_SHAPE = (4,)
FEATURES = 3


def make_model(path: Path, value: float, tasks: dict[str, int] = TASKS, *, broken: str = "", padding: int = 0) -> None:
    """A model all of whose logits are `value`. Running the head of task `broken` fails; `padding` adds bytes."""
    nodes = [helper.make_node("MatMul", ["input", "w"], ["features"])]
    constants = [numpy_helper.from_array(np.zeros((*INPUT_SHAPE, FEATURES), np.float32), "w")]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES])]
    for task, classes in tasks.items():
        constants.append(numpy_helper.from_array(np.zeros((FEATURES, classes), np.float32), f"{task}/weight"))
        constants.append(numpy_helper.from_array(np.full(classes, value, np.float32), f"{task}/bias"))
        nodes.append(helper.make_node("MatMul", ["features", f"{task}/weight"], [f"{task}/product"]))
        if task == broken:  # 7 columns never fit: onnxruntime sees it only when it runs the node
            constants.append(numpy_helper.from_array(np.array([-1, 7], np.int64), "seven"))
            nodes.append(helper.make_node("Add", [f"{task}/product", f"{task}/bias"], [f"{task}/sum"]))
            nodes.append(helper.make_node("Reshape", [f"{task}/sum", "seven"], [f"logits/{task}"]))
        else:
            nodes.append(helper.make_node("Add", [f"{task}/product", f"{task}/bias"], [f"logits/{task}"]))
        shape = ["rows", "columns"] if task == broken else ["batch", classes]
        outputs.append(helper.make_tensor_value_info(f"logits/{task}", TensorProto.FLOAT, shape))
    if padding:
        noise = np.random.default_rng(0).integers(0, 256, padding, dtype=np.uint8)
        constants.append(numpy_helper.from_array(noise, "padding"))
        nodes.append(helper.make_node("Identity", ["padding"], ["unused"]))
        outputs.append(helper.make_tensor_value_info("unused", TensorProto.UINT8, [padding]))
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *INPUT_SHAPE])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def make_manifest(model: Path, generation: int, tasks: dict[str, int] = TASKS) -> Manifest:
    entries = {t: TaskEntry(n, "0" * 64, tuple(f"{t}-{i}" for i in range(n))) for t, n in tasks.items()}
    artifact = ArtifactEntry(sha256_file(model), model.stat().st_size, INPUT_SHAPE, FEATURES)
    return Manifest(
        generation, generation - 1 or None, "b" * 64, "average", "c" * 64, entries, artifact, {}, "2026-11-23T00:00:00Z"
    )


def publish(
    root: Path,
    generation: int,
    *,
    identity: Identity = DAEMON,
    value: float | None = None,
    tasks: dict[str, int] = TASKS,
    padding: int = 0,
) -> Path:
    """Writes a generation as the daemon does and points `current` to it; its folder."""
    folder = root / "generations" / f"{generation:06d}"
    folder.mkdir(parents=True)
    make_model(folder / "model.onnx", generation if value is None else value, tasks, padding=padding)
    (folder / "manifest.json").write_bytes(
        sign_manifest(make_manifest(folder / "model.onnx", generation, tasks), identity)
    )
    point(root / "current", f"generations/{folder.name}")
    return folder


def samples(n: int = 2) -> np.ndarray:
    return np.ones((n, *INPUT_SHAPE), np.float32)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Polls until a condition holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


__all__ = ["DAEMON", "TASKS", "make_manifest", "make_model", "onnx", "publish", "samples", "wait_for"]
