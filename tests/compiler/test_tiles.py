"""Tiles of masks, judged without evaluating them, against evaluating them everywhere."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest

from headloom.compiler.algebra.points import numbers
from headloom.compiler.algebra.tiles import EMPTY, FULL, PARTIAL, BlockList, by_head, classify
from headloom.grammar.parse import parse_expression

STANDARD = {
    "causal": "j <= i",
    "window": "abs(i - j) < {0}",
    "sink": "j < {0}",
    "prefix": "(j < {0} or j <= i)",
    "strided": "(i - j) % {0} == 0",
    "blocks": "i // {0} == j // {0}",
    "power": "(ispow2(i - j) or i == j)",
    "document": "doc[i] == doc[j]",
    "axial": "(i // {0} == j // {0} or i % {0} == j % {0})",
    "grid_window": "(abs(i // {0} - j // {0}) < {1} and abs(i % {0} - j % {0}) < {1})",
    "shifted_window": "((i // {0} + {1}) // 3 == (j // {0} + {1}) // 3"
    " and (i % {0} + {1}) // 3 == (j % {0} + {1}) // 3)",
    "halo": "0 <= j // {0} - i // {0} * {1} + {1} < 3 * {1}",
    "disc": "((i // {0} - j // {0}) ** 2 + (i % {0} - j % {0}) ** 2 <= {1} ** 2)",
    "heads": "(i - j) % (h + 1) == 0",
    "data": "keep[j]",
}
TERMS = ["i", "j", "i - j", "j - i", "i + j", "2 * i - j", "3 * i", "i // {0}", "j % {0}",
         "(i - j) // {0}", "(2 * i - 3 * j) % {0}", "abs(i - j)", "min(i, {0})", "max(j - {0}, 0)",
         "clip(i - j, -{0}, {1})", "i * j", "n - j", "m // {0}", "i / 2", "(i - j) / 4", "j / 3",
         "where(i < {0}, i, j)", "floor(i / {0})", "(i - {0}) ** 2", "h * j",
         "-(i % {0})", "min(j, {0} / 8)"]  # fmt: skip
TILES = [(8, 8), (16, 8), (5, 7), (16, 16), (1, 4), (64, 64), (4, 32)]
INEXACT = ("/ 3", "/ 8", "keep")  # fractions are given room for rounding; data is not known


def random_mask(draw: random.Random, depth: int = 3) -> str:
    """Return the text of a mask over everything the algebra knows, and some that it does not."""
    kind, sizes = draw.random(), [draw.choice([1, 2, 3, 4, 5, 7, 8, 12, 16, 40]) for _ in range(2)]
    if depth and kind < 0.45:
        op = draw.choice(["and", "or"])
        return f"({random_mask(draw, depth - 1)} {op} {random_mask(draw, depth - 1)})"
    if depth and kind < 0.55:
        return f"not ({random_mask(draw, depth - 1)})"
    if kind < 0.78:
        return draw.choice(list(STANDARD.values())).format(*sizes)
    a, b = (draw.choice(TERMS).format(*sizes) for _ in range(2))
    b = draw.choice([b, str(draw.randint(-9, 40)), str(draw.randint(-9, 40) / 2)])
    op = draw.choice(["<", "<=", ">", ">=", "==", "!="])
    if kind < 0.85:
        return f"({draw.randint(-9, 9)} {draw.choice(['<', '<='])} {a} {op} {b})"
    if kind < 0.88:
        return f"where({a} {op} {b}, {random_mask(draw, 0)}, {random_mask(draw, 0)})"
    return draw.choice([f"({a} {op} {b})", f"ispow2({a})"]) if "/" not in a else f"({a} {op} {b})"


def truth(text: str, n: int, m: int, start: int = 0, **more: np.ndarray) -> np.ndarray:
    """Return bool [heads, n, m]."""
    i, j = np.arange(start, start + n)[:, None], np.arange(m)[None, :]
    values: dict[str, object] = {"i": i, "j": j, "n": n, "m": m, "h": np.arange(2)[:, None, None]}
    for name, each in more.items():
        values |= {f"{name}[i]": each[i % len(each)], f"{name}[j]": each[j]}
    seen = np.asarray(numbers(parse_expression(text), values))
    return np.broadcast_to(seen.astype(bool), (2, n, m))


def true_kinds(seen: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Return the kind of each tile of bool [heads, n, m], all heads together."""
    some, every = seen.any(0), seen.all(0)
    kinds = np.zeros((-(-some.shape[0] // tile[0]), -(-some.shape[1] // tile[1])), np.int8)
    for a in range(kinds.shape[0]):
        for b in range(kinds.shape[1]):
            at = np.s_[a * tile[0] : (a + 1) * tile[0], b * tile[1] : (b + 1) * tile[1]]
            kinds[a, b] = FULL if every[at].all() else PARTIAL if some[at].any() else EMPTY
    return kinds


def ids(draw: random.Random, size: int, ordered: bool) -> np.ndarray:
    found = np.array([draw.randint(-1, 6) for _ in range(size)])
    return np.sort(found) if ordered else np.repeat(found, 5)[:size]


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(2, 12))]
)
def test_random_masks_are_never_judged_wrong_and_seldom_vaguely(seed):
    draw = random.Random(seed)
    for _ in range(300):
        text, tile = random_mask(draw), draw.choice(TILES)
        n, m, start = draw.randint(1, 50), draw.randint(1, 60), draw.choice([0, 0, 3, 17])
        ordered = draw.random() < 0.6
        doc, keep = ids(draw, 70, ordered), ids(draw, 70, False) > 2
        found = classify(parse_expression(text), n, m, tile, 2, doc, start)
        answer = true_kinds(truth(text, n, m, start, doc=doc, keep=keep), tile)
        kinds = found.dense()
        assert not np.any((kinds == EMPTY) & (answer != EMPTY)), (text, tile, n, m, start)
        assert not np.any((kinds == FULL) & (answer != FULL)), (text, tile, n, m, start)
        if not any(each in text for each in INEXACT) and (ordered or "doc" not in text):
            assert np.array_equal(kinds, answer), (text, tile, n, m, start)
        check_lists(found, kinds)


