"""Quantized generations on the journey: every format, what is reported, replayed, refused, killed, and served."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import crash_points_taken
from simulator import Box
from test_journey import rewritten

from foldd.base.batch_norm import fold_norms
from foldd.base.lazy import Lazy
from foldd.base.store import open_base
from foldd.core.bundle import open_bundle
from foldd.core.digests import sha256_file
from foldd.core.errors import Refused
from foldd.core.tensorfile import open_tensors
from foldd.daemon.crashpoints import VARIABLE
from foldd.daemon.jobs import Job, Plan
from foldd.daemon.layout import Layout
from foldd.daemon.pipeline import fold_job, read_state
from foldd.daemon.plan import PACE
from foldd.daemon.quantizing import folded_weights, quantize_state
from foldd.export.parity import run_artifact
from foldd.fusion.state import merged_weights
from foldd.quantize.calibrate import observe_network
from foldd.quantize.places import find_places
from foldd.runtime.slot import Slot

ITERATIONS = 20
KEYS = {
    "weight_bits", "activation_bits", "layers", "iterations", "losses", "quantizer", "calibration_inputs", "warnings",
    "kernels", "fused", "left_float", "folded",
}  # fmt: skip


def inputs(box: Box, n=32, seed=9):
    return np.random.default_rng(seed).standard_normal((n, *box.spec.input_shape)).astype(np.float32)


def report(box: Box):
    return json.loads((box.layout.current / "report.json").read_text())


def state_of(layout: Layout, sha256: str):
    return read_state(open_base(layout.base), layout.blob(sha256))


def undecided(box: Box, task: str, **options) -> Path:
    """A bundle whose head decides by what differs between inputs, and not by what they have in common: a little noise
    then changes some decisions."""
    base, made = open_base(box.layout.base), box.bundle(task, **options)

    def change(tensors, _):
        features = base.features(dict(base.weights), torch.from_numpy(tensors["calibration/inputs"]))
        tensors["head/bias"] = -tensors["head/weight"] @ features.mean(0).numpy()

    target = box.folder / "undecided" / made.name
    target.parent.mkdir(exist_ok=True)
    return rewritten(made, target, change)


def decisions(layout: Layout, sha256: str, task: str, x):
    """Those of the float network that the state holds."""
    state = state_of(layout, sha256)
    features = state.base.features(merged_weights(state), torch.from_numpy(x))
    return state.heads[task].logits(features).argmax(1).numpy()


# --- in this process, as the worker does it


class Folder:
    """Folds bundles one after the other into generations, taking each stage over as the daemon would."""

    def __init__(self, box: Box):
        self.box, self.layout, self.base = box, box.layout, open_base(box.layout.base)
        self.state: str | None = None
        self.count = 0

    def fold(self, bundle: Path, kind="w8a8", *, iterations=ITERATIONS, agreement=0.0, **changes):
        """Gives the report; artifact and state lie in `generation` and the blobs."""
        sha256 = open_bundle(bundle, self.base.spec).sha256
        self.layout.stage(sha256).mkdir(parents=True, exist_ok=True)
        plan = Plan(
            method="average", options={}, data_free_method="average", data_free_options={}, seed=0, threads=1,
            parity=1e-4, conflict=0.0, on_conflict="fold", format=kind, iterations=iterations, agreement=agreement,
            config_digest="0" * 64, **changes,
        )  # fmt: skip
        parent = self.count or None
        job = Job(1, sha256, str(bundle), bundle.name, plan, self.count + 1, parent, self.state)
        self.staged = fold_job(job, self.layout, self.base, 0, lambda _: None)
        self.count, self.state = self.count + 1, self.staged.state_sha256
        shutil.copyfile(self.layout.stage(sha256) / "state.safetensors", self.layout.blob(self.state))
        shutil.copytree(self.layout.stage(sha256), self.generation)
        return json.loads((self.generation / "report.json").read_text())

    @property
    def generation(self) -> Path:
        return self.layout.generation(self.count)

    @property
    def histograms(self):
        return state_of(self.layout, self.state).histograms


@pytest.fixture
def make_folder(make_box, monkeypatch):
    # Counting what is alive takes most of a second among the objects of a test run, and decides nothing here.
    monkeypatch.setattr("foldd.daemon.pipeline.tensor_bytes", lambda: 0)
    made = []

    def make(base="residual"):
        made.append(base)
        return Folder(make_box(base=base, name=f"box{len(made)}"))

    return make


@pytest.mark.parametrize(("base", "kind"), [("wide", "w8a8"), ("wide", "w8"), ("attention", "w4a8")])
def test_each_format_folds_replays_to_the_bit_and_says_what_it_did(make_folder, base, kind):
    """Two folds, twice: the same checkpoints in the same order give the same artifacts and the same states."""
    digests, folders = [], [make_folder(base), make_folder(base)]
    for folder in folders:
        for seed, task in enumerate(("alpha", "beta")):
            found = folder.fold(folder.box.bundle(task, seed=seed, calibration=32), kind)
            digests.append((sha256_file(folder.generation / "model.onnx"), folder.state))
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]

    made = found["quantize"]
    layers = {layer.weight for layer in open_base(folder.layout.base).folded.layers}
    assert set(made) == KEYS
    assert made["weight_bits"] == int(kind[1])
    assert made["iterations"] == ITERATIONS
    assert made["calibration_inputs"] == 64, "the previous task's and the incoming one's"
    assert (made["layers"], made["left_float"], made["warnings"]) == (len(layers), {}, [])
    if kind.endswith("a8"):
        patches = base == "attention"  # a convolution that has no place: its weights are folded at load
        assert (made["activation_bits"], made["fused"], made["folded"]) == (8, len(layers) - patches, patches)
        assert sum(made["kernels"].values()) >= len(layers) - patches
    else:
        assert (made["activation_bits"], made["fused"], made["folded"]) == (None, 0, len(layers))
    assert set(found["scores"]) == {"signal_to_noise", "agreement", "accuracy/beta", "retained/alpha"}
    assert found["scores"]["signal_to_noise"] > 25
    assert 0.5 < found["scores"]["agreement"] <= 1
    assert found["seconds"]["quantize"] > 0


def test_agreement_is_that_of_the_worst_task_on_its_own_inputs(make_folder):
    """Counted anew here, from the artifact and the float state."""
    folder = make_folder("residual")
    for seed, task in enumerate(("alpha", "beta")):
        bundle = undecided(folder.box, task, seed=seed, calibration=64)
        found = folder.fold(bundle, "w4", iterations=0)
    shares = []
    for task in ("alpha", "beta"):
        x = open_bundle(bundle.with_stem(task), folder.base.spec).inputs
        (logits,) = run(folder.generation / "model.onnx", x, f"logits/{task}")
        shares.append((logits.argmax(1) == decisions(folder.layout, folder.state, task, x)).mean())
    assert found["scores"]["agreement"] == pytest.approx(min(shares))
    assert shares[0] != shares[1], "or the worst could be either"
    assert min(shares) < 1


def run(model, x, *outputs):
    import onnxruntime

    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(list(outputs), {"input": x})


def test_histograms_cover_every_task_and_do_not_grow(make_folder):
    """One share a task; the first task's activations, four times as wide, still count when its inputs are gone."""
    folder, sizes, shares, kept = make_folder("residual"), [], [], []
    scaled = folder.box.folder / "made" / "loud.safetensors"
    for seed, task in enumerate(("alpha", "beta", "gamma")):
        bundle = folder.box.bundle(task, seed=seed, calibration=32)
        if task == "alpha":
            bundle = with_inputs(bundle, scaled, 4)
        folder.fold(bundle)
        kept.append(folder.histograms)
        sizes.append(sum(tensor.numel() for tensor in folder.histograms.values()))
        shares.append({round(float(tensor[2:].double().sum()), 4) for tensor in folder.histograms.values()})
    assert len(set(sizes)) == 1
    assert shares == [{1.0}, {2.0}, {3.0}]
    places = find_places(folder.base.folded)
    assert folder.histograms.keys() == {place.key for place in places}
    own = open_bundle(folder.box.folder / "made" / "gamma.safetensors", folder.base.spec).inputs
    narrow = observe_network(folder.base.folded, dict(folded(folder)), torch.from_numpy(own))
    for key, before in kept[1].items():
        added = folder.histograms[key] - before
        torch.testing.assert_close(added[2:], narrow[key][2:], atol=1e-5, rtol=0, msg="what the last task showed")
    first = places[0].key
    assert float(folder.histograms[first][1]) > 2.5 * float(narrow[first][1])
    loud = open_bundle(scaled, folder.base.spec).inputs
    assert float(folder.histograms[first][1]) == loud.max()
    assert float(folder.histograms[first][0]) == loud.min()


