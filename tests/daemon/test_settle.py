"""When a dropped file counts as complete: real files, a clock that the test turns."""

from __future__ import annotations

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from foldd.daemon.settle import IGNORED_ENDINGS, SettleWatch, being_written


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return SettleWatch(2.0, 60.0, clock)


def names(settled):
    return [item.path.name for item in settled]


def test_a_file_must_rest(tmp_path, watch, clock):
    (tmp_path / "a").write_bytes(b"x")
    assert watch.scan(tmp_path) == []
    clock.now += 1.9
    assert watch.scan(tmp_path) == []
    clock.now += 0.2
    (found,) = watch.scan(tmp_path)
    assert (found.path.name, found.is_file) == ("a", True)
    assert found.waited_seconds == pytest.approx(2.1)
    assert watch.waiting == 0


def test_growth_starts_the_rest_again(tmp_path, watch, clock):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    watch.scan(tmp_path)
    for size in range(2, 6):
        clock.now += 1.5
        path.write_bytes(b"x" * size)
        assert watch.scan(tmp_path) == []
    clock.now += 2
    assert names(watch.scan(tmp_path)) == ["a"]


def test_an_open_writer_holds_it_back(tmp_path, watch, clock):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(b"all of it")
        file.flush()
        if not being_written(path):
            pytest.skip("this file system or user has no leases")
        watch.scan(tmp_path)
        clock.now += 100
        assert watch.scan(tmp_path) == []
    assert names(watch.scan(tmp_path)) == ["a"]


def test_a_reader_does_not(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with (tmp_path / "a").open("rb"):
        assert not being_written(tmp_path / "a")


def test_shorter_than_its_header_waits_for_the_rest_but_not_for_ever(tmp_path, watch, clock):
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    (tmp_path / "part").write_bytes(content[:-40])
    watch.scan(tmp_path)
    clock.now += 59
    assert watch.scan(tmp_path) == []
    clock.now += 2
    assert names(watch.scan(tmp_path)) == ["part"], "verification will name what is wrong"


def test_preallocated_file_is_not_short_and_settles(tmp_path, watch, clock):
    """A file of the right length is left to verification, which looks at every value."""
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(size - 40)
        file.truncate(size)
    watch.scan(tmp_path)
    clock.now += 2
    assert names(watch.scan(tmp_path)) == ["a"]


def test_names_of_files_under_way_are_ignored(tmp_path, watch, clock):
    for ending in IGNORED_ENDINGS:
        (tmp_path / f"a{ending}").touch()
    (tmp_path / ".hidden").touch()
    watch.scan(tmp_path)
    clock.now += 10
    assert watch.scan(tmp_path) == []
    assert watch.waiting == 0


def test_order_is_by_modification_time_then_name(tmp_path, watch, clock):
    for name, stamp in (("c", 10), ("b", 20), ("a", 20)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(stamp, stamp))
    watch.scan(tmp_path)
    clock.now += 2
    assert names(watch.scan(tmp_path)) == ["c", "a", "b"]


def test_what_is_no_file_is_handed_on_as_such(tmp_path, watch, clock):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/hostname")
    watch.scan(tmp_path)
    clock.now += 2
    found = watch.scan(tmp_path)
    assert sorted(names(found)) == ["folder", "link", "pipe"]
    assert not any(item.is_file for item in found)


def test_vanished_file_is_forgotten(tmp_path, watch, clock):
    (tmp_path / "a").touch()
    watch.scan(tmp_path)
    (tmp_path / "a").unlink()
    clock.now += 2
    assert watch.scan(tmp_path) == []
    assert watch.waiting == 0