def check_lists(found: BlockList, kinds: np.ndarray) -> None:
    """Compare each way of reading a list with the others."""
    assert np.array_equal(found.transposed().dense(), kinds.T)
    again = found.transposed().transposed()
    for name in ("row_ptr", "starts", "stops", "full"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
        assert getattr(again, name).dtype == getattr(found, name).dtype, name
    for kind in (EMPTY, PARTIAL, FULL):
        assert found.count(kind) == np.sum(kinds == kind)
    assert found.density == pytest.approx(np.mean(kinds != EMPTY))
    row_ptr, columns, full = found.tiles()
    for row in range(found.shape[0]):
        runs = list(found.runs(row))
        tiles = [(at, run.full) for run in runs for at in range(run.start, run.stop)]
        at = slice(row_ptr[row], row_ptr[row + 1])
        assert tiles == list(zip(columns[at].tolist(), full[at].tolist(), strict=True))
        assert [at for at, _ in tiles] == np.flatnonzero(kinds[row]).tolist()
        for one, two in pairwise(runs):
            assert one.stop < two.start or one.full != two.full  # as long as they can be


EXACT = ["causal", "window(200)", "window(64)", "sink(4)", "causal and window(256)",
         "causal and (window(252) or sink(4))", "causal and (window(250) or sink(130))",
         "strided(64)", "strided(128)", "strided(300)", "causal and strided(128)",
         "causal and strided(1000)", "blocks(64)", "blocks(512)", "blocks(100)", "prefix(130)",
         "power", "causal and power", "document", "causal and document", "axial(32)", "axial(100)",
         "grid_window(32, 4)", "shifted_window(25, 2)", "halo(32, 4)", "disc(32, 5)",
         "causal and (window(128) or strided(128))", "not window(40) and causal"]  # fmt: skip


def spelled(text: str) -> str:
    """Return a mask with the definitions above in place of their names."""
    for name, body in STANDARD.items():
        call = rf"\b{name}\(([\d, ]+)\)" if "{" in body else rf"\b{name}\b()"
        text = re.sub(call, lambda at, body=body: body.format(*at[1].split(", ")), text)
    return text


@pytest.mark.parametrize("tile", [(128, 128), (64, 128), (128, 48)])
@pytest.mark.parametrize("text", EXACT)
def test_usual_masks_are_judged_exactly(text, tile):
    text, n, m = spelled(text), 1100, 1000
    doc = np.repeat(np.arange(9), [50, 206, 128, 1, 127, 300, 88, 100, 100])
    found = classify(parse_expression(text), n, m, tile, documents=doc)
    assert np.array_equal(found.dense(), true_kinds(truth(text, n, m, doc=doc), tile))


def kinds(text: str, n: int = 300, tile: tuple[int, int] = (16, 16), **more: object) -> np.ndarray:
    return classify(parse_expression(spelled(text)), n, n, tile, **more).dense()


@pytest.mark.parametrize(("one", "two"), [("causal", "window(40)"), ("power", "blocks(24)"),
                                          ("strided(7)", "causal"), ("axial(8)", "sink(9)"),
                                          ])  # fmt: skip
def test_identities_of_logic(one, two):
    one, two = f"({spelled(one)})", f"({spelled(two)})"
    both, none = kinds(f"{one} and {two}"), kinds(f"not ({one} or {two})")
    assert np.array_equal(kinds(f"not {one}"), 2 - kinds(one))
    assert np.array_equal(kinds(f"not not {one}"), kinds(one))
    assert np.array_equal(both, kinds(f"{two} and {one}"))
    assert np.array_equal(none, kinds(f"not {one} and not {two}"))
    assert np.array_equal(both == FULL, (kinds(one) == FULL) & (kinds(two) == FULL))
    assert np.array_equal(kinds(f"({one} and {two}) or {one}"), kinds(one))
    assert np.all(kinds("true") == FULL)
    assert np.all(kinds("false") == EMPTY)


def test_runs_make_causal_proportional_to_its_rows():
    n = 1 << 20
    found = classify(parse_expression("j <= i"), n, n)
    assert len(found.starts) == 2 * 8192 - 1
    assert [*found.runs(5)] == [(0, 5, True), (5, 6, False)]
    assert (found.count(FULL), found.count(PARTIAL)) == (8192 * 8191 // 2, 8192)
    assert [*found.transposed().runs(5)] == [(5, 6, False), (6, 8192, True)]


def test_strides_are_one_run_a_row_however_long_the_sequence():
    found = classify(parse_expression("j <= i and (i - j) % 64 == 0"), 1 << 20, 1 << 20)
    assert len(found.starts) == 8192
    assert found.count(PARTIAL) == 8192 * 8193 // 2


def test_heads_apart_and_together():
    mask = parse_expression("0 <= i - j < 64 * (h + 1)")
    apart = by_head(mask, 512, 512, (64, 64), heads=3)
    for h, each in enumerate(apart):
        alone = classify(parse_expression(f"0 <= i - j < {64 * (h + 1)}"), 512, 512, (64, 64))
        assert np.array_equal(each.dense(), alone.dense())
    stack = np.stack([each.dense() for each in apart])
    together = classify(mask, 512, 512, (64, 64), heads=3).dense()
    assert np.array_equal(together == EMPTY, (stack == EMPTY).all(0))
    assert np.array_equal(together == FULL, (stack == FULL).all(0))
    same = by_head(parse_expression("j <= i"), 64, 64, heads=2)
    assert same[0] is same[1]


def test_any_number_of_heads_have_in_common_what_does_not_read_h():
    found = kinds("j <= i and (i - j) % (h + 1) == 0")
    assert np.array_equal(found != EMPTY, kinds("causal") != EMPTY)
    assert not np.any(found == FULL)


def test_data_is_partial_and_takes_no_search():
    found = classify(parse_expression("j <= i and keep[j]"), 1 << 20, 1 << 20)
    assert found.count(FULL) == 0
    assert found.count(PARTIAL) == 8192 * 8193 // 2
    assert len(found.starts) == 8192
    assert np.array_equal(kinds("j <= i and doc[i] == doc[j]"), np.minimum(kinds("causal"), 1))
    assert np.array_equal(kinds("j <= i or keep[j]") == FULL, kinds("causal") == FULL)


@pytest.mark.parametrize("text", ["sqrt(i - j) >= 0", "i % (j - 3) == 0", "1 / (i - j) < 2",
                                  "2 ** i > j", "i ** 7 * j ** 7 > 4", "tab[h, i] < 3",
                                  ])  # fmt: skip
def test_what_has_no_bounds_is_partial(text):
    assert np.all(kinds(text) == PARTIAL)


def test_patience_ends_and_what_is_left_is_partial(monkeypatch):
    monkeypatch.setattr("headloom.compiler.algebra.tiles._PATIENCE", 1 << 16)
    text = "i * j % 7 == 3"  # nothing is known of the residues of products
    found = classify(parse_expression(f"j <= i and {text}"), 1 << 20, 1 << 20)
    assert found.count(FULL) == 0
    assert found.count(PARTIAL) >= 8192 * 8191 // 2
    assert np.array_equal(kinds(text), true_kinds(truth(text, 300, 300), (16, 16)))


def test_documents_of_torch_and_in_any_order():
    torch = pytest.importorskip("torch")
    doc = np.array([3, 1, 2, 3]).repeat(64)
    found = kinds("doc[i] == doc[j]", 256, (32, 64), documents=torch.from_numpy(doc))
    assert np.array_equal(found, true_kinds((doc[:, None] == doc)[None], (32, 64)))
    ordered = kinds("doc[i] <= doc[j] and doc[j] != 1", 256, documents=np.sort(doc))
    ids = np.sort(doc)
    assert np.array_equal(
        ordered, true_kinds(((ids[:, None] <= ids) & (ids != 1)[None, :])[None], (16, 16))
    )


def test_what_cannot_be_classified_is_refused():
    mask = parse_expression("doc[i] == doc[j]")
    with pytest.raises(ValueError, match=r"documents of shape \(9,\) do not cover 10 tokens"):
        classify(mask, 10, 10, documents=np.zeros(9, int))
    with pytest.raises(ValueError, match="nothing to classify in 0 × 10"):
        classify(mask, 0, 10)
