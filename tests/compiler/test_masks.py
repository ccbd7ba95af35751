"""What is said of masks without evaluating them, against evaluating them everywhere."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headloom.compiler.algebra.counting import pairs
from headloom.compiler.algebra.masks import Extent, extent, linear, of_distance, sees_itself
from headloom.compiler.algebra.points import numbers
from headloom.compiler.checking.check import check
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.expr import evaluate, fold
from headloom.grammar.parse import parse, parse_expression
from headloom.grammar.syntax import Expr
from headloom.kernels.places import bounds

from .test_tiles import spelled

SIZE = 14
STANDARD = ["causal", "window({})", "sink({})", "prefix({})", "strided({})", "blocks({})", "power"]
LINES = ["i - j", "j - i", "2 * i - j", "i + j", "j", "i", "3 * j - 2", "-(i - j)", "i - 2 * j + 1"]


def mask(text: str) -> Expr:
    """Return a mask with the definitions of the standard library in place."""
    block = check(parse(f"block a {{ heads = 2; head_dim = 2; mask = {text} }}")).blocks["a"]
    return block.mixings["o"].mix.mask


def random_mask(draw: random.Random, depth: int = 2) -> str:
    kind = draw.random()
    if depth and kind < 0.45:
        op = draw.choice(["and", "or"])
        return f"({random_mask(draw, depth - 1)} {op} {random_mask(draw, depth - 1)})"
    if depth and kind < 0.55:
        return f"not ({random_mask(draw, depth - 1)})"
    if kind < 0.75:
        return draw.choice(STANDARD).format(draw.randint(1, 6))
    line, number = draw.choice(LINES), draw.randint(-4, 9)
    if kind < 0.85:
        low, high = sorted((number, draw.randint(-4, 9)))
        return f"({low} {draw.choice(['<', '<='])} {line} {draw.choice(['<', '<='])} {high})"
    if kind < 0.92:
        return f"(abs({line}) {draw.choice(['<', '<='])} {number} / 2)"
    op = draw.choice(["<", "<=", ">", ">=", "==", "!="])
    return f"({line} {op} {draw.choice(['j', 'i', str(number), str(number / 2)])})"


def visible(expr: Expr, n: int = SIZE, m: int = SIZE) -> set[tuple[int, int]]:
    return {
        (i, j)
        for i in range(n)
        for j in range(m)
        if evaluate(expr, {"i": i, "j": j, "n": n, "m": m, "h": 0})
    }


def inside(bounds: Extent, i: int, j: int) -> bool:
    near = bounds.low <= i - j <= bounds.high
    return (j < bounds.prefix or near) and j - i <= bounds.ahead


def seeded(texts: int) -> Any:
    """Run a test on random masks, each from a seed hypothesis can shrink."""

    def wrap(test: Any) -> Any:
        run = given(st.integers(0, 2**32).map(lambda seed: random_mask(random.Random(seed))))
        return settings(max_examples=texts, deadline=None, derandomize=True)(run(test))

    return wrap


def compiled(text: str) -> Expr | None:
    """Return the mask, or None where it is `false`, which the checker refuses."""
    try:
        return mask(text)
    except LoomError as problem:
        if {each.code for each in problem.diagnostics} != {"L210"}:
            raise
        return None


@seeded(200)
def test_every_answer_about_a_mask_is_true(text):
    answers_are_true(text)


@pytest.mark.sweep
@seeded(2000)
def test_every_answer_about_many_masks_is_true(text):
    answers_are_true(text)


def answers_are_true(text: str) -> None:
    expr = compiled(text)
    if expr is None:
        return
    seen = visible(expr)
    bounds = extent(expr)
    outside = [pair for pair in seen if not inside(bounds, *pair)]
    assert not outside, (text, bounds)
    if bounds.causal:
        assert all(j <= i for i, j in seen)
    if bounds.back is not None:
        assert all(j < bounds.prefix or i - j <= bounds.back for i, j in seen)
    if sees_itself(expr):
        assert all((i, i) in seen for i in range(SIZE))
    for n, m in ((SIZE, SIZE), (5, 9), (9, 4)):
        assert pairs(expr, n, m) == len(visible(expr, n, m)), (text, n, m)


TIGHT = {
    "causal": Extent(low=0, ahead=0),
    "window(4)": Extent(low=-3, high=3, ahead=3),
    "causal and window(4)": Extent(low=0, high=3, ahead=0),
    "causal and (window(4) or sink(2))": Extent(prefix=2, low=0, high=3, ahead=0),
    "causal and blocks(4)": Extent(low=0, high=3, ahead=0),
    "0 <= i - j < 5": Extent(low=0, high=4, ahead=0),
    "j < i": Extent(low=1, ahead=-1),
}


@pytest.mark.parametrize("text", TIGHT)
def test_usual_masks_have_tight_extents(text):
    assert extent(mask(text)) == TIGHT[text]


@pytest.mark.parametrize(("text", "answer"), [
    ("causal", True), ("causal and window(1)", True), ("power", True), ("document", True),
    ("causal and strided(3)", True), ("prefix(2)", True), ("j < i", False), ("sink(3)", False),
    ("all", True), ("causal and document", True),
])  # fmt: skip
def test_which_masks_surely_see_their_own_position(text, answer):
    assert sees_itself(mask(text)) == answer


def test_pairs_of_a_million_tokens_take_no_time_along_the_diagonals():
    n = 1_000_000
    assert pairs(mask("causal"), n, n) == n * (n + 1) // 2
    assert pairs(mask("causal and window(256)"), n, n) == 256 * n - 256 * 255 // 2
    assert pairs(mask("causal"), n, n, heads=8) == 4 * n * (n + 1)


def test_pairs_are_counted_head_by_head():
    expr = mask("causal and (i - j) % (h + 1) == 0")
    expected = sum((i - j) % (h + 1) == 0 for h in range(2) for i in range(9) for j in range(i + 1))
    assert pairs(expr, 9, 9, heads=2) == expected


@pytest.mark.parametrize("text", [
    "window(70) and j % 3 == 0", "window(3) and i % 2 == 0 or sink(2)", "causal and j % 5 == 1",
    "i - j < 9 and j % 2 == 0",
])  # fmt: skip
def test_pairs_of_a_band_are_counted_within_it(text):
    expr = mask(text)
    for n, m in ((150, 90), (90, 150)):
        assert pairs(expr, n, m) == len(visible(expr, n, m)), (n, m)


def test_pairs_of_long_sequences_are_counted_by_tiles(monkeypatch):
    n = 1 << 18
    assert pairs(mask("prefix(4)"), n, n) == n * (n + 1) // 2 + 6
    assert pairs(mask("causal and blocks(512)"), n, n) == n * 513 // 2
    monkeypatch.setattr("headloom.compiler.algebra.counting._CHUNK", 1 << 10)
    draw = random.Random(0)
    for _ in range(20):
        expr = parse_expression(spelled(f"({random_mask(draw)}) and not (i * j == 6)"))
        i, j = np.arange(300)[:, None], np.arange(200)
        seen = np.broadcast_to(numbers(expr, {"i": i, "j": j}), (300, 200))
        assert pairs(expr, 300, 200) == np.sum(seen)


def test_an_extent_leaves_room_for_rounding():
    assert extent(parse_expression("0.1 * (i - j) <= 0.3")).high >= 3  # in float32, 3 is visible
    assert extent(parse_expression("(i - j) / 10 >= 0.3")).low <= 3
    assert extent(parse_expression("(i - j) / 2 <= 4")) == Extent(high=8)


def test_i_and_j_may_matter_through_their_difference_alone():
    for text in ("j <= i", "i + 3 > j", "abs(i - j - 1) % 4 == 0", "doc[i] == doc[j]", "i - j < n"):
        assert of_distance(parse_expression(text)), text
    for text in ("j < 4", "i + j > 3", "i % 4 == j % 4", "keep[j - 1] > 0", "2 * i - j > 0"):
        assert not of_distance(parse_expression(text)), text


def test_what_data_hides_counts_as_visible():
    assert pairs(mask("causal and document"), 9, 9) == 45
    assert pairs(mask("causal and not (doc[i] == doc[j])"), 9, 9) == 45
    assert pairs(mask("causal and not (doc[i] == doc[j] or j < 3)"), 9, 9) == 21


@pytest.mark.parametrize(("text", "line"), [
    ("i - j + 3", (1, -1, 3)), ("2 * (i - 1)", (2, 0, -2)), ("-(j - i)", (1, -1, 0)),
    ("i * j", None), ("i // 2", None), ("i * 0.5", (0.5, 0, 0)),
])  # fmt: skip
def test_linear_forms(text, line):
    assert linear(parse_expression(text)) == line


_WHOLE = ["i", "j", "h", "2", "5", "i - j", "abs(i - j)", "clip(i - j, -3, 3)", "h // 2", "i % 4"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(_WHOLE), min_size=3, max_size=3),
    st.lists(st.sampled_from(["+", "-", "*", "//", "%"]), min_size=2, max_size=2),
    st.sampled_from(["({})", "min({}, 7)", "max({}, 2)", "-({})"]),
)
def test_the_range_of_a_place_holds_all_its_values(parts, ops, around):
    text = around.format(f"({parts[0]} {ops[0]} {parts[1]}) {ops[1]} {parts[2]}")
    expr = fold(parse_expression(text))
    found = bounds(expr, 4)
    if found is None:
        return
    for i in range(7):
        for j in range(7):
            for h in range(4):
                try:
                    value = evaluate(expr, {"i": i, "j": j, "h": h})
                except Exception:  # a division by zero has no value
                    continue
                assert value == int(value)
                assert found[0] <= value <= found[1], (text, found)
