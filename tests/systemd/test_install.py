"""`make install` into a staging folder: everything but the virtual environment, which `make boot-test` makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "systemd" / "install.mk"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def make(target: str, folder: Path, *more: str) -> str:
    command = ["make", "--no-print-directory", "-f", str(MAKEFILE), target, f"DESTDIR={folder}", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def test_the_daemons_files(tmp_path: Path) -> None:
    make("install-daemon-files", tmp_path)
    manual = {path for path in files(tmp_path) if path.startswith("opt/foldd/share/doc/foldd/")}
    assert {path.rpartition("/")[2] for path in manual} >= {"config.toml", "operations.md"}
    assert files(tmp_path) - manual == {
        "etc/foldd/config.toml",
        "etc/systemd/system/foldd.service",
        "usr/lib/sysusers.d/foldd.conf",
        "usr/lib/tmpfiles.d/foldd.conf",
        "usr/local/bin/foldd",
    }
    assert (tmp_path / "usr/local/bin/foldd").readlink() == Path("/opt/foldd/bin/foldd")


def test_a_device_gets_the_runtime_only(tmp_path: Path) -> None:
    make("install-runtime-files", tmp_path)
    assert "etc/systemd/system/foldd-runtime.service" in files(tmp_path)
    assert "etc/systemd/system/foldd.service" not in files(tmp_path)
    assert "usr/lib/tmpfiles.d/foldd.conf" not in files(tmp_path)


def test_the_units_follow_the_prefix(tmp_path: Path) -> None:
    make("install-daemon-files", tmp_path, "PREFIX=/srv/programs/foldd")
    text = (tmp_path / "etc/systemd/system/foldd.service").read_text()
    assert "ExecStart=/srv/programs/foldd/bin/foldd run" in text
    assert "/opt/foldd" not in text


def test_a_configuration_that_exists_is_kept(tmp_path: Path) -> None:
    for name in ("config.toml", "runtime.env"):
        (tmp_path / "etc/foldd").mkdir(parents=True, exist_ok=True)
        (tmp_path / "etc/foldd" / name).write_text("# mine\n")
    make("install-daemon-files", tmp_path)
    make("install-runtime-files", tmp_path)
    for name in ("config.toml", "runtime.env"):
        assert (tmp_path / "etc/foldd" / name).read_text() == "# mine\n"


def test_uninstall_leaves_configuration_and_data(tmp_path: Path) -> None:
    make("install-daemon-files", tmp_path)
    make("install-runtime-files", tmp_path)
    (tmp_path / "opt/foldd/bin").mkdir()
    (tmp_path / "opt/foldd/bin/foldd").touch()
    (tmp_path / "opt/foldd/pyvenv.cfg").touch()
    (tmp_path / "var/lib/foldd").mkdir(parents=True)
    (tmp_path / "var/lib/foldd/ledger.sqlite3").touch()
    make("uninstall", tmp_path)
    assert files(tmp_path) == {"etc/foldd/config.toml", "etc/foldd/runtime.env", "var/lib/foldd/ledger.sqlite3"}


def test_uninstall_does_not_remove_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "opt/foldd/bin").mkdir(parents=True)
    (tmp_path / "opt/foldd/bin/other").touch()
    make("uninstall", tmp_path)
    assert files(tmp_path) == {"opt/foldd/bin/other"}
