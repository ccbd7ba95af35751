"""Cells and rows: ratios of given times, and what is wrong shows no speed."""

from __future__ import annotations

import json

import pytest

from headloom.bench import table
from headloom.bench.case import Case
from headloom.bench.cells import Cell, Row, geometric_mean

CASE = Case("block a { width = 8; heads = 2; mask = causal }", tokens=64)


def row(*cells: Cell) -> Row:
    return Row(CASE, "sdpa", flops=1_000, ceiling=5_000.0, cells=cells)


OURS = Cell("headloom", times=(1.0, 2.0, 9.0), error=1e-7, bar=1e-4, memory=10)


def test_ratios_are_of_medians() -> None:
    found = row(OURS, Cell("sdpa", times=(3.0, 5.0, 4.0), error=0.0, bar=1e-4))
    assert found.ratio(found.peers[0]) == 2.0
    assert found.rate(found.ours) == 500
    assert found.share(found.ours) == 0.1


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_what_is_wrong_shows_no_speed(error: float) -> None:
    wrong = Cell("flex", times=(0.1, 0.1), error=error, bar=1e-4, memory=1)
    found = row(OURS, wrong, Cell("sdpa", times=(3.0,), memory=30))
    assert wrong.wrong
    assert wrong.seconds is None
    assert wrong.spread is None
    assert wrong.obstacle.startswith("wrong: error ")
    assert found.ratio(wrong) is None
    assert found.rate(wrong) is None
    best = found.best("seconds")
    assert best is not None
    assert best.peer == "sdpa"
    assert found.best("memory") == best
    shown = table.cells(found, wrong)
    assert shown[1] == "wrong"
    assert not any(shown[2:7])


def test_nobody_is_compared_with_ours_when_ours_is_wrong() -> None:
    found = row(Cell("headloom", times=(1.0,), error=1.0, bar=1e-4), Cell("sdpa", times=(3.0,)))
    assert found.ratio(found.peers[0]) is None


def test_a_peer_of_another_block_has_a_ratio_and_no_rate() -> None:
    other = Cell("flex", times=(4.0,), error=0.0, bar=1e-4, computes="block b { mask = causal }")
    found = row(OURS, other)
    assert found.ratio(other) == 2.0
    assert found.rate(other) is None


def test_json_goes_there_and_back() -> None:
    found = row(OURS, Cell("flex", reason="it cannot"), Cell("x", error=float("inf"), bar=1e-4))
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Row.from_json(json.loads(text))
    assert again.cells[:2] == found.cells[:2]
    assert again.case == found.case
    assert again.cells[2].wrong
    (ours, cannot, _) = json.loads(text)["cells"]
    assert ours["median"] == 2.0
    assert ours["share_of_ceiling"] == 0.1
    assert cannot["ratio"] is None
    assert cannot["reason"] == "it cannot"


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([]) is None


def test_units() -> None:
    assert [table.seconds(each) for each in (2.5, 0.0123, 4e-5, 2000)] == [
        "2.5 s",
        "12.3 ms",
        "40 µs",
        "2000 s",
    ]
    assert table.quartiles(0.0101, 0.0123) == "10.1–12.3 ms"
    assert (table.size(250_000_000), table.size(4096)) == ("0.25 GB", "0.0 MB")
    assert table.rate(2e12) == "2 TFLOP/s"
