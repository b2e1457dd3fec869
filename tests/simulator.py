"""A box to test on: a state directory with a real base, real bundles, and the real daemon as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from foldd.core.base_spec import BaseSpec, read_base_spec
from foldd.core.bundle import Head, write_bundle
from foldd.core.roles import Role
from foldd.core.tensorfile import open_tensors
from foldd.daemon.config import Config, load_config
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, GenerationRow, Ledger
from foldd.daemon.status import history, status

WAIT_S = 90.0  # machines are shared; a wait this long is a failure, not slowness


class Box:
    """One state directory and the commands of somebody who operates it."""

    def __init__(self, folder: Path, base: Path, **tables: dict[str, Any]) -> None:
        """
        Args:
            base: a folder that `foldd init` has made, copied to start from.
            tables: tables of config.toml, laid over quick defaults.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config_path = folder, folder / "config.toml"
        self.configure(**tables)
        self.layout = Layout(folder / "state")
        self.layout.create()
        shutil.copytree(base, self.layout.base)
        Ledger.create(self.layout.ledger).close()  # as `foldd init` does
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"
        self._log_from = 0

    def configure(self, **tables: dict[str, Any]) -> None:
        """Writes config.toml: quick to settle, one thread, a short fold; `tables` go before that."""
        quick: dict[str, dict[str, Any]] = {
            "state": {"directory": "state"},
            "intake": {"settle_seconds": 0.2, "rescan_seconds": 1, "incomplete_seconds": 1},
            "fold": {"threads": 1},
            "quantize": {"format": "float"},
        }
        merged = quick | {name: quick.get(name, {}) | table for name, table in tables.items()}
        self.config_path.write_text("".join(_toml(name, table) for name, table in merged.items()))

    @property
    def config(self) -> Config:
        return load_config(self.config_path)

    @property
    def spec(self) -> BaseSpec:
        return read_base_spec(self.layout.base / "base.json")

    # --- the daemon

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "foldd.daemon.cli", "run", "--config", str(self.config_path)],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stderr=log,
                stdout=log,
            )
        return self.process

    def stop(self) -> int:
        assert self.process is not None
        # Before its handler is there, SIGTERM ends any process: let it get so far.
        self.wait(lambda: " serving " in self._said() or self.process.poll() is not None, "the daemon's start")
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def worker_pid(self) -> int | None:
        """The running worker, if there is one."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            pids = children.read_text().split()
        except OSError:
            return None
        return int(pids[0]) if pids else None

    # --- what an operator looks at

    def status(self) -> dict[str, Any]:
        return status(self.config)

    def history(self) -> list[dict[str, Any]]:
        return history(self.config)

    def generations(self) -> list[GenerationRow]:
        if not self.layout.ledger.exists():
            return []
        ledger = Ledger(self.layout.ledger, read_only=True)
        try:
            return ledger.generations()
        finally:
            ledger.close()

    def arrivals(self, *states: str) -> list[Arrival]:
        ledger = Ledger(self.layout.ledger, read_only=True)
        try:
            return ledger.arrivals(*states)
        finally:
            ledger.close()

    def reasons(self) -> dict[str, str]:
        """File name → code, of everything in quarantine."""
        found = {}
        for reason in self.layout.quarantine.glob("*/reason.json"):
            content = json.loads(reason.read_text())
            found[content["file"]] = content["code"]
        return found

    def wait(self, condition: Any, what: str, *, seconds: float = WAIT_S) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"{what} did not happen in {seconds:g} s; the log ends:\n{self.tail()}")
            time.sleep(0.05)

    def wait_generation(self, number: int) -> None:
        def there() -> bool:
            assert self.process is None or self.process.poll() is None, f"the daemon ended:\n{self.tail()}"
            rows = self.generations()
            return bool(rows) and rows[-1].generation >= number and self.layout.current.exists()

        self.wait(there, f"generation {number}")

    def _said(self) -> str:
        """What the daemon logged since it was started last."""
        return self.log.read_bytes()[self._log_from :].decode()

    def tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else "(no log)"

    # --- what is dropped

    def drop(self, source: Path) -> None:
        """As recommended: copied under a name that is ignored, then renamed."""
        part = self.layout.inbox / f".{source.name}.part"
        shutil.copyfile(source, part)
        part.rename(self.layout.inbox / source.name)

    def bundle(self, task: str, *, seed: int = 0, scale: float = 0.05, **options: Any) -> Path:
        """A valid bundle outside the inbox: the base with noise on its weights."""
        path = self.folder / "made" / f"{task}.safetensors"
        path.parent.mkdir(exist_ok=True)
        make_bundle(path, self.layout.base, task, seed=seed, scale=scale, **options)
        return path


def _toml(name: str, table: dict[str, Any]) -> str:
    own = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, dict))
    inner = "".join(_toml(f"{name}.{key}", value) for key, value in table.items() if isinstance(value, dict))
    return f"[{name}]\n{own}{inner}"


def make_bundle(
    path: Path, base: Path, task: str, *, seed: int = 0, scale: float = 0.05, classes: int = 3, calibration: int = 12,
    names: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Writes a bundle whose weights are the base's plus noise of `scale` × their own spread; `names`: of classes."""
    spec, stored = read_base_spec(base / "base.json"), open_tensors(base / "weights.safetensors").tensors
    generator = np.random.default_rng(seed)
    weights = {}
    for name, entry in spec.canonical.items():
        if entry.role is Role.COUNTER:
            continue
        array = stored[name].float32()
        if entry.role is not Role.STATISTIC:
            array = array + (scale * (array.std() + 0.01) * generator.standard_normal(array.shape)).astype(np.float32)
        weights[name] = array
    head = Head(generator.standard_normal((classes, spec.features)).astype(np.float32), np.zeros(classes, np.float32))
    inputs = generator.standard_normal((calibration, *spec.input_shape)).astype(np.float32) if calibration else None
    labels = generator.integers(0, classes, calibration) if calibration else None
    write_bundle(
        path, weights, head, task=task, base=spec, inputs=inputs, labels=labels, samples=100, classes=names
    )  # fmt: skip
