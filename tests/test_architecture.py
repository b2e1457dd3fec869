"""The rooms: who imports whom, and what is in the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("base", "core", "daemon", "export", "fusion", "quantize", "runtime")


def test_import_rules():
    """The contracts of pyproject.toml, by import-linter."""
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_the_supervisor_and_the_command_line_loads_no_torch():
    program = (
        "import sys, foldd.daemon.supervisor, foldd.daemon.cli, foldd.daemon.demo.journey; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'ot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_rooms_are_links_into_the_root():
    for room in ROOMS:
        assert (ROOT / "src" / "foldd" / room).is_symlink()
        assert (ROOT / "src" / "foldd" / room).resolve() == ROOT / room


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of the tree, and the wheel that is built from it, as pip would."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_wheel_built_from_the_sdist_holds_every_module(built):
    sdist, wheel = built
    modules = {f"foldd/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    modules |= {"foldd/__init__.py", "foldd/py.typed"}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == modules
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"config.toml", "README.md", "LICENSE", "systemd/foldd.service", "docs/formats.md"} <= names


def test_the_light_half_needs_no_torch(built):
    metadata = zipfile.ZipFile(built[1]).read(
        next(n for n in zipfile.ZipFile(built[1]).namelist() if n.endswith("METADATA"))
    )
    required = Parser().parsestr(metadata.decode()).get_all("Requires-Dist")
    light = {line.split(">")[0] for line in required if "extra ==" not in line}
    assert light == {"msgspec", "numpy", "onnxruntime", "PyNaCl", "pyzmq", "safetensors"}
    assert any(line.startswith("torch") and "daemon" in line for line in required)


def test_modules_stay_small():
    sizes = {p: len(p.read_text().splitlines()) for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert {str(p): n for p, n in sizes.items() if n > 350} == {}
    assert sorted(sizes.values())[len(sizes) // 2] < 200


def test_nothing_is_imported_as_a_bare_room():
    for top in (*ROOMS, "tests", "benchmarks", "systemd"):
        for path in (ROOT / top).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]) and len(words) > 1:
                    assert words[1].split(".")[0] not in ROOMS, f"{path}: {line}"
