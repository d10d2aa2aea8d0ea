"""The cache: whole or not there, whatever happens to it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from examples.flax_llama.data.cache import cached
from examples.flax_llama.errors import UserError


class Build:
    def __init__(self, content=b"content"):
        self.content = content
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "data").write_bytes(self.content)


def test_built_once(tmp_path):
    build = Build()
    for _ in range(2):
        folder = cached(tmp_path / "new" / "cache", "name", build)
        assert (folder / "data").read_bytes() == b"content"
    assert build.calls == 1
    assert folder == tmp_path / "new" / "cache" / "name"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached(Path("~/cache"), "name", Build()) == tmp_path / "cache" / "name"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "data").write_bytes(b"conten"),
        lambda folder: (folder / "data").write_bytes(b"contenT"),
        lambda folder: (folder / "data").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
)
def test_damage_is_repaired(tmp_path, damage):
    build = Build()
    folder = cached(tmp_path, "name", build)
    damage(folder)
    assert (cached(tmp_path, "name", build) / "data").read_bytes() == b"content"
    assert build.calls == 2
    assert os.listdir(tmp_path) == ["name"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "data").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "name", build)
    assert os.listdir(tmp_path) == []
    assert (cached(tmp_path, "name", Build()) / "data").read_bytes() == b"content"


def test_many_at_once(tmp_path):
    barrier = Barrier(4, timeout=30)

    def build(folder):
        (folder / "data").write_bytes(b"content")
        barrier.wait()  # all four are building, then all four publish

    with ThreadPoolExecutor(4) as pool:
        folders = [*pool.map(lambda _: cached(tmp_path, "name", build), range(4))]
    assert {*folders} == {tmp_path / "name"}
    assert (tmp_path / "name" / "data").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["name"]


def test_scratch_of_killed_processes_is_removed_in_time(tmp_path):
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    old.mkdir()
    new.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    cached(tmp_path, "name", Build())
    assert not old.exists()
    assert new.exists()


def test_no_place_for_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the data cache .*file/name: .*--cache-dir"):
        cached(tmp_path / "file", "name", Build())


def test_full_disk(tmp_path):
    def build(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; choose another --cache-dir"):
        cached(tmp_path, "name", build)
    assert os.listdir(tmp_path) == []


def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match="Permission denied"):
        cached(tmp_path, "name", Build())
