"""Bases that `foldd init` takes apart once a session, and boxes to run the daemon on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from simulator import Box

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a factory in networks.py → folder `base/` as `foldd init` makes it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            import networks

            from foldd.base.load import capture
            from foldd.base.store import store_base

            folder = tmp_path_factory.mktemp(name) / "base"
            model = getattr(networks, name)()
            store_base(folder, capture(model, (1, 8, 8)), head="fc" if name == "with_head" else "")
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def make_box(tmp_path: Path, base_folder: Callable[[str], Path]) -> Iterator[Callable[..., Box]]:
    """Makes boxes whose daemons are killed at the end, whatever happened."""
    boxes: list[Box] = []

    def make(*, base: str = "residual", name: str = "box", **tables: dict[str, Any]) -> Box:
        box = Box(tmp_path / name, base_folder(base), **tables)
        boxes.append(box)
        return box

    yield make
    for box in boxes:
        box.kill()