def test_behind_the_fold_the_new_state_lies_in_its_file(make_folder, monkeypatch):
    """Or quantizing, the export and the gate would come on top of all that a fold makes."""
    seen = []

    def quantize(plan, before, state, *rest):
        seen.append((type(state.merged), type(state.statistics), set(state.histograms)))
        return quantize_state(plan, before, state, *rest)

    monkeypatch.setattr("foldd.daemon.pipeline.quantize_state", quantize)
    folder = make_folder("residual")
    folder.fold(folder.box.bundle("alpha"))
    assert seen == [(Lazy, Lazy, set(folder.histograms))]
    assert seen[0][2]


@pytest.mark.parametrize("base", ["residual", "attention"])
def test_weights_folded_one_by_one_are_those_folded_at_once(make_folder, base):
    network = make_folder(base).base
    one_by_one = folded_weights(network, network.weights)
    at_once = fold_norms({name: tensor.numpy() for name, tensor in network.weights.items()}, network.folded.rules)
    assert list(one_by_one) == list(at_once)
    for name, expected in at_once.items():
        np.testing.assert_array_equal(one_by_one[name].numpy(), expected, err_msg=name)


def test_the_previous_task_is_asked_on_its_own_inputs_and_older_ones_on_all_at_hand(make_folder):
    folder = make_folder("residual")
    bundles = [undecided(folder.box, t, seed=n, calibration=32, scale=0.5) for n, t in enumerate("abc")]
    for bundle in bundles:
        scores = folder.fold(bundle, "float")["scores"]
    _, own, new = (open_bundle(bundle, folder.base.spec).inputs for bundle in bundles)

    def share(task, x):
        artifacts = (folder.layout.generation(number) / "model.onnx" for number in (2, 3))
        before, after = (run_artifact(artifact, x, [f"logits/{task}"])[f"logits/{task}"] for artifact in artifacts)
        return (before.argmax(1) == after.argmax(1)).mean()

    assert scores["retained/b"] == share("b", own)
    assert scores["retained/a"] == share("a", np.concatenate([own, new]))
    assert share("b", own) != share("b", np.concatenate([own, new])), "else this tells nothing"


