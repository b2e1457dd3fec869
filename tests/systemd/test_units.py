"""The unit files: known options, hardened as promised, and commands that the programs understand.

What they do on a running system is shown by `make boot-test`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

from foldd.daemon.cli import parser as daemon_parser
from foldd.daemon.config import load_config
from foldd.daemon.layout import Layout

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = ("foldd.service", "foldd-runtime.service")
OPTIONS = "--from tcp://box:5757 --announcements tcp://box:5758 --identity device.key --trust daemon.pub"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")


def lines(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (SYSTEMD / unit).read_text(), re.MULTILINE)


def only(unit: str, key: str) -> str:
    (value,) = lines(unit, key)
    return value


def command(unit: str) -> list[str]:
    """ExecStart with the variables of the unit's own Environment= put in."""
    known = dict(pair.split("=", 1) for text in lines(unit, "Environment") for pair in shlex.split(text))
    known["FOLDD_RUNTIME_OPTIONS"] = OPTIONS
    text = re.sub(r"\$\{?(\w+)\}?", lambda match: known[match[1]], only(unit, "ExecStart"))
    return shlex.split(text)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with programs that exist: `verify` asks for that."""
    for unit in UNITS:
        text = (SYSTEMD / unit).read_text()
        (tmp_path / unit).write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    return tmp_path


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_verify_knows_every_option(unit: str, installed: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(installed / unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_verify_would_notice_a_misspelt_option(installed: Path) -> None:
    unit = installed / UNITS[0]
    unit.write_text(unit.read_text().replace("ProtectClock=", "ProtectClok="))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ProtectClok" in done.stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_exposure_is_at_most_two(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(SYSTEMD / unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.splitlines()[-1:] or done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_newer_than_systemd_252(unit: str) -> None:
    newer = {"RestartSteps", "RestartMaxDelaySec", "MemoryZSwapMax", "ProtectControlGroupsEx", "PrivatePIDs"}
    assert not newer & set(re.findall(r"^(\w+)=", (SYSTEMD / unit).read_text(), re.MULTILINE))
    assert only(unit, "Type") == "notify"  # notify-reload came with 253; 252 ignores the line


def test_the_daemon_understands_its_command() -> None:
    program, *arguments = command("foldd.service")
    assert program == "/opt/foldd/bin/foldd"
    parsed = daemon_parser().parse_args(arguments)
    assert parsed.config == Path("/etc/foldd/config.toml")


def test_the_runtime_understands_its_command(tmp_path: Path) -> None:
    """Up to the keys, which are not there: a misspelt option would end it before that, with a usage message."""
    program, *arguments = command("foldd-runtime.service")
    assert program == "/opt/foldd/bin/foldd-runtime"
    done = subprocess.run(
        [sys.executable, "-c", "import foldd.runtime.cli as cli; raise SystemExit(cli.main())", *arguments],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert "usage:" not in done.stderr
    assert "daemon.pub cannot be read" in done.stderr


def test_memory_may_be_written_and_executed_by_torch_only() -> None:
    assert lines("foldd.service", "MemoryDenyWriteExecute") == []
    assert only("foldd-runtime.service", "MemoryDenyWriteExecute") == "yes"


@pytest.mark.parametrize("unit", UNITS)
def test_it_always_comes_back(unit: str) -> None:
    assert only(unit, "Restart") == "on-failure"
    assert only(unit, "StartLimitIntervalSec") == "0"
    assert only(unit, "WatchdogSec").removesuffix("s").isdecimal()


def test_a_workers_death_is_the_supervisors_business() -> None:
    assert only("foldd.service", "KillMode") == "mixed"
    assert only("foldd.service", "OOMPolicy") == "continue"


def test_paths_agree() -> None:
    """Configuration, unit and tmpfiles speak of one state directory, one inbox and one user."""
    directory = load_config(SYSTEMD / "config.toml").root
    unit = (SYSTEMD / "foldd.service").read_text()
    assert directory == Path("/var/lib") / only("foldd.service", "StateDirectory")
    assert f"AssertPathExists={directory}/base/base.json" in unit
    rows = [line.split() for line in (SYSTEMD / "foldd.tmpfiles").read_text().splitlines() if line[:1] not in ("#", "")]
    made = {row[1]: (row[2], row[3], row[4]) for row in rows if row[0] == "d"}
    user = only("foldd.service", "User")
    assert made[str(directory)] == (only("foldd.service", "StateDirectoryMode"), user, user)
    assert made.pop(f"{directory}/inbox") == ("2770", user, "foldd-drop")
    layout = Layout(directory)
    closed = (layout.base, layout.blobs, layout.generations, layout.keys, layout.quarantine, layout.work)
    assert {str(path): made.get(str(path)) for path in closed} == {str(path): ("0750", user, user) for path in closed}


def test_users_are_made() -> None:
    for unit in UNITS:
        rows = (SYSTEMD / unit.replace(".service", ".sysusers")).read_text()
        assert re.search(rf"^u {only(unit, 'User')} ", rows, re.MULTILINE)
        assert only(unit, "Group") == only(unit, "User")


def test_the_commented_configuration_is_right_too(tmp_path: Path) -> None:
    """Every line that is commented out is one that the daemon accepts."""
    text = re.sub(r"^#(?=\w+ = )", "", (SYSTEMD / "config.toml").read_text(), flags=re.MULTILINE)
    for name in ("submitters", "devices"):
        (tmp_path / name).mkdir()
        text = text.replace(f"/etc/foldd/{name}", str(tmp_path / name))
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert tomllib.loads(text)["bus"].keys() == {"bind", "announce", "submitters", "devices"}
    load_config(path)


def test_the_environment_file_names_what_the_unit_uses() -> None:
    named = set(re.findall(r"^#?(FOLDD_\w+)=", (SYSTEMD / "runtime.env").read_text(), re.MULTILINE))
    used = set(re.findall(r"\$\{?(FOLDD_\w+)", only("foldd-runtime.service", "ExecStart")))
    assert named == used


@pytest.mark.parametrize("unit", UNITS)
def test_sections(unit: str) -> None:
    """Every option stands under a header; what stands before the first one is ignored by systemd."""
    sections = ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    sections.optionxform = str  # type: ignore[assignment, method-assign]
    sections.read_string((SYSTEMD / unit).read_text())
    assert sections.sections() == ["Unit", "Service", "Install"]
    assert sections["Install"]["WantedBy"] == "multi-user.target"
