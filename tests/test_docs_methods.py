"""docs/methods: a page for each method, its options, and commands that run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foldd.core.bundle import Head, write_bundle
from foldd.daemon.cli import main
from foldd.daemon.merge.methods import CONTINUAL_ONLY, OFFLINE
from foldd.daemon.methods import METHODS

PAGES = Path(__file__).parents[1] / "docs" / "methods"
NAMES = sorted(METHODS.keys() | OFFLINE.keys())


@pytest.mark.parametrize("name", NAMES)
def test_a_page_for_each_method_with_all_its_options(name):
    page = (PAGES / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert f"({name}.md)" in (PAGES / "README.md").read_text()
    for kind in (METHODS.get(name), OFFLINE.get(name)):
        for field in dataclasses.fields(kind) if kind else ():
            assert f"`{field.name}`" in page, field.name
    assert "arxiv.org/abs/" in page
    assert "**Continual**" in page or name in CONTINUAL_ONLY
    assert "**Limits**" in page


def test_what_only_folds_is_no_offline_method():
    assert CONTINUAL_ONLY.keys() == METHODS.keys() - OFFLINE.keys()
    assert set(CONTINUAL_ONLY.values()) <= OFFLINE.keys()


@pytest.fixture
def inputs(make_box, tmp_path, monkeypatch):
    """All files that the pages speak of, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        g = torch.Generator().manual_seed(seed)
        content = {"w": torch.randn(12, 10, generator=g), "v": torch.randn(40, 8, generator=g)}
        save_file(content, f"{name}.safetensors")
    Path("sharded").mkdir()
    for number, name in enumerate(("w", "v"), 1):
        save_file({name: content[name]}, f"sharded/model-{number}.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    box = make_box(base="with_head", name="box")
    Path("state").symlink_to(box.layout.root)
    state = networks.with_head().state_dict()
    for seed, task in enumerate(("cats", "dogs")):
        g = torch.Generator().manual_seed(seed)
        weights = {n: state[n] for n, spec in box.spec.canonical.items() if spec.role != "counter"}
        moved = {n: (w + 0.01 * torch.rand(w.shape, generator=g)).numpy() for n, w in weights.items()}
        head = Head(np.ones((3, box.spec.features), np.float32), np.zeros(3, np.float32))
        x = torch.randn(6, *box.spec.input_shape, generator=g).numpy()
        write_bundle(Path(f"{task}.safetensors"), moved, head, task=task, base=box.spec, inputs=x)


def test_the_pages_commands_run(inputs):
    seen = set()
    for page in sorted(PAGES.glob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "foldd"
                assert main(arguments) == 0, line
                seen.add(arguments[arguments.index("--method") + 1])
    assert seen == OFFLINE.keys()