def with_inputs(source: Path, target: Path, factor: float) -> Path:
    def louder(tensors, _):
        tensors["calibration/inputs"] = tensors["calibration/inputs"] * np.float32(factor)

    return rewritten(source, target, louder)


def folded(folder: Folder):
    return folded_weights(folder.base, merged_weights(state_of(folder.layout, folder.state)))


def test_without_calibration_inputs_only_weights_are_quantized_until_there_are_some(make_folder):
    folder = make_folder("residual")
    found = folder.fold(folder.box.bundle("plain", calibration=0))
    assert found["quantize"]["activation_bits"] is None
    assert found["quantize"]["calibration_inputs"] == found["quantize"]["iterations"] == 0
    (warning,) = found["quantize"]["warnings"]
    assert "Only the weights are quantized" in warning
    assert warning in folder.staged.warnings
    assert folder.histograms == {}
    assert set(found["scores"]) == {"signal_to_noise"}

    found = folder.fold(folder.box.bundle("calibrated", seed=1, calibration=16))
    assert (found["quantize"]["activation_bits"], found["quantize"]["warnings"]) == (8, [])
    assert found["quantize"]["fused"] == 3

    known = folder.histograms
    found = folder.fold(folder.box.bundle("again", seed=2, calibration=0))
    assert found["quantize"]["activation_bits"] == 8, "the ranges of older tasks are there"
    assert found["quantize"]["fused"] == 3
    for key, histogram in known.items():
        assert torch.equal(folder.histograms[key], histogram), "nothing new was seen, and nothing is counted twice"


