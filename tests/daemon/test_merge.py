"""`foldd merge` on real files: what it reads, what it writes, what it refuses and how."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foldd.core.bundle import Head, open_bundle, write_bundle
from foldd.core.digests import base_digest
from foldd.core.rounding import to_integers
from foldd.daemon.cli import main
from foldd.daemon.merge import output, run
from foldd.daemon.merge.methods import OFFLINE
from foldd.daemon.merge.preflight import guess_role

SHAPES = {"net.weight": (8, 6), "net.bias": (8,), "conv.weight": (4, 2, 3, 3), "embed.weight": (10, 6)}


def tensors(seed: int, kind=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g).to(kind) for n, s in SHAPES.items()} | {"step": torch.tensor([seed])}


@pytest.fixture
def files(tmp_path):
    """Three files: zero.safetensors, the base, and one.safetensors and two.safetensors."""
    return [save(tmp_path / f"{name}.safetensors", tensors(i)) for i, name in enumerate(("zero", "one", "two"))]


def save(path: Path, content) -> Path:
    save_file(content, path, metadata={"format": "pt"})
    return path


def merge(*arguments) -> int:
    return main(["merge", *map(str, arguments)])


def record(path: Path):
    from foldd.core.tensorfile import open_tensors

    return json.loads(open_tensors(path).metadata["foldd.merge"])


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def test_average_of_plain_files(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert merge(*files, "--method", "average", "-o", out) == 0
    merged, models = load_file(out), [load_file(path) for path in files]
    for name in SHAPES:
        torch.testing.assert_close(merged[name], sum(m[name] for m in models) / 3)
    assert merged["step"].tolist() == [0]  # an integer: the first model's
    text = capsys.readouterr()
    assert "integers: step" in text.err
    assert "base: none" in text.err
    assert "peak memory" in text.out


def test_the_first_path_is_the_base_of_methods_that_need_one(files, tmp_path):
    out = tmp_path / "out.safetensors"
    assert merge(*files, "--method", "task-arithmetic", "--option", "scaling=0.5", "-o", out) == 0
    merged, (base, one, two) = load_file(out), [load_file(path) for path in files]
    for name in SHAPES:
        torch.testing.assert_close(merged[name], 0.5 * (one[name] + two[name]))
    assert base["step"].tolist() == merged["step"].tolist()
    assert record(out)["options"] == {"scaling": 0.5}


@pytest.mark.parametrize("method", [name for name, kind in OFFLINE.items() if not kind.needs_calibration])
def test_every_data_free_method_runs_twice_to_the_same_bytes(method, files, tmp_path):
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert [merge(*files, "--method", method, "-o", out) for out in outs] == [0, 0]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    merged = load_file(outs[0])
    assert {n: tuple(t.shape) for n, t in merged.items()} == {**SHAPES, "step": (1,)}
    assert all(bool(t.isfinite().all()) for t in merged.values())


def test_provenance_names_inputs_by_digest(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert merge(*files, "--method", "dare", "--option", "seed=7", "-o", out, "--json") == 0
    facts, kept = json.loads(capsys.readouterr().out), record(out)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert kept["base"] == {"zero.safetensors": digests[0]}
    assert kept["models"] == [{"one.safetensors": digests[1]}, {"two.safetensors": digests[2]}]
    assert (kept["method"], kept["options"]["seed"]) == ("dare", 7)
    assert set(kept["versions"]) == {"foldd", "torch", "numpy"}
    assert list(facts["sha256"].values()) == digests
    assert (facts["method"], facts["tensors"], facts["shards"]) == ("dare", 5, 1)
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in load_file(out).values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(kind, tmp_path):
    models = [{"w": torch.tensor([1.0, 1.0009765625, 0.3]).to(kind)}, {"w": torch.tensor([1.0, 1.0, 0.1]).to(kind)}]
    models += [{"w": torch.tensor([0.0, 1.0, 0.2]).to(kind)}]
    paths = [save(tmp_path / f"{i}.safetensors", m) for i, m in enumerate(models)]
    out = tmp_path / "out.safetensors"
    assert merge(*paths, "--method", "average", "-o", out) == 0
    expected = torch.stack([m["w"].float() for m in models]).mean(0)
    assert torch.equal(load_file(out)["w"], expected.to(kind))
    assert merge(*paths, "--method", "average", "-o", out, "--dtype", "float32") == 0
    torch.testing.assert_close(load_file(out)["w"], expected)


def test_mixed_types_are_named_and_the_first_models_is_kept(tmp_path, capsys):
    paths = [save(tmp_path / "a.safetensors", tensors(1, torch.bfloat16)), save(tmp_path / "b.safetensors", tensors(2))]
    out = tmp_path / "out.safetensors"
    assert merge(*paths, "--method", "average", "-o", out) == 0
    assert load_file(out)["net.weight"].dtype == torch.bfloat16
    assert "the inputs store BF16, F32" in capsys.readouterr().err


def shard(folder: Path, content, parts: int) -> Path:
    folder.mkdir()
    names, places = sorted(content), {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        save(folder / file, {n: content[n] for n in names[i::parts]})
        places |= dict.fromkeys(names[i::parts], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_sharded_inputs_by_index_and_by_folder(files, tmp_path):
    index = shard(tmp_path / "sharded", tensors(1), 3)
    expected = tmp_path / "expected.safetensors"
    assert merge(files[0], files[1], files[2], "--method", "ties", "-o", expected) == 0
    for path in (index, index.parent):
        out = tmp_path / "out.safetensors"
        assert merge(files[0], path, files[2], "--method", "ties", "-o", out, "--shard-bytes", 0) == 0
        one, other = load_file(out), load_file(expected)
        assert all(torch.equal(one[n], other[n]) for n in other)


def test_sharded_output_is_a_model_again(files, tmp_path):
    whole, folder, again = tmp_path / "whole.safetensors", tmp_path / "folder", tmp_path / "again.safetensors"
    assert merge(*files, "--method", "average", "-o", whole) == 0
    assert merge(*files, "--method", "average", "-o", folder, "--shard-bytes", 300) == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) == int(shards[0][-17:-12]) > 1
    assert merge(folder, "--method", "average", "-o", again, "--shard-bytes", 0) == 0
    one, other = load_file(again), load_file(whole)
    assert all(torch.equal(one[n], other[n]) for n in other)
    assert record(folder / shards[0])["method"] == "average"
    assert left_behind(tmp_path) == []
    assert merge(*files, "--method", "average", "-o", folder, "--shard-bytes", 300) == 2  # it is there already


def test_sharded_inputs_give_sharded_output(files, tmp_path, monkeypatch):
    index, out = shard(tmp_path / "sharded", tensors(1), 2), tmp_path / "out"
    monkeypatch.setattr(run, "SHARD_BYTES", 500)
    assert merge(index, files[2], "--method", "average", "-o", tmp_path / "one.safetensors") == 2
    assert merge(index, files[2], "--method", "average", "-o", out) == 0
    assert len(list(out.glob("*.safetensors"))) > 1


def test_tied_copies_are_merged_once(tmp_path, capsys):
    """With random dropping they would come apart otherwise."""
    paths = []
    for i in range(3):
        content = tensors(i)
        paths.append(save(tmp_path / f"{i}.safetensors", content | {"out.weight": content["embed.weight"].clone()}))
    out = tmp_path / "out.safetensors"
    assert merge(*paths, "--method", "dare", "-o", out) == 0
    merged = load_file(out)
    assert torch.equal(merged["embed.weight"], merged["out.weight"])
    assert "embed.weight = out.weight" in capsys.readouterr().err


@pytest.fixture
def box(make_box):
    return make_box(base="with_head")


def bundle(path: Path, spec, seed: int, *, is_delta: bool, inputs: int = 8) -> dict[str, np.ndarray]:
    """Writes a bundle near the base and gives its full weights."""
    g = torch.Generator().manual_seed(seed)
    state = networks.with_head().state_dict()
    weights = {n: state[n].numpy().astype(np.float32) for n, s in spec.canonical.items() if s.role != "counter"}
    changes = {n: 0.05 * torch.randn(w.shape, generator=g).abs().numpy() for n, w in weights.items()}
    full = {n: w + changes[n] for n, w in weights.items()}
    head = Head(torch.randn(3, spec.features, generator=g).numpy(), np.zeros(3, np.float32))
    x = torch.randn(inputs, *spec.input_shape, generator=g).numpy() if inputs else None
    write_bundle(path, changes if is_delta else full, head, task=path.stem, base=spec, is_delta=is_delta, inputs=x)
    return full


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "fisher", "regmean", "lore", "score"])
def test_bundles_beside_a_foldd_base(method, box, tmp_path, capsys):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    full = [bundle(path, box.spec, i, is_delta=bool(i)) for i, path in enumerate(paths)]
    out = tmp_path / "out.safetensors"
    assert merge(box.layout.root, *paths, "--method", method, "-o", out) == 0
    merged = load_file(out)
    assert merged.keys() == full[0].keys()
    assert "head/weight" in capsys.readouterr().err
    if method == "average":
        for name, tensor in merged.items():
            if not name.endswith("running_var"):
                np.testing.assert_allclose(tensor.numpy(), (full[0][name] + full[1][name]) / 2, atol=1e-6)


def coded(source: Path, path: Path, spec, *, as_floats: bool) -> Path:
    """A bundle's weights as codes with steps, or as the floats that those stand for."""
    read = open_bundle(source, spec)
    parameters = {}
    for name, stored in read.parameters.items():
        values = stored.float32()
        codes = to_integers(values, 8) if values.ndim > 1 else None
        parameters[name] = values if codes is None else codes.values() if as_floats else codes
    write_bundle(path, parameters, read.head, task=path.stem, base=spec, is_delta=read.is_delta, inputs=read.inputs)
    return path


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "regmean", "fisher"])
@pytest.mark.parametrize("is_delta", [True, False])
def test_bundles_of_integers_merge_as_their_floats_do(method, is_delta, box, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("foldd.fusion.offline.contract.PIECE", 50)  # pieces that cut through channels
    out, merged = tmp_path / "out.safetensors", []
    for as_floats in (True, False):
        paths = []
        for name in ("a", "b"):
            bundle(tmp_path / "source.safetensors", box.spec, ord(name), is_delta=is_delta)
            paths.append(coded(
                tmp_path / "source.safetensors", tmp_path / f"{name}.safetensors", box.spec, as_floats=as_floats
            ))  # fmt: skip
        assert merge(box.layout.root, *paths, "--method", method, "-o", out) == 0
        merged.append({name: tensor.clone() for name, tensor in load_file(out).items()})
    assert "the inputs store F32, I8" in capsys.readouterr().err
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, merged[1][name]), name


