"""One checkpoint from its file to a staged generation: verify, fold, export, gate, stage. Runs in the worker."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foldd.base.batch_norm import fold_norms
from foldd.base.network import Base
from foldd.base.store import open_skeleton
from foldd.core.bundle import Checkpoint, Head, open_bundle
from foldd.core.digests import sha256_file
from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.files import build_file, sync_directory, write_file
from foldd.core.manifest import ArtifactEntry
from foldd.core.quantized import QuantizedModel
from foldd.core.tensorfile import open_tensors, write_tensors
from foldd.daemon.conflicts import decide, find_conflicts
from foldd.daemon.crashpoints import crash_point
from foldd.daemon.gate import Gate
from foldd.daemon.jobs import Job, Plan, Progress, Staged
from foldd.daemon.layout import Layout
from foldd.daemon.memory import peak_rss_bytes, reset_peak
from foldd.daemon.methods import make_method
from foldd.daemon.quantizing import audited, observe_state, quantize_state
from foldd.daemon.verify import verify_change, verify_values
from foldd.export.artifact import build_artifact
from foldd.export.quantized import build_quantized_artifact
from foldd.fusion.alignment import Alignment
from foldd.fusion.integers import round_vector
from foldd.fusion.method import FoldReport
from foldd.fusion.state import MergeState, empty_state, merged_weights, pack, unpack

# Share of a job's time that each stage takes, about; only for the progress display.
_SHARES = {"verify": 0.05, "fold": 0.80, "export": 0.05, "gate": 0.05, "stage": 0.05}
_SHARES_ROUNDED = {"verify": 0.05, "fold": 0.60, "quantize": 0.15, "export": 0.05, "gate": 0.10, "stage": 0.05}
_SHARES_RECONSTRUCTED = {"verify": 0.05, "fold": 0.20, "quantize": 0.60, "export": 0.05, "gate": 0.05, "stage": 0.05}


@dataclass
class Stages:
    """Times the stages and reports progress over all of them."""

    send: Callable[[Progress], None]
    shares: Mapping[str, float]
    task: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _sent: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        before = sum(self.shares[done] for done in self.seconds)

        def progress(fraction: float) -> None:
            if fraction in (0.0, 1.0) or time.monotonic() - self._sent > 0.2:
                self._sent = time.monotonic()
                self.send(Progress(name, min(1.0, before + self.shares[name] * fraction), self.task))

        progress(0.0)
        started = time.monotonic()
        yield progress
        self.seconds[name] = round(time.monotonic() - started, 6)


def fold_job(job: Job, layout: Layout, base: Base, baseline_bytes: int, send: Callable[[Progress], None]) -> Staged:
    """Builds the next generation in the job's stage folder.

    Args:
        baseline_bytes: the worker's RSS after its imports, which peak RSS is counted from.

    Raises:
        BadCheckpoint: the checkpoint is wrong.
        Refused: the gate refused the result; Held: until somebody says yes.
        BadSetup: the state directory is wrong.
    """
    reset_peak()
    stages = Stages(send, _shares(job.plan))
    root = layout.root
    torch.set_num_threads(job.plan.threads)
    target = layout.stage(job.sha256)
    target.mkdir(exist_ok=True)
    state_file = target / "state.safetensors"
    with stages.stage("verify"):
        checkpoint = _verify(job, base)
        crash_point("verify", root)
    stages.task = checkpoint.task
    with stages.stage("fold") as progress:
        crash_point("fold.before", root)
        before = load_state(layout, base, job.state_sha256)
        state, report = _fold(job, before, checkpoint, _halfway(progress, root))
        held = tensor_bytes()
        if job.plan.format != "float":
            state = observe_state(job.plan, before, state)
        # Everything behind the fold reads the new state from its file, tensor by tensor: the fold is the widest moment.
        write_state(state, state_file)
        state = read_state(base, state_file)
        crash_point("fold.after", root)
    quantized: QuantizedModel | None = None
    if job.plan.format != "float":
        with stages.stage("quantize") as progress:
            quantized = quantize_state(job.plan, before, state, seed_of(job.plan, checkpoint), progress)
            crash_point("quantize", root)
    with stages.stage("export"):
        artifact = _export(job, layout, state, quantized, target / "model.onnx")
        crash_point("export.written", root)
    with stages.stage("gate"):
        gate = Gate(job.plan.parity, job.plan.agreement, job.plan.threads)
        previous = None if job.parent is None else layout.generation(job.parent) / "model.onnx"
        scores = gate.check(target / "model.onnx", previous, before, state, checkpoint, quantized)
        conflicts = find_conflicts(scores, job.plan.conflict)
        warnings = report.warnings + decide(checkpoint.task, conflicts, job.plan.on_conflict)
        quantizing = None if quantized is None else audited(quantized, target / "model.onnx")
        warnings += () if quantizing is None else tuple(quantizing["warnings"])
        crash_point("gate", root)
    with stages.stage("stage"):
        state_sha256 = sha256_file(state_file)
    peak = max(0, peak_rss_bytes() - baseline_bytes)
    content: dict[str, Any] = {
        "generation": job.generation, "checkpoint_sha256": job.sha256, "fold": report.as_dict(), "scores": scores,
        "quantize": quantizing,
        "conflicts": conflicts,
        "seconds": stages.seconds, "peak_rss_bytes": peak, "tensor_bytes": held,
    }  # fmt: skip
    write_file(target / "report.json", json.dumps(content, indent=1).encode() + b"\n")
    sync_directory(target)
    crash_point("stage.written", root)
    return Staged(
        task=checkpoint.task,
        classes=len(checkpoint.head.bias),
        class_names=checkpoint.classes,
        method=report.method,
        artifact=artifact,
        state_sha256=state_sha256,
        scores=scores,
        seconds=stages.seconds,
        peak_rss_bytes=peak,
        warnings=warnings,
    )


def _shares(plan: Plan) -> Mapping[str, float]:
    if plan.format == "float":
        return _SHARES
    return _SHARES_RECONSTRUCTED if plan.iterations else _SHARES_ROUNDED


def _verify(job: Job, base: Base) -> Checkpoint:
    path = Path(job.file)
    if sha256_file(path) != job.sha256:
        raise BadCheckpoint(
            "changed-after-claim",
            f"{job.name} is not the file any more that was claimed.",
            why="its writer still had it open and went on writing.",
            remedy="Write the file elsewhere and move it into the inbox when it is whole.",
        )
    checkpoint = open_bundle(path, base.spec, sha256=job.sha256, name=job.name)
    verify_values(checkpoint, base.role, lambda name: base.weights[name].numpy())
    verify_change(checkpoint, base, job.plan.change)
    return checkpoint


def _fold(
    job: Job, state: MergeState, checkpoint: Checkpoint, progress: Callable[[float], None]
) -> tuple[MergeState, FoldReport]:
    plan = job.plan
    method = make_method(plan.method, plan.options)
    if method.needs_calibration and checkpoint.inputs is None:
        method = make_method(plan.data_free_method, plan.data_free_options)
    seed = seed_of(plan, checkpoint)
    new, report = method.fold(state, checkpoint, seed=seed, progress=progress)
    bad = [name for name, tensor in new.merged.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise BadCheckpoint(
            "fold-diverged",
            f"Folding {checkpoint.task} gave values that are not finite, first in {bad[0]}.",
            why="weights of extreme size in this checkpoint.",
            remedy="Look at its task-vector norm; fine-tune with a lower learning rate.",
        )
    if plan.state == "quantized":
        # Here and not when it is stored: what is exported and judged is what the next fold will find.
        new = replace(new, merged=round_vector(state.base, new.merged, seed))
    return Alignment(plan.heads, **plan.head_options).after_fold(state, checkpoint, new, report)


def seed_of(plan: Plan, checkpoint: Checkpoint) -> int:
    """Each checkpoint draws its own numbers, the same ones on every replay."""
    return (plan.seed + int(checkpoint.sha256[:8], 16)) % 2**31


def _halfway(progress: Callable[[float], None], root: Path) -> Callable[[float], None]:
    def report(fraction: float) -> None:
        progress(fraction)
        if fraction >= 0.5:
            crash_point("fold.middle", root)

    return report


def _export(
    job: Job, layout: Layout, state: MergeState, quantized: QuantizedModel | None, target: Path
) -> ArtifactEntry:
    skeleton, rules = open_skeleton(layout.base)
    heads = {task: Head(head.weight.numpy(), head.bias.numpy()) for task, head in state.heads.items()}
    spec = state.base.spec
    provenance = {
        "foldd.base": spec.digest, "foldd.generation": str(job.generation), "foldd.checkpoint": job.sha256,
        "foldd.config": job.plan.config_digest, "foldd.quantization": job.plan.format,
    }  # fmt: skip
    if quantized is None:
        weights = fold_norms({name: tensor.numpy() for name, tensor in merged_weights(state).items()}, rules)
        build_artifact(skeleton, weights, heads, target, metadata=provenance)
    else:
        build_quantized_artifact(skeleton, quantized, heads, target, metadata=provenance)
    return ArtifactEntry(sha256_file(target), target.stat().st_size, spec.input_shape, spec.features)


def load_state(layout: Layout, base: Base, sha256: str | None) -> MergeState:
    """The merge state of a digest, or the empty one.

    Raises:
        BadSetup: `broken-state`.
    """
    if sha256 is None:
        return empty_state(base)
    path = layout.blob(sha256)
    if not path.exists() or sha256_file(path) != sha256:
        raise BadSetup(
            "broken-state",
            f"The merge state {path} is {'damaged' if path.exists() else 'missing'}.",
            why="a damaged disk, or somebody tidied the state directory.",
            remedy="Restore it from a backup, or start a fresh state directory and drop the checkpoints again.",
        )
    return read_state(base, path)


def read_state(base: Base, path: Path) -> MergeState:
    """The merge state in a file; its tensors stay there.

    Raises:
        BadSetup: `broken-state`, `wrong-base`.
    """
    file = open_tensors(path)
    arrays: dict[str, np.ndarray] = {name: tensor.stored() for name, tensor in file.tensors.items()}
    return unpack(base, arrays, file.metadata)


def write_state(state: MergeState, path: Path) -> None:
    """Writes the merge state durably."""
    tensors, metadata = pack(state)
    build_file(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def tensor_bytes() -> int:
    """Bytes of all torch tensors alive in this process, shared storage counted once: what may not grow with folds.

    Collects first: graphs, hooks and closures make cycles, and Python knows only that they are few objects, not that
    each may hold a copy of the model.
    """
    gc.collect()
    alive = {}
    for thing in gc.get_objects():
        # By exact type: the exported program also keeps fake tensors, which have shapes but no bytes.
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            alive[storage.data_ptr()] = storage.nbytes()
    return sum(alive.values())