def test_histograms_survive_folds_in_other_formats(make_folder):
    folder = make_folder("residual")
    folder.fold(folder.box.bundle("alpha", calibration=16))
    kept = {name: tensor.tolist() for name, tensor in folder.histograms.items()}
    for seed, kind in ((1, "float"), (2, "w4")):
        found = folder.fold(folder.box.bundle(f"t{seed}", seed=seed, calibration=16), kind)
        assert (found["quantize"] is None) == (kind == "float")
        assert {name: tensor.tolist() for name, tensor in folder.histograms.items()} == kept
    folder.fold(folder.box.bundle("beta", seed=3, calibration=16))
    assert {round(float(t[2:].sum()), 3) for t in folder.histograms.values()} == {2.0}


def test_a_merge_that_is_kept_in_integers_can_be_served_in_integers(make_folder):
    """What is quantized for the artifact is what the next fold will find: the rounded merge."""
    folder = make_folder("residual")
    for seed, task in enumerate(("alpha", "beta")):
        found = folder.fold(folder.box.bundle(task, seed=seed, calibration=32), state="quantized")
    assert found["scores"]["signal_to_noise"] > 25
    kinds = {n: t.dtype for n, t in open_tensors(folder.layout.blob(folder.state)).tensors.items()}
    assert kinds["merged/conv.weight"] == "I8"
    assert folder.histograms
    x = inputs(folder.box, 64)
    (logits,) = run(folder.generation / "model.onnx", x, "logits/beta")
    assert (logits.argmax(1) == decisions(folder.layout, folder.state, "beta", x)).mean() > 0.85


def test_the_published_method_pulls_and_rounds_a_tensor_at_a_time(make_folder):
    folder = make_folder("residual")
    found = folder.fold(folder.box.bundle("alpha", calibration=32), "w8a8", quantizer="hdrq-paper")
    assert found["quantize"]["quantizer"] == "hdrq-paper"
    assert found["quantize"]["fused"] == 3
    assert found["scores"]["signal_to_noise"] > 25


def test_the_gate_counts_a_limit_that_is_just_met(make_folder):
    folder = make_folder("residual")
    bundle = undecided(folder.box, "alpha", calibration=64)
    reached = folder.fold(bundle, "w4", iterations=0)["scores"]["agreement"]
    assert reached < 1
    shutil.rmtree(folder.generation)
    folder.count, folder.state = 0, None
    assert folder.fold(bundle, "w4", iterations=0, agreement=reached)["scores"]["agreement"] == reached
    folder.count, folder.state = 0, None
    with pytest.raises(Refused) as refused:
        folder.fold(bundle, "w4", iterations=0, agreement=reached + 0.01)
    assert refused.value.code == "quantized-worse"


# --- with the real daemon


