"""What a mask is said to be, against evaluating it everywhere."""

from __future__ import annotations

import random

import numpy as np
import pytest

from headloom.compiler.algebra.counting import numbers
from headloom.compiler.algebra.masks import Extent
from headloom.compiler.algebra.structure import (
    Band,
    Blocks,
    Data,
    Distance,
    Documents,
    Heads,
    Structure,
    Tiles,
    structure,
)
from headloom.grammar.expr import fold, names, number, substitute
from headloom.grammar.parse import parse_expression
from headloom.grammar.syntax import Expr

from . import test_masks, test_tiles

SIZE = 40
CAUSAL = Band(back=None, ahead=0)
SPELLINGS = {
    CAUSAL: ["j <= i", "not (j > i)", "i - j >= 0", "not (i < j)", "i + 1 > j", "0 <= 2 * (i - j)",
             "abs(i - j) == i - j", "i - j >= 0 or i - j > 7", "max(i - j, 0) == i - j"],
    Band(back=255, ahead=0): ["0 <= i - j < 256", "i - j < 256 and j <= i", "i - 256 < j <= i",
                              "j <= i and abs(i - j) < 256", "not (j > i or i - j >= 256)",
                              "0 <= i - j < 100 or 100 <= i - j <= 255"],
    Band(back=None, ahead=None): ["true", "j <= i or j > i", "abs(i - j) >= 0"],
    Band(back=3, ahead=3): ["abs(i - j) < 4", "abs(j - i) <= 3.5"],
    Band(back=None, ahead=-8): ["i - j > 7", "j + 8 <= i"],
    Band(back=-1, ahead=5): ["0 < j - i <= 5"],
    Band(255, 0, 4): ["j <= i and (abs(i - j) < 256 or j < 4)",
                      "0 <= i - j < 256 or j < 4 and j <= i",
                      "where(i >= j, i - j < 256 or j < 4, false)"],
    Band(None, 0, 4, prefix_ahead=True): ["j < 4 or j <= i", "not (j > 3 and j > i)"],
    Band(5, -2, 3, prefix_ahead=True): ["j < 3 or 2 <= i - j <= 5"],
    Band(4, 4, 9, prefix_ahead=True): ["j < 9 or abs(i - j) < 5"],
    Band(4, 4, 9): ["i - j > -5 and (j < 9 or i - j < 5)"],
    Band(None, 7): ["j <= i + 7 or j < 8", "j <= i + 7"],  # the band holds such a prefix
    Band(back=-1, ahead=0): ["false", "j > i and j < i"],
    Band(-1, 0, 4, prefix_ahead=True): ["j < 4"],
    Band(-1, 0, 4): ["j <= i and j < 4"],
    Blocks(64, 0, 0): ["i // 64 == j // 64", "not (i // 64 != j // 64)", "j - j % 64 == i - i % 64",
                       "(i + 64) // 64 == j // 64 + 1"],
    Blocks(64, 0, 0, causal=True): ["i // 64 == j // 64 and j <= i", "i - i % 64 <= j <= i"],
    Blocks(64, None, 0): ["j < (i // 64 + 1) * 64", "j // 64 <= i // 64", "j < i - i % 64 + 64"],
    Blocks(8, 2, 1): ["-1 <= i // 8 - j // 8 <= 2"],
    Blocks(8, 2, 0, causal=True): ["j <= i and i // 8 - j // 8 < 3"],
    Blocks(8, None, -1): ["j // 8 < i // 8"],
    Documents(CAUSAL): ["j <= i and doc[i] == doc[j]", "doc[j] == doc[i] and j <= i"],
    Documents(Band(None, None)): ["doc[i] == doc[j]"],
    Heads((Band(15, 0), Band(31, 0))): ["0 <= i - j < 16 * (h + 1)"],
    Documents(Heads((CAUSAL, Band(None, None)))): ["doc[i] == doc[j] and (h > 0 or j <= i)"],
    Band(None, 0, 0): ["j <= i and h < 9"],  # alike in every head
    Distance(Extent(low=0, high=63, ahead=0)): ["(i - j) % 4 == 0 and 0 <= i - j < 64"],
    Distance(Extent(low=0, ahead=0)): ["ispow2(i - j) or i == j", "j <= i and i - j != 3"],
    Tiles(Extent()): ["i % 8 == j % 8", "i < 5", "i * j < 9"],
    Tiles(Extent(low=0, ahead=0)): ["j <= i and i - j < n // 2", "j <= i and j != 7"],
    Data(Extent(low=0, ahead=0)): ["j <= i and keep[j] > 0", "j <= i and i - j < span",
                                   "j <= i and (doc[i] == doc[j] or j <= i)"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"), [(text, each) for each, texts in SPELLINGS.items() for text in texts]
)
def test_a_mask_is_what_it_is_however_it_is_written(text: str, answer: Structure) -> None:
    assert structure(fold(parse_expression(text)), 2) == answer


def seen(mask: Expr) -> np.ndarray:
    i, j = np.arange(SIZE)[:, None], np.arange(SIZE)[None, :]
    found = numbers(mask, {"i": i, "j": j, "n": SIZE, "m": SIZE})
    return np.broadcast_to(found, (SIZE, SIZE)).astype(bool)


def said(what: Band | Blocks) -> np.ndarray:
    """Return the pairs that a structure says are visible, by its definition."""
    i, j = np.arange(SIZE)[:, None], np.arange(SIZE)[None, :]
    size = what.size if isinstance(what, Blocks) else 1
    away = i // size - j // size
    near = (away <= (SIZE if what.back is None else what.back)) & (
        away >= (-SIZE if what.ahead is None else -what.ahead)
    )
    if isinstance(what, Blocks):
        return near & ((j <= i) | (not what.causal))
    prefix = np.broadcast_to(j < what.prefix, near.shape)
    if not what.prefix_ahead and what.ahead is not None:
        prefix = prefix & (away >= -what.ahead)
    return near | prefix


def check(mask: Expr, what: Structure) -> None:
    """Compare a structure with its mask at every pair, of both heads."""
    if "h" in names(mask):
        each = what.each if isinstance(what, Heads) else (what, what)
        for h, one in enumerate(each):
            check(fold(substitute(mask, {"h": number(h)})), one)
    elif isinstance(what, Band | Blocks):
        assert np.array_equal(seen(mask), said(what)), what
    elif isinstance(what, Distance):
        assert np.array_equal(seen(mask)[1:, 1:], seen(mask)[:-1, :-1])


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(1, 40))]
)
def test_every_structure_of_a_drawn_mask_is_exact(seed: int) -> None:
    draw = random.Random(seed)
    kinds = set()
    for count in range(80):
        text = (test_masks if count % 2 else test_tiles).random_mask(draw, depth=2)
        mask = fold(parse_expression(test_tiles.spelled(text)))
        found = structure(mask, 2)
        kinds.add(type(found))
        check(mask, found)
    assert kinds >= {Band, Distance, Tiles, Data}


@pytest.mark.parametrize("seed", range(4))
def test_drawn_bands_and_blocks_are_recognised(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(12):
        size, prefix = draw.choice([2, 3, 8]), draw.choice([0, 0, 1, 5])
        back, ahead = draw.choice([None, 0, 3, 11]), draw.choice([None, -2, 0, 2])
        band, blocks = [], []
        for edge, sign in ((back, 1), (ahead, -1)):
            if edge is not None:
                band.append(f"{sign} * (i - j) <= {edge}")
                blocks.append(f"not {sign} * (i // {size}) > {edge} + {sign} * (j // {size})")
        near = " and ".join(band) or "true"
        text = draw.choice([f"{near} or j < {prefix}", f"not (j >= {prefix} and not ({near}))"])
        mask = fold(parse_expression(text))
        found = structure(mask, 1)
        assert isinstance(found, Band), text
        check(mask, found)
        if blocks and (back, ahead) != (0, -2):  # which shows nothing
            mask = fold(parse_expression(" and ".join(draw.sample(blocks, len(blocks)))))
            found = structure(mask, 1)
            assert isinstance(found, Blocks), mask
            assert (found.size, found.back, found.ahead) == (size, back, ahead)
            check(mask, found)
