"""What is kept on disk is only ever a shortcut: damaged, stale or forbidden files are made anew."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headloom.grammar import store


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.folder.cache_clear()
    yield tmp_path / "headloom"
    store.folder.cache_clear()


def counted(made: list[int], value: object = "made"):
    def make() -> object:
        made.append(1)
        return value

    return make


def test_what_was_made_is_not_made_again(home):
    made: list[int] = []
    for _ in range(2):
        assert store.kept("a", [b"of this"], counted(made)) == "made"
    assert (len(made), [path.name for path in home.iterdir()]) == (1, ["a.pickle"])
    assert store.kept("a", [b"of that"], counted(made, "other")) == "other"
    assert len(made) == 2


@pytest.mark.usefixtures("home")
def test_another_version_of_the_modules_is_another_thing(monkeypatch):
    made: list[int] = []
    store.kept("a", [], counted(made))
    monkeypatch.setattr(store, "_modules", lambda: b"changed")
    store.kept("a", [], counted(made))
    assert len(made) == 2


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:40], lambda content: content[:-1],
    lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: b"x" * len(content),
])  # fmt: skip
def test_a_damaged_file_is_made_anew(home, damage):
    made: list[int] = []
    store.kept("a", [], counted(made, {"k": list(range(50))}))
    path = home / "a.pickle"
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert store.kept("a", [], counted(made, {"k": list(range(50))})) == {"k": list(range(50))}
    assert len(made) == 2


@pytest.mark.usefixtures("home")
def test_what_cannot_be_written_is_made_each_time(monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(store.os, "access", lambda *_: False)
    for _ in range(2):
        assert store.kept("a", [], counted(made)) == "made"
    assert len(made) == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    store.folder.cache_clear()
    assert store.kept("a", [], counted(made)) == "made"


def test_a_full_disk_is_no_error(home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    assert store.kept("a", [], lambda: 1) == 1
    assert list(home.iterdir()) == []


def test_many_write_at_once(home):
    big = list(range(20_000))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: store.kept("a", [bytes([n % 3])], lambda: big), range(60)))
    assert all(each == big for each in found)
    assert [path.name for path in home.iterdir()] == ["a.pickle"]
    digests = 2 * store._SIZE
    assert pickle.loads((home / "a.pickle").read_bytes()[digests:]) == big


def test_a_check_keeps_the_standard_library_and_loads_little(home):
    example = Path(__file__).parents[2] / "examples" / "gqa.loom"
    code = (
        "import sys; from headloom.cli import main\n"
        f"main(['check', {str(example)!r}], standalone_mode=False)\n"
        "heavy = {'yaml', 'numpy', 'networkx', 'rich', 'torch', 'optuna', 'headloom.search'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    kept = {path.name.partition("-")[0].removesuffix(".pickle") for path in home.iterdir()}
    assert kept == {"grammar", "std", "block"}