def test_equal_codes_with_other_steps_are_no_tied_copies(box, tmp_path):
    """Beside a plain base nothing tells what is tied but the bytes, and two layers may have the same codes."""
    base = dict.fromkeys(("one", "two"), torch.randn(4, 6))
    base["two"] = base["one"].clone()
    plain = save(tmp_path / "base.safetensors", base)
    codes = torch.randint(-9, 9, (4, 6), dtype=torch.int8)
    digest = base_digest([(name, tensor.numpy()) for name, tensor in base.items()])
    for scale in (1.0, 2.0):
        steps = {"step/one": torch.full((4,), 0.5), "step/two": torch.full((4,), 0.5 * scale)}
        path = tmp_path / "a.safetensors"
        tensors = {"delta/one": codes, "delta/two": codes.clone()} | steps
        save_file(tensors, path, {"foldd.format": "1", "foldd.base": digest})
        out = tmp_path / "out.safetensors"
        assert merge(plain, path, "--method", "average", "-o", out) == 0
        got = load_file(out)
        torch.testing.assert_close(got["one"], base["one"] + 0.5 * codes)
        torch.testing.assert_close(got["two"], base["two"] + 0.5 * scale * codes)


def test_steps_without_codes_are_named(box, tmp_path, capsys):
    bundle(tmp_path / "a.safetensors", box.spec, 1, is_delta=True)
    tensors = load_file(tmp_path / "a.safetensors")
    name = next(n for n in tensors if n.startswith("delta/"))
    tensors[name.replace("delta", "step")] = torch.ones(1)
    path = tmp_path / "b.safetensors"
    save_file(tensors, path, {"foldd.format": "1", "foldd.base": box.spec.digest})
    assert merge(box.layout.root, path, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert f"b.safetensors has step/{name[6:]}" in capsys.readouterr().err


def test_a_foldd_base_knows_heads_ties_and_counters(box, tmp_path, capsys):
    model = networks.with_head()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    path, out = save(tmp_path / "plain.safetensors", state), tmp_path / "out.safetensors"
    assert merge(box.layout.root, path, "--method", "average", "-o", out) == 0
    assert load_file(out).keys() == {n for n, s in box.spec.canonical.items() if s.role != "counter"}
    assert "fc.bias, fc.weight" in capsys.readouterr().err
    state["again.weight"] += 1
    save(path, state)
    assert merge(box.layout.root, path, "--method", "average", "-o", out) == 2
    assert "one tensor in the base" in capsys.readouterr().err


def test_a_bundle_beside_a_plain_base(box, tmp_path, capsys):
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    full = bundle(path, box.spec, 1, is_delta=True, inputs=0)
    base = save(tmp_path / "base.safetensors", {n: t.clone() for n, t in networks.with_head().state_dict().items()})
    assert merge(base, path, "--method", "average", "-o", out) == 0
    for name, tensor in load_file(out).items():
        if name in full:
            np.testing.assert_allclose(tensor.numpy(), full[name], atol=1e-6)
    assert "only the base has them" in capsys.readouterr().err
    other = save(tmp_path / "other.safetensors", {n: t + 1 for n, t in networks.with_head().state_dict().items()})
    assert merge(other, path, "--method", "average", "-o", out) == 2
    assert "another digest" in capsys.readouterr().err
    assert merge(path, "--method", "average", "-o", out) == 2
    assert "no base is given" in capsys.readouterr().err


def test_every_difference_is_named_at_once(files, tmp_path, capsys):
    content = tensors(3)
    del content["net.bias"]
    content |= {"conv.weight": torch.zeros(4, 2, 1, 1), "new": torch.zeros(2), "net.weight": torch.zeros(8, 6).int()}
    odd = save(tmp_path / "odd.safetensors", content)
    assert merge(*files, odd, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    text = capsys.readouterr().err
    for words in ("lacks net.bias", "alone has new", "conv.weight is [4, 2, 1, 1]", "net.weight is I32", "What to do"):
        assert words in text
    assert not (tmp_path / "out.safetensors").exists()


def test_one_shard_of_a_model_is_known_as_such(files, tmp_path, capsys):
    content = tensors(3)
    del content["net.bias"]
    shard = save(tmp_path / "big-00001-of-00002.safetensors", content)
    assert merge(*files, shard, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert "name big.safetensors.index.json, its index" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one", "--method", "ties"], "--method average or lore"),
        (["zero", "one", "--method", "fisher"], "--calibration"),
        (["zero", "one", "--method", "otmf"], "--method regmean"),
        (["zero", "one", "--method", "tie"], "Did you mean ties?"),
        (["zero", "one", "--method", "ties", "--option", "densty=1"], "density, scaling"),
        (["zero", "one", "--method", "ties", "--option", "density"], "--option density gives no value"),
        (["zero", "one", "--method", "ties", "--option", "density=much"], "density"),
        (["zero", "one", "--method", "ties", "--option", "density=7"], "[0, 1]"),
        (["zero", "none", "--method", "average"], "There is no"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(arguments, words, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "merge", None)  # nothing is merged
    paths = {path.stem: path for path in files} | {"none": tmp_path / "none.safetensors"}
    given = [paths.get(argument, argument) for argument in arguments]
    assert merge(*given, "-o", tmp_path / "out.safetensors") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_bundle_is_no_base(box, tmp_path, capsys):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, path in enumerate(paths):
        bundle(path, box.spec, i, is_delta=False)
    assert merge(*paths, "--method", "ties", "-o", tmp_path / "out.safetensors") == 2
    assert "no base" in capsys.readouterr().err


def test_damaged_and_foreign_files(files, tmp_path, capsys):
    whole = files[1].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-10])
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"w": 1}))
    for name, words in (("short.safetensors", "its header promises"), ("evil.bin", "never unpickles")):
        assert merge(files[0], tmp_path / name, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: {"weight_map": {**index["weight_map"], "step": "../one.safetensors"}}, "own folder"),
        (lambda index: {"weight_map": {**index["weight_map"], "step": "gone.safetensors"}}, "not there"),
        (lambda index: {"weight_map": {**index["weight_map"], "lost": index["weight_map"]["step"]}}, "'lost'"),
        (lambda index: {"weight_map": []}, "weight_map"),
        (lambda index: [], "weight_map"),
    ],
)
def test_broken_indices(change, words, files, tmp_path, capsys):
    path = shard(tmp_path / "sharded", tensors(1), 2)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert merge(path, files[2], "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert words in capsys.readouterr().err


def test_a_tensor_in_two_shards(files, tmp_path, capsys):
    path = shard(tmp_path / "sharded", tensors(1), 2)
    other = path.parent / "model-00002-of-00002.safetensors"
    save(other, load_file(other) | {"conv.weight": torch.zeros(4, 2, 3, 3)})
    assert merge(path, files[2], "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert "and again in" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full"), signal.SIGTERM], ids=repr)
