"""The standing tables: their data, their targets, and going on where they stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headloom.bench import table
from headloom.bench.case import Case
from headloom.bench.cells import Cell, Row
from headloom.bench.machine import Machine, machine
from headloom.bench.page import page
from headloom.bench.peers import known
from headloom.bench.suite import SUITES, Entry, Measured, Standing, Suite, measured, read_suite

HERE = Machine("A CPU, 2 threads", 2, 2, (("torch", "2"),), "abc")
TEXT = "block a { width = 8; heads = 2; mask = causal }"
ENTRIES = tuple(
    Entry(title, Case(TEXT, tokens=64), ("sdpa",), target=2.0, group=group)
    for title, group in (("one", ""), ("two", "pair"), ("three", "pair"))
)
SUITE = Suite("tiny", "small things", 2, ENTRIES, {"pair": 2.0})


def row(entry: Entry, theirs: float = 4.0, **ours: object) -> Row:
    first = replace(Cell("headloom", times=(2.0,), error=0.0, bar=1.0, memory=10), **ours)  # type: ignore[arg-type]
    return Row(entry.case, "sdpa", 100, 1e3, (first, Cell("sdpa", times=(theirs,), memory=40)))


def go(path: Path, done: list[str], **more: object) -> Standing:
    """Measure the tiny suite and note which rows were."""

    def measure(entry: Entry) -> Row:
        done.append(entry.title)
        return row(entry)

    given = {"machine": HERE, "measure": measure, "date": "2030-01-01", **more}
    return measured(SUITE, path=path, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SUITES)
def test_the_tables_can_be_read(name: str) -> None:
    suite = read_suite(name)
    assert {each.group for each in suite.entries} - {""} == set(suite.groups)
    for each in suite.entries:
        assert known(each.against) == each.against
        assert each.case.what.width
        if each.instead:
            assert Case(each.instead).what


def test_the_cpu_table_has_fourteen_masks() -> None:
    suite = read_suite("cpu")
    for group in suite.groups:
        assert sum(each.group == group for each in suite.entries) == 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: a\nblock: heads = 2\nrows: [{title: a, tokens: 4, bloc: b}]", "has no bloc"),
        ("about: a\nblock: heads = 2\nrow: []", "has no row"),
        (
            "about: a\nblock: heads = 2\nrows: [{title: a, tokens: [4, 4]}]",
            "two rows of a; 4 tokens",
        ),
    ],
)
def test_a_wrong_table(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_suite("wrong", path)


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    path, done = tmp_path / "results" / "a.json", []
    moments = iter([0.0, 0.0, 5.0, 99.0])
    first = go(path, done, budget=10.0, clock=lambda: next(moments))
    assert done == ["one", "two"]
    assert [each.row is not None for each in first.rows] == [True, True, False]
    assert "three; 64 tokens, forward: not measured yet" in str_of(first)
    assert go(path, done).rows[2].met is True
    assert done == ["one", "two", "three"]
    go(path, done)
    assert len(done) == 3


def test_other_sources_are_measured_again_and_fresh_too(tmp_path: Path) -> None:
    path, done = tmp_path / "a.json", []
    go(path, done)
    go(path, done, machine=replace(HERE, sources="other"))
    assert len(done) == 6
    go(path, done, machine=replace(HERE, sources="other"), fresh=True)
    assert len(done) == 9


def test_every_row_is_written_at_once_and_a_fatal_one_goes_last(tmp_path: Path) -> None:
    path, done = tmp_path / "a.json", []

    def dies(entry: Entry) -> Row:
        if entry.title == "two":
            raise KeyboardInterrupt
        return row(entry)

    with pytest.raises(KeyboardInterrupt):
        go(path, done, measure=dies)
    data = json.loads(path.read_text())
    assert [each["measured"] for each in data["rows"]] == [2.0, None, None]
    assert list(data["begun"].values()) == [1]
    go(path, done)
    assert done == ["three", "two"]
    assert json.loads(path.read_text())["begun"] == {}


def test_a_row_that_fails_says_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fails(entry: Entry) -> Row:
        if entry.title == "two":
            raise RuntimeError("out of memory")
        return row(entry)

    found = go(tmp_path / "a.json", [], measure=fails)
    assert [each.value for each in found.rows] == [2.0, None, 2.0]
    assert found.rows[1].reason == "RuntimeError: out of memory"
    assert found.group("pair") is None
    assert "out of memory" in page(found)


def test_targets() -> None:
    entry = ENTRIES[0]
    assert Measured(entry, row(entry), "").met is True
    assert Measured(entry, row(entry, theirs=3.9), "").met is False
    assert Measured(entry, row(entry, error=9.0), "").met is None
    memory = replace(entry, number="memory", target=5.0)
    assert (Measured(memory, row(memory), "").value, Measured(memory, row(memory), "").met) == (
        4.0, False)  # fmt: skip
    limit = replace(entry, number="limit", target=3.0)
    assert (Measured(limit, row(limit), "").value, Measured(limit, row(limit), "").met) == (
        2.0, True)  # fmt: skip
    assert table.line(Measured(limit, row(limit), "")).endswith(": 2 s, asked ≤ 3 s")


def test_the_page_and_the_json(tmp_path: Path) -> None:
    found = go(tmp_path / "a.json", [])
    assert found.group("pair") == pytest.approx(2.0)
    text = page(found)
    assert text.count('class="bar ours"') == 3
    assert "A CPU, 2 threads" in text
    assert text.count('class="met"') == 3
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["groups"] == [{"group": "pair", "asked": 2.0, "measured": pytest.approx(2.0)}]
    assert data["rows"][0].keys() >= {"title", "asked", "measured", "met", "against", "row"}
    assert data["rows"][0]["row"]["cells"][1]["ratio"] == 2.0
    assert data["machine"]["versions"] == {"torch": "2"}


def test_this_machine() -> None:
    found = machine("cpu")
    assert dict(found.versions)["torch"]
    assert found.sources == machine("cpu").sources
    assert found.slug.endswith("thread") or found.slug.endswith("threads")
    assert "/" not in found.slug


def str_of(standing: Standing) -> str:
    from rich.console import Console

    console = Console(record=True, width=110, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(table.standing_table(standing))
    return captured.get()
