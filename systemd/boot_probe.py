"""The boot test's inside half: runs as a unit on the freshly booted system, and tries what the units promise.

    python3 boot_probe.py FIXTURE RESULTS

FIXTURE holds what boot_fixture.py wrote. Each finding is a line in RESULTS/findings.jsonl; RESULTS/verdict says
whether all of them were as they should be. Only the standard library: it runs beside foldd, not in it. What it
sees of the box is in boot_box.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from boot_box import (
    DAEMON,
    DROPPER,
    INBOX,
    RUNTIME,
    STATE,
    Failed,
    active,
    ask,
    back,
    drop,
    folding,
    generation,
    main_pid,
    restarts,
    run,
    served,
    show,
    wait,
    workers,
)

FOLD_SECONDS = 300.0  # how long a generation may take on a busy machine
RESTART_SECONDS = 120.0
WATCHDOG_SECONDS = 6  # instead of the units' own, so that the test does not wait for minutes
CAP_LEASE = 28
WHEELS = "/usr/src/wheels/*/*.whl"  # where boot-test.sh puts them
INSTALL = ("--no-print-directory", "-f", "/usr/src/foldd/systemd/install.mk")


class Findings:
    def __init__(self, folder: Path) -> None:
        self._file = (folder / "findings.jsonl").open("a")
        self.failed = 0

    def add(self, name: str, value: object, *, ok: bool = True, note: str = "") -> None:
        self.failed += not ok
        self._file.write(json.dumps({"name": name, "value": value, "ok": ok, "note": note}) + "\n")
        self._file.flush()


class BootTest:
    def __init__(self, fixture: Path, found: Findings) -> None:
        self._fixture, self._found = fixture, found
        self._next = 0

    def run(self) -> None:
        for step in (
            self.boot, self.walls, self.first_generation, self.slow_writer, self.supervisor_killed,
            self.worker_killed, self.poison, self.stop, self.hang, self.runtime_killed,
            self.submitted, self.one_box, self.exposure, self.upgrade, self.journal, self.uninstall,
        ):  # fmt: skip
            try:
                step()
            except (Failed, OSError, ValueError, KeyError) as error:
                self._found.add(step.__name__, None, ok=False, note=f"{type(error).__name__}: {error}")
                if step == self.boot:
                    return  # what does not come up need not be tried

    # --- steps

    def boot(self) -> None:
        wait("foldd active", lambda: active(DAEMON), FOLD_SECONDS)
        wait("foldd-runtime active", lambda: active(RUNTIME), FOLD_SECONDS)
        start = int(run("systemctl", "show", "--value", "-p", "UserspaceTimestampMonotonic").stdout)
        for unit in (DAEMON, RUNTIME):
            begun, ready = (int(show(unit, f"{key}TimestampMonotonic")) for key in ("InactiveExit", "ActiveEnter"))
            self._found.add(f"{unit}: boot to ready, s", round((ready - start) / 1e6, 2))
            self._found.add(f"{unit}: start to ready, s", round((ready - begun) / 1e6, 2))
            self._found.add(f"{unit}: restarts at boot", restarts(unit), ok=restarts(unit) == 0)
        code, _ = ask("/healthz")
        self._found.add("runtime before the first generation", code, ok=code == 503, note="503: nothing to serve yet")

    def walls(self) -> None:
        daemon, runtime = main_pid(DAEMON), main_pid(RUNTIME)
        for unit, pid, capabilities in ((DAEMON, daemon, 1 << CAP_LEASE), (RUNTIME, runtime, 0)):
            facts = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
            good = int(facts["CapEff"], 16) == capabilities and facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "2"
            note = "CAP_LEASE alone" if capabilities else "none"
            self._found.add(f"{unit}: capabilities", facts["CapEff"].lstrip("0") or "0", ok=good, note=note)
        modes = {path: oct(path.stat().st_mode & 0o7777) for path in (STATE, INBOX, STATE / "keys" / "daemon.key")}
        self._found.add(
            "state, inbox, key modes", " ".join(modes.values()), ok=list(modes.values()) == ["0o751", "0o2770", "0o600"]
        )
        seen = run("runuser", "-u", DROPPER, "--", "ls", str(STATE), check=False).returncode
        self._found.add("a dropper cannot list the state", seen, ok=seen != 0)
        folders = [path for path in STATE.iterdir() if path.is_dir() and not path.is_symlink()]
        open_to = [
            path.name
            for path in folders
            if not run("runuser", "-u", "nobody", "--", "ls", str(path), check=False).returncode
        ]
        self._found.add("of its folders, others can list", len(open_to), ok=not open_to, note=f"of {len(folders)}")

    def first_generation(self) -> None:
        self._fold("dropped checkpoint to generation, s")
        took = wait("the runtime serves it", lambda: served() == generation(), 30)
        self._found.add("generation to served over the bus, s", took, note="CURVE, other user, own store")
        code, answer = ask("/v1/infer/task1", (self._fixture / "batch.npy").read_bytes())
        good = code == 200 and answer["generation"] == 1 and len(answer["logits"]) == 2
        self._found.add("inference", code, ok=good, note=str(answer)[:80])
        kilobytes = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{main_pid(DAEMON)}/status").read_text())
        megabytes = round(int(kilobytes[1]) / 1000) if kilobytes else 0
        self._found.add("supervisor resident, MB", megabytes, ok=0 < megabytes < 60)

    def slow_writer(self) -> None:
        """A writer that rests longer than the quiet time: only the lease tells that the file is not complete."""
        source, before = self._bundle(), generation()
        target = INBOX / source.name
        script = (
            f"umask 077; exec 3> {target}; head -c 1000 {source} >&3; truncate -s $(stat -c %s {source}) {target}; "
        )
        script += f"sleep 8; tail -c +1001 {source} >&3"
        writer = subprocess.Popen(["runuser", "-u", DROPPER, "--", "sh", "-c", script])
        time.sleep(7)
        still = target.exists()
        writer.wait()
        wait("the slow file is folded", lambda: generation() > before, FOLD_SECONDS)
        self._found.add("a preallocated file that is still open waits", still, ok=still and self._quarantined() == 0)

    def supervisor_killed(self) -> None:
        before = restarts(DAEMON)
        os.kill(main_pid(DAEMON), signal.SIGKILL)
        started = time.monotonic()
        wait("systemd restarts foldd", partial(back, DAEMON, before), RESTART_SECONDS)
        pause = int(show(DAEMON, "RestartUSec").rstrip("s"))
        self._found.add(
            "kill -9 of the supervisor to ready, s", round(time.monotonic() - started, 2), note=f"RestartSec={pause}s"
        )
        self._fold("the next one after it, s")

    def worker_killed(self) -> None:
        supervisor, before = main_pid(DAEMON), generation()
        bundle = self._bundle()
        drop(bundle)
        wait("folding", lambda: folding(bundle.name), FOLD_SECONDS, every=0.01)
        os.kill(workers()[0], signal.SIGKILL)
        took = wait("folded after all", lambda: generation() > before, FOLD_SECONDS)
        self._found.add(
            "kill -9 of the worker to generation, s", took, ok=main_pid(DAEMON) == supervisor, note="same supervisor"
        )

    def poison(self) -> None:
        """A checkpoint that takes its worker with it every time: set aside, and nobody restarted."""
        supervisor, count, before = main_pid(DAEMON), restarts(DAEMON), generation()
        bundle = self._bundle()
        drop(bundle)
        deadline = time.monotonic() + 2 * FOLD_SECONDS
        kills = 0
        while self._quarantined() == 0:
            if time.monotonic() > deadline:
                raise Failed(f"not set aside after {kills} dead workers")
            if folding(bundle.name):
                os.kill(workers()[0], signal.SIGKILL)
                kills += 1
                wait("the death is noticed", lambda: not folding(bundle.name), 30, every=0.01)
                time.sleep(0.5)  # the pause before the next attempt is longer
            time.sleep(0.01)
        calm = main_pid(DAEMON) == supervisor and restarts(DAEMON) == count and generation() == before
        self._found.add("poison: workers lost until it was set aside", kills, ok=kills == 3 and calm, note="no restart")
        self._fold("the next one after it, s")

    def stop(self) -> None:
        bundle = self._bundle()
        drop(bundle)
        wait("folding", lambda: folding(bundle.name), FOLD_SECONDS, every=0.01)
        before, started = generation(), time.monotonic()
        run("systemctl", "stop", DAEMON)
        took = round(time.monotonic() - started, 2)
        clean = show(DAEMON, "Result") == "success" and show(DAEMON, "ExecMainStatus") == "0" and generation() == before
        self._found.add("stop in the middle of a fold, s", took, ok=took < 5 and clean, note="TimeoutStopSec=30s")
        left = run("pgrep", "-u", "foldd", check=False).stdout.split() if Path("/usr/bin/pgrep").exists() else []
        self._found.add("processes left behind", len(left), ok=not left)
        started = time.monotonic()
        run("systemctl", "start", DAEMON)
        self._found.add("start to ready, s", round(time.monotonic() - started, 2))
        wait("the fold is done again", lambda: generation() > before, FOLD_SECONDS)
        rows = json.loads(run("runuser", "-u", "foldd", "--", "foldd", "history", "--json").stdout)
        self._found.add("generations after it", len(rows), ok=len(rows) == generation(), note="foldd history")

    def hang(self) -> None:
        own = {unit: show(unit, "WatchdogUSec") for unit in (DAEMON, RUNTIME)}
        for unit in own:
            place = Path(f"/run/systemd/system/{unit}.d")
            place.mkdir(parents=True, exist_ok=True)
            (place / "boot-test.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG_SECONDS}s\n")
        run("systemctl", "daemon-reload")
        for unit in own:
            run("systemctl", "restart", unit)
            time.sleep(2 * WATCHDOG_SECONDS)
            fed, before = restarts(unit) == 0, restarts(unit)
            os.kill(main_pid(unit), signal.SIGSTOP)
            took = wait(f"the watchdog restarts {unit}", partial(back, unit, before), RESTART_SECONDS)
            log = run("journalctl", "-b", "-u", unit, "--no-pager").stdout
            said = "Watchdog timeout" in log and "Fatal Python error: Aborted" in log  # and where it hung
            note = f"WatchdogSec={WATCHDOG_SECONDS}s here, {own[unit]} in the unit"
            self._found.add(f"{unit}: hang to ready again, s", took, ok=fed and said, note=note)
        self._fold("the next one after it, s")

    def runtime_killed(self) -> None:
        before = restarts(RUNTIME)
        os.kill(main_pid(RUNTIME), signal.SIGKILL)
        started = time.monotonic()
        wait("systemd restarts the runtime", partial(back, RUNTIME, before), RESTART_SECONDS)
        wait("it serves again", lambda: served() == generation(), 30)
        took = round(time.monotonic() - started, 2)
        self._found.add("kill -9 of the runtime to serving, s", took, note=f"generation {served()}")
        run("systemctl", "stop", DAEMON)
        code, answer = ask("/v1/infer/task1", (self._fixture / "batch.npy").read_bytes())
        self._found.add(
            "inference while the daemon is stopped", code, ok=code == 200, note=f"generation {answer.get('generation')}"
        )
        run("systemctl", "start", DAEMON)

    def submitted(self) -> None:
        before = generation()
        run("runuser", "-u", DROPPER, "--", "foldd", "submit", str(self._bundle()))
        self._found.add("`foldd submit` to generation, s", wait("folded", lambda: generation() > before, FOLD_SECONDS))

    def one_box(self) -> None:
        """The runtime on the daemon's own state directory, as operations.md says."""
        place = Path(f"/run/systemd/system/{RUNTIME}.d")
        (place / "one-box.conf").write_text("[Service]\nSupplementaryGroups=foldd\n")
        Path("/etc/foldd/runtime.env").write_text(f"FOLDD_RUNTIME_STATE={STATE}\n")
        run("systemctl", "daemon-reload")
        run("systemctl", "restart", RUNTIME)
        note = f"generation {generation()}"
        self._found.add(
            "runtime on the daemon's state, s", wait("it serves", lambda: served() == generation(), 30), note=note
        )

    def exposure(self) -> None:
        for unit in (DAEMON, RUNTIME):
            for how in ("booted", "offline"):
                where = [unit] if how == "booted" else ["--offline=true", f"/etc/systemd/system/{unit}"]
                done = run("systemd-analyze", "security", "--no-pager", "--threshold=20", *where, check=False)
                figure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
                self._found.add(f"{unit}: exposure, {how}", figure[1] if figure else None, ok=done.returncode == 0)
            done = run("systemd-analyze", "verify", f"/etc/systemd/system/{unit}", check=False)
            self._found.add(f"{unit}: verify", done.returncode, ok=done.returncode == 0, note=done.stderr[:200])

    def journal(self) -> None:
        """Nothing that the services wanted was refused by a wall."""
        for unit in (DAEMON, RUNTIME):
            text = run("journalctl", "-b", "-u", unit, "--no-pager", "-o", "cat").stdout
            refused = re.findall(r".*(?:Permission denied|Operation not permitted|not supported by protocol).*", text)
            self._found.add(f"{unit}: refused by a wall", len(refused), ok=not refused, note="; ".join(refused)[:200])
        failed = run("systemctl", "--failed", "--no-legend", "--plain").stdout.split("\n")
        ours = [line for line in failed if "foldd" in line]
        self._found.add("failed units", len(ours), ok=not ours, note="; ".join(ours))

    def upgrade(self) -> None:
        """`make install` once more, on the running system."""
        before = {unit: main_pid(unit) for unit in (DAEMON, RUNTIME)}
        config = Path("/etc/foldd/config.toml").read_bytes()
        run("make", *INSTALL, "install", f"WHEELS={WHEELS}")
        restarted = all(active(unit) and main_pid(unit) != pid for unit, pid in before.items())
        kept = Path("/etc/foldd/config.toml").read_bytes() == config
        self._found.add("upgrade restarts both, keeps config.toml", restarted and kept, ok=restarted and kept)
        self._fold("the next one after it, s")

    def uninstall(self) -> None:
        kept = (STATE / "ledger.sqlite3", STATE / "current" / "model.onnx", Path("/etc/foldd/config.toml"))
        run("make", *INSTALL, "uninstall")
        gone = not Path("/opt/foldd").exists() and all(
            show(unit, "LoadState") == "not-found" for unit in (DAEMON, RUNTIME)
        )
        left = all(path.exists() for path in kept)
        self._found.add("uninstall leaves the data, nothing else", gone and left, ok=gone and left)

    # --- tools

    def _bundle(self) -> Path:
        self._next += 1
        return self._fixture / f"task{self._next}.safetensors"

    def _fold(self, name: str) -> None:
        before = generation()
        drop(self._bundle())
        self._found.add(name, wait(name, lambda: generation() > before, FOLD_SECONDS))

    def _quarantined(self) -> int:
        return sum(1 for _ in (STATE / "quarantine").iterdir())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fixture", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    found = Findings(arguments.results)
    try:
        BootTest(arguments.fixture, found).run()
    finally:
        journal = run("journalctl", "-b", "--no-pager", "-o", "short-monotonic", check=False).stdout
        (arguments.results / "journal.txt").write_text(journal)
        (arguments.results / "verdict").write_text("failed\n" if found.failed else "passed\n")
        run("systemctl", "poweroff", "--no-block", check=False)


if __name__ == "__main__":
    main()