def test_the_format_may_change_from_fold_to_fold(make_box):
    """float → w8a8 → w4 → float; each smaller than the float one, and each served."""
    box: Box = make_box(base="wide")
    slot, sizes, x = Slot(box.layout.root, threads=1), {}, inputs(box, 64)
    for number, kind in enumerate(["float", "w8a8", "w4", "float"], 1):
        box.configure(fold={"method": "average"}, quantize={"format": kind}, gate={"agreement": 0.5, "conflict": 0})
        box.start()
        task = f"t{number}"
        box.drop(box.bundle(task, seed=number, calibration=32))
        box.wait_generation(number)
        assert box.stop() == 0
        assert (report(box)["quantize"] is None) == (kind == "float")
        assert ("parity" in report(box)["scores"]) == (kind == "float")
        sizes.setdefault(kind, (box.layout.current / "model.onnx").stat().st_size)
        assert slot.refresh()
        logits, served = slot.infer(task, x)
        assert served == number
        expected = decisions(box.layout, box.generations()[-1].state_sha256, task, x)
        assert (logits.argmax(1) == expected).mean() > (0.75 if kind == "w4" else 0.9)
    assert sizes["w4"] < 0.4 * sizes["float"]
    assert sizes["w8a8"] < 0.6 * sizes["float"]
    digests = [row.config_digest for row in box.generations()]
    assert (len(set(digests)), digests[0]) == (3, digests[-1]), "one for each configuration"


def test_killed_while_quantizing_it_reaches_the_same_bytes(make_box):
    """One box whose worker is killed in the middle, one that is left alone; the transformer answers from both."""
    settings = {"fold": {"method": "average"}, "quantize": {"format": "w8a8"}}
    calm, killed = (make_box(base="attention", name=name, **settings) for name in ("calm", "killed"))
    for box, environment in ((calm, {}), (killed, {VARIABLE: "quantize"})):
        for number, task in enumerate(("alpha", "beta")):
            box.drop(box.bundle(task, seed=number, calibration=32))
            os.utime(box.layout.inbox / f"{task}.safetensors", (1_000_000_000 + number,) * 2)
        box.start(**environment)
    for box in (calm, killed):
        box.wait_generation(2)
    assert crash_points_taken(killed) == {"quantize"}
    assert crash_points_taken(calm) == set()
    assert [a.attempts for a in killed.arrivals()] == [2, 1]
    rows = [[(row.artifact_sha256, row.state_sha256) for row in box.generations()] for box in (calm, killed)]
    assert rows[0] == rows[1]
    slot, x = Slot(killed.layout.root, threads=1), inputs(killed, 64)
    assert slot.refresh()
    for task in ("alpha", "beta"):
        logits, served = slot.infer(task, x)
        assert served == 2
        assert (logits.argmax(1) == decisions(calm.layout, rows[0][1][1], task, x)).mean() > 0.9
    assert report(killed)["quantize"]["fused"] == 4  # all but the patches
    assert killed.history()[-1]["seconds"]["quantize"] > 0
    assert calm.stop() == killed.stop() == 0


def test_the_gate_refuses_what_decides_otherwise_and_the_last_generation_serves(make_box):
    """Four bits, rounded to the nearest, and not one decision may change."""
    settings = {"fold": {"method": "average"}, "quantize": {"format": "w4", "effort": 1.0}}
    box: Box = make_box(gate={"agreement": 1.0}, **settings)
    (box.layout.base / PACE).write_text('{"seconds_per_iteration": 1000.0}')
    box.start()
    box.drop(box.bundle("first", seed=1, calibration=0))  # nothing to compare decisions on
    box.wait_generation(1)
    second = undecided(box, "second", seed=2, calibration=64)
    box.drop(second)
    box.wait(box.reasons, "the refusal")
    assert box.reasons() == {"second.safetensors": "quantized-worse"}
    assert box.status()["generation"] == 1
    assert os.readlink(box.layout.current) == "generations/000001"
    slot = Slot(box.layout.root, threads=1)
    assert slot.refresh()
    assert slot.infer("first", inputs(box, 3))[1] == 1
    assert box.stop() == 0
    box.configure(gate={"agreement": 0.5}, **settings)
    box.start()
    box.drop(second)  # as the remedy says
    box.wait_generation(2)
    assert report(box)["quantize"]["iterations"] == 0, "the pace of this box leaves no time"
    assert slot.refresh()
    assert slot.infer("second", inputs(box, 3))[1] == 2