@pytest.mark.parametrize("shards", [[], ["--shard-bytes", "300"]])
def test_an_interrupted_merge_leaves_what_was_there(error, shards, files, tmp_path, monkeypatch):
    out = tmp_path / ("folder" if shards else "out.safetensors")
    if not shards:
        out.write_bytes(b"what was there")
    plain, calls = output.Output.write, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            if isinstance(error, signal.Signals):
                os.kill(os.getpid(), error)
                time.sleep(1)
            raise error
        plain(self, *arguments)

    monkeypatch.setattr(output.Output, "write", interrupted)
    assert merge(*files, "--method", "average", "-o", out, *shards) in (2, 130)
    assert len(calls) == 3
    assert left_behind(tmp_path) == []
    assert not out.exists() if shards else out.read_bytes() == b"what was there"


def test_an_input_that_changes_meanwhile(files, tmp_path, monkeypatch, capsys):
    plain = run.merge

    def touching(*arguments):
        files[0].touch()
        return plain(*arguments)

    monkeypatch.setattr(run, "merge", touching)
    assert merge(*files, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert "changed while it was merged" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_values_that_do_not_fit(tmp_path, capsys):
    large = save(tmp_path / "large.safetensors", {"w": torch.full((4, 4), 7e4)})
    bad = save(tmp_path / "bad.safetensors", {"w": torch.full((4, 4), float("nan"))})
    out = tmp_path / "out.safetensors"
    assert merge(large, "--method", "average", "-o", out, "--dtype", "float16") == 2
    assert "bfloat16" in capsys.readouterr().err
    assert merge(large, bad, "--method", "average", "-o", out) == 2
    assert "not finite" in capsys.readouterr().err
    assert not out.exists()


def test_outputs_that_are_no_place(files, tmp_path, capsys):
    for out, words in (
        (files[1], "one of the inputs"),
        (tmp_path, "exists already"),
        (tmp_path / "x" / "y", "no folder"),
    ):
        assert merge(*files, "--method", "average", "-o", out) == 2
        assert words in capsys.readouterr().err


def test_too_little_memory_or_disk(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "available_bytes", lambda: 1000)
    assert merge(*files, "--method", "score", "-o", tmp_path / "out.safetensors") == 2
    assert "elementwise method" in capsys.readouterr().err
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    assert merge(*files, "--method", "average", "-o", tmp_path / "out.safetensors") == 2
    assert "Free some space" in capsys.readouterr().err


def test_empty_and_scalar_tensors(tmp_path):
    contents = [{"empty": torch.zeros(0, 4), "scalar": torch.tensor(float(i)), "w": torch.ones(3, 3)} for i in (1, 3)]
    paths = [save(tmp_path / f"{i}.safetensors", content) for i, content in enumerate(contents)]
    out = tmp_path / "out.safetensors"
    for method in ("average", "ties", "score"):
        assert merge(*paths, "--method", method, "-o", out) == 0
    assert merge(*paths, "--method", "average", "-o", out) == 0
    merged = load_file(out)
    assert (float(merged["scalar"]), tuple(merged["empty"].shape)) == (2.0, (0, 4))


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("layer.weight", (4, 5), "matrix"), ("conv.weight", (4, 5, 3, 3), "convolution"), ("a.bias", (4,), "bias"),
        ("norm.weight", (4,), "norm"), ("bn.running_var", (4,), "statistic"),
        ("token_embed.weight", (9, 4), "embedding"),
        ("cls_token", (1, 1, 8), "embedding"), ("patch_embed.proj.weight", (8, 3, 4, 4), "convolution"),
    ],
)  # fmt: skip
def test_roles_without_a_graph(name, shape, role):
    assert guess_role(name, shape) == role
