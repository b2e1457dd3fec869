"""What all benchmarks share: options, progress, the machine, the table, the JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; ends within 5 minutes on two cores")
    return parser


def add_data(parser: argparse.ArgumentParser, *, split: str) -> None:
    """The options of a benchmark on a folder of tasks: `--data --split --plots --cache --threads`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder of bases, bundles and images")
    parser.add_argument("--split", default=split, choices=["validation", "test"])
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw pictures; needs matplotlib")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep what was made and measured, and use it again")
    parser.add_argument("--threads", type=int, default=2)


def prepare_plots(parser: argparse.ArgumentParser, folder: Path | None, *packages: str) -> None:
    """Makes the folder of `--plots`, where one is named; ends the command where a package that draws is missing."""
    if folder is None:
        return
    if missing := [package for package in packages if find_spec(package) is None]:
        parser.error(f"--plots needs {', '.join(missing)}: pip install 'foldd[bench]'")
    folder.mkdir(parents=True, exist_ok=True)


def say(text: str) -> None:
    """A line of progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "python": platform.python_version(),
    }  # fmt: skip


def finish(name: str, rows: list[dict[str, Any]], json_path: Path | None, started: datetime) -> None:
    """Prints the rows as a table and writes them as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if json_path is not None:
        content = {
            "name": name, "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
            "machine": machine(), "started": started.isoformat(timespec="seconds"), "rows": rows,
        }  # fmt: skip
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def now() -> datetime:
    return datetime.now(UTC)


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
