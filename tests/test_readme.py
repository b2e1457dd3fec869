"""The README's tour, run as it stands: every command of "Five minutes", in one shell, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tour() -> str:
    section = (ROOT / "README.md").read_text().split("## Five minutes")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))


@pytest.mark.timeout(900)
def test_the_tour(tmp_path):
    script = "set -euo pipefail\nset -m\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + tour()
    environment = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "generation 7" in done.stdout
    assert '"not-safetensors"' in done.stdout
    results = json.loads((tmp_path / "tour" / "results.json").read_text())
    assert len(results["folded"]) == len(results["folds"]) == 6


def test_the_documents_name_only_files_that_exist():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} → {target}"


def test_the_documents_name_only_commands_that_exist():
    """`foldd VERB` in any document is a command of the parser; planned ones are not documented."""
    from foldd.daemon.cli import parser

    commands = next(a for a in parser()._actions if a.choices and "run" in a.choices).choices
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "config.toml"]:
        for verb in re.findall(r"(?:`|^|&& )foldd ([a-z]+)\b", document.read_text(), re.MULTILINE):
            assert verb in commands, f"{document.name}: foldd {verb}"
    for room in ("core", "base", "fusion", "export", "daemon", "runtime"):
        for module in (ROOT / room).rglob("*.py"):
            for verb in re.findall(r"`foldd ([a-z]+)\b", module.read_text()):
                assert verb in commands, f"{module}: foldd {verb}"


def test_every_command_explains_itself():
    from foldd.daemon.cli import parser

    commands = next(a for a in parser()._actions if a.choices and "run" in a.choices)
    assert {action.dest for action in commands._choices_actions} == set(commands.choices)
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help or action.dest in ("file",), f"foldd {name}: {action.dest}"
