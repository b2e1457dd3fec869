"""Integers on the journey: a bundle of codes is folded as its floats are, and a state of codes is what is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from simulator import Box
from test_journey import rewritten

from foldd.base.store import open_base
from foldd.core.base_spec import read_base_spec
from foldd.core.bundle import open_bundle, write_bundle
from foldd.core.rounding import is_worth_codes, to_integers
from foldd.core.tensorfile import open_tensors
from foldd.daemon.jobs import Job, Plan
from foldd.daemon.layout import Layout
from foldd.daemon.pipeline import fold_job, read_state
from foldd.fusion.average import Average
from foldd.fusion.otmf import Otmf
from foldd.fusion.state import as_tensor, merged_weights

PLAN = {
    "options": {}, "data_free_method": "average", "data_free_options": {}, "threads": 1, "parity": 1e-4,
    "conflict": 0.0, "on_conflict": "fold", "config_digest": "0" * 64,
}  # fmt: skip


def coded(source: Path, target: Path, base: Path, *, as_floats: bool = False) -> Path:
    """A bundle's differences to the base as `foldd pack --quantize w8` writes them, or as the floats of those codes."""
    spec, stored = read_base_spec(base / "base.json"), open_tensors(base / "weights.safetensors").tensors
    read = open_bundle(source, spec)
    parameters = {}
    for name, tensor in read.parameters.items():
        values = tensor.float32() - stored[name].float32()
        codes = to_integers(values, 8) if is_worth_codes(spec.tensors[name].role, values.shape) else None
        parameters[name] = values if codes is None else codes.values() if as_floats else codes
    write_bundle(
        target, parameters, read.head, task=read.task, base=spec, is_delta=True, inputs=read.inputs, labels=read.labels,
        samples=read.samples,
    )  # fmt: skip
    return target


@pytest.fixture
def box(make_box) -> Box:
    return make_box(quantize={"state": "quantized"})


def fold(layout: Layout, bundle: Path, *, parent: str | None = None, state="quantized", seed=0, method="average"):
    """One fold as the worker does it, with its stage taken over as the daemon would; gives the state's digest."""
    base = open_base(layout.base)
    sha256 = open_bundle(bundle, base.spec).sha256
    layout.stage(sha256).parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(method=method, seed=seed, state=state, **PLAN)
    job = Job(1, sha256, str(bundle), bundle.name, plan, 1, None, parent)
    staged = fold_job(job, layout, base, 0, lambda _: None)
    layout.blob(staged.state_sha256).write_bytes((layout.stage(sha256) / "state.safetensors").read_bytes())
    return staged.state_sha256, layout.stage(sha256) / "model.onnx"


def state_of(layout: Layout, sha256: str):
    return read_state(open_base(layout.base), layout.blob(sha256))


def kinds(layout: Layout, sha256: str) -> set[str]:
    """Types of the merged weights in a stored state."""
    spec, file = read_base_spec(layout.base / "base.json"), open_tensors(layout.blob(sha256))
    return {
        tensor.dtype
        for name, tensor in file.tensors.items()
        if name.startswith("merged/") and is_worth_codes(spec.tensors[name.removeprefix("merged/")].role, tensor.shape)
    }


def test_what_is_served_is_what_is_kept(box):
    """The artifact's features are those of the stored codes, far closer than rounding moved them."""
    exact, _ = fold(box.layout, box.bundle("alpha", seed=1), state="float")
    first, artifact = fold(box.layout, box.bundle("alpha", seed=1))
    assert kinds(box.layout, exact) == {"F32"}
    assert kinds(box.layout, first) == {"I8"}
    x = torch.randn(5, *box.spec.input_shape, generator=torch.Generator().manual_seed(0))
    states = [state_of(box.layout, sha256) for sha256 in (first, exact)]
    kept, unrounded = (state.base.features(merged_weights(state), x).numpy() for state in states)
    served = onnxruntime.InferenceSession(artifact).run(["features"], {"input": x.numpy()})[0]
    moved = np.abs(kept - unrounded).max()
    assert 0 < np.abs(served - kept).max() < moved / 20


def test_the_setting_may_change_and_the_seed_decides(box):
    bundles = [box.bundle(f"t{i}", seed=i) for i in range(3)]
    one, _ = fold(box.layout, bundles[0], state="float")
    two, _ = fold(box.layout, bundles[1], parent=one)
    three, _ = fold(box.layout, bundles[2], parent=two, state="float")
    assert [kinds(box.layout, sha256) for sha256 in (one, two, three)] == [{"F32"}, {"I8"}, {"F32"}]
    assert fold(box.layout, bundles[1], parent=one)[0] == two
    assert fold(box.layout, bundles[1], parent=one, seed=1)[0] != two
    sizes = [box.layout.blob(sha256).stat().st_size for sha256 in (one, two)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("method", [Average(), Otmf()])
def test_a_bundle_of_codes_folds_as_its_floats_do(method, box, tmp_path):
    base = open_base(box.layout.base)
    states = []
    for as_floats in (True, False):
        state = method.init(base)
        for number in range(2):
            path = tmp_path / f"{number}-{as_floats}.safetensors"
            coded(box.bundle(f"t{number}", seed=number), path, box.layout.base, as_floats=as_floats)
            state, report = method.fold(state, open_bundle(path, base.spec), seed=3)
        states.append((state, report))
    (one, first), (two, second) = states
    assert first == second
    for name in base.weights:
        assert torch.equal(one.merged[name], two.merged[name]), name
    assert {n: t.tolist() for n, t in one.statistics.items()} == {n: t.tolist() for n, t in two.statistics.items()}


def test_codes_all_the_way(box, tmp_path):
    """The real daemon takes a bundle of codes, keeps codes, folds a bundle of floats onto them, and sets aside what is
    malformed."""
    coded(box.bundle("alpha", seed=1), tmp_path / "alpha.safetensors", box.layout.base)
    coded(box.bundle("gamma", seed=3), tmp_path / "good.safetensors", box.layout.base)
    orphan = next(n for n in open_tensors(tmp_path / "good.safetensors").tensors if n.startswith("step/"))
    bad = rewritten(tmp_path / "good.safetensors", tmp_path / "gamma.safetensors", lambda t, _: t.pop(orphan))
    box.start()
    box.drop(tmp_path / "alpha.safetensors")
    box.wait_generation(1)
    box.drop(bad)
    box.drop(box.bundle("beta", seed=2))
    box.wait_generation(2)
    box.wait(lambda: box.reasons() == {"gamma.safetensors": "codes-without-step"}, "the bad file's reason")
    sha256 = box.generations()[-1].state_sha256
    assert kinds(box.layout, sha256) == {"I8"}
    report = json.loads((box.layout.current / "report.json").read_text())
    assert (report["fold"]["count"], report["fold"]["task"]) == (2, "beta")
    assert report["scores"]["parity"] <= 1e-4
    session = onnxruntime.InferenceSession(box.layout.current / "model.onnx")
    x = np.ones((2, *box.spec.input_shape), np.float32)
    state = state_of(box.layout, sha256)
    served = session.run(["features"], {"input": x})[0]
    np.testing.assert_allclose(served, state.base.features(merged_weights(state), as_tensor(x)).numpy(), atol=1e-4)
