"""How many pairs a mask lets through, exactly, for the cost of a block.

    pairs(causal, 4096, 4096)  →  8,390,656

Masks in which i and j matter only through i - j are counted along the diagonals. Of others,
tiles that are full or empty count as a whole, and only those that are cut through are looked
into.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ...grammar.expr import TRUE, fold, names, number, substitute
from ...grammar.syntax import Expr
from .masks import bound, is_known, of_distance
from .points import visible
from .tiles import BlockList, classify

_CHUNK = 1 << 22  # points evaluated at once


@lru_cache(maxsize=1024)
def pairs(mask: Expr, n: int, m: int, heads: int = 1) -> int:
    """Return how many (head, query, key) triples are visible; what depends on data counts."""
    mask = bound(mask, is_known, most=True)
    if "h" in names(mask):
        return sum(pairs(fold(substitute(mask, {"h": number(h)})), n, m) for h in range(heads))
    if mask == TRUE:
        return heads * n * m
    if of_distance(mask):
        return heads * _along_diagonals(mask, n, m)
    if n * m <= _CHUNK:
        return heads * int(visible(mask, np.arange(n), np.arange(m), n, m).sum())
    return heads * _by_tiles(mask, classify(mask, n, m))


def _along_diagonals(mask: Expr, n: int, m: int) -> int:
    away = np.arange(-(m - 1), n)
    by_distance = substitute(mask, {"j": number(0)})
    seen = visible(by_distance, away, np.zeros(1, np.int64), n, m)[0, 0, :, 0]
    length = np.minimum(n, m + away) - np.maximum(0, away)
    return int(length[seen].sum())


def _by_tiles(mask: Expr, found: BlockList) -> int:
    """Add up full tiles, and the visible pairs of those that are partial."""
    (height, width), total = found.tile, 0
    for row in range(found.shape[0]):
        i = np.arange(row * height, min(found.n, (row + 1) * height))
        for run in found.runs(row):
            start, stop = run.start * width, min(found.m, run.stop * width)
            if run.full:
                total += len(i) * (stop - start)
                continue
            for at in range(start, stop, step := _CHUNK // height):
                j = np.arange(at, min(stop, at + step))
                total += int(visible(mask, i, j, found.n, found.m).sum())
    return total
