"""Which tiles of queries × keys a mask leaves empty, fills, or cuts through.

    causal and window(256), tiles of 128 × 128        0 │ ◪
                                                      1 │ ■ ◪
    runs(3): [1, 2) partial, [2, 3) full,             2 │ ◪ ■ ◪
             [3, 4) partial                           3 │   ◪ ■ ◪

The mask is never evaluated at n × m points. Squares of 2**k tiles are judged as one by
`proofs`, the undecided ones cut in four, and a tile that is undecided still is cut further,
as far as `_PATIENCE` goes; what cannot be proved is partial, which is slow and never wrong.
A row keeps runs of equal tiles and not the tiles, so that `causal` takes two runs a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike

from ...grammar.expr import fold, names, number, substitute
from ...grammar.syntax import Expr
from .intervals import Array, Value
from .proofs import Prover, Rects, Segments, both, compares_ids_alone, one_of


class Kind(IntEnum):
    """What a tile is; a kernel skips EMPTY and masks only PARTIAL."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


EMPTY, PARTIAL, FULL = Kind.EMPTY, Kind.PARTIAL, Kind.FULL
_OPEN = 3  # not decided yet
_CHUNK = 1 << 15  # rectangles judged at once: what fits a cache
_WIDEST = 1 << 18  # pieces of open tiles looked at in one step
_PATIENCE = 1 << 22  # rectangles judged in all, then again pieces; what is left is partial


class Run(NamedTuple):
    """Key tiles from `start` up to `stop`, all FULL or all PARTIAL."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class BlockList:
    """The kept tiles of a mask: the runs of row r are row_ptr[r] up to row_ptr[r + 1].

    Runs of a row are sorted, apart, and as long as they can be. A kernel walks them as ranges,
    or takes the tiles one by one from `tiles`.
    """

    n: int  # queries
    m: int  # keys
    tile: tuple[int, int]  # queries × keys
    row_ptr: Array  # int64 [rows + 1]
    starts: Array  # int32 [runs]
    stops: Array  # int32 [runs]
    full: Array  # bool [runs]

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns of tiles there are."""
        return -(-self.n // self.tile[0]), -(-self.m // self.tile[1])

    @cached_property
    def _row_of(self) -> Array:
        return np.repeat(np.arange(self.shape[0]), np.diff(self.row_ptr))

    def runs(self, row: int) -> Iterator[Run]:
        """Yield the runs of a row of tiles."""
        for at in range(self.row_ptr[row], self.row_ptr[row + 1]):
            yield Run(int(self.starts[at]), int(self.stops[at]), bool(self.full[at]))

    def count(self, kind: Kind) -> int:
        """Return how many tiles are of a kind."""
        lengths = self.stops.astype(np.int64) - self.starts
        if kind == EMPTY:
            return self.shape[0] * self.shape[1] - int(lengths.sum())
        return int(lengths[self.full == (kind == FULL)].sum())

    @property
    def density(self) -> float:
        """Return the share of tiles that are kept, of all."""
        tiles = self.shape[0] * self.shape[1]
        return (tiles - self.count(EMPTY)) / tiles if tiles else 0.0

    def tiles(self) -> tuple[Array, Array, Array]:
        """Return the kept tiles one by one: row_ptr [rows + 1], columns and full [tiles]."""
        at, columns = _spread(self.starts, self.stops)
        counts = np.bincount(self._row_of[at], minlength=self.shape[0])
        row_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return row_ptr, columns.astype(np.int32), self.full[at]

    def dense(self) -> Array:
        """Return the kind of every tile, int8 [rows, columns]: for pictures and tests."""
        kinds = np.zeros(self.shape, np.int8)
        at, columns = _spread(self.starts, self.stops)
        kinds[self._row_of[at], columns] = np.where(self.full[at], FULL, PARTIAL)
        return kinds

    def transposed(self) -> BlockList:
        """Return the query tiles of each key tile, as the gradients of k and v need them.

        Nothing is unrolled: a column's run starts or stops where a row differs from the one
        above, and those places are found from the ends of the runs.
        """
        pieces = []
        for full in (False, True):
            one = self.full == full
            rows, width = self._row_of[one], self.shape[1] + 1
            ends = np.concatenate([self.starts[one], self.stops[one]]).astype(np.int64)
            place = np.concatenate([rows, rows]) * width + ends
            sign = np.repeat([1, -1], len(rows))
            place, at = np.unique(np.concatenate([place, place + width]), return_inverse=True)
            change = np.bincount(at, np.concatenate([sign, -sign]), len(place)).cumsum()
            row, column = place // width, place % width
            begun, ended = (_columns(row, column, change == way) for way in (1, -1))
            pieces.append((begun[0], begun[1], ended[1], np.full(len(begun[0]), full)))
        column, start, stop, flags = (np.concatenate(each) for each in zip(*pieces, strict=True))
        return _packed(self.m, self.n, self.tile[::-1], column, start, stop, flags)


def _columns(row: Array, column: Array, changed: Array) -> tuple[Array, Array]:
    """Return (column, row) of each change from one place to the next, by column, then row."""
    at = np.flatnonzero(changed)
    which, columns = _spread(column[at], column[at + 1]) if len(at) else (at, at)
    rows = row[at][which]
    order = np.lexsort((rows, columns))
    return columns[order], rows[order]


def _spread(starts: Array, stops: Array) -> tuple[Array, Array]:
    """Return every number of some ranges, with the index of its range."""
    lengths = (stops - starts).astype(np.int64)
    at = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    return at, np.arange(len(at)) - before[at] + starts[at]


def _packed(
    n: int, m: int, tile: tuple[int, int], row: Array, start: Array, stop: Array, full: Array
) -> BlockList:
    """Sort pieces of runs into rows and join those that touch."""
    rows, width = -(-n // tile[0]), -(-m // tile[1])
    order = np.argsort(row.astype(np.int64) * width + start, kind="stable")
    row, start, stop, full = row[order], start[order], stop[order], full[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (start[1:] != stop[:-1]) | (full[1:] != full[:-1])
    last = np.append(first[1:], True) if len(row) else first
    row_ptr = np.searchsorted(row[first], np.arange(rows + 1)).astype(np.int64)
    return BlockList(
        n, m, tile, row_ptr, start[first].astype(np.int32), stop[last].astype(np.int32), full[first]
    )


# ── classification ───────────────────────────────────────────────────────────────────────


def classify(
    mask: Expr,
    n: int,
    m: int,
    tile: tuple[int, int] = (128, 128),
    heads: int | None = None,
    documents: ArrayLike | None = None,
    start: int = 0,
) -> BlockList:
    """Return the tiles that n queries keep of m keys.

    A mask that reads `h` gives what all heads have in common: FULL where every head sees
    everything, EMPTY where none sees anything; of how many heads is said by `heads`, and None
    stands for any number (`by_head` keeps them apart). `documents` are the segment ids of one
    sequence, [n] or longer, sorted or not; without them what reads `doc` is PARTIAL, as is
    what reads other data. `start` is the position of the first query (a chunk of a prefill).

    Raises ValueError where the documents are too few.
    """
    if min(n, m, *tile) < 1:
        raise ValueError(f"there is nothing to classify in {n} × {m} by tiles of {tile}")
    ids = None if documents is None else np.asarray(documents)
    if ids is not None and (ids.ndim != 1 or len(ids) < max(start + n, m)):
        raise ValueError(f"documents of shape {ids.shape} do not cover {max(start + n, m)} tokens")
    mask = fold(substitute(mask, {"n": number(n), "m": number(m)}))
    masks = [mask]
    if "h" in names(mask) and heads is not None:
        masks = list({fold(substitute(mask, {"h": number(h)})): None for h in range(heads)})
    grid = _Grid(n, m, tile, start)
    unit = max(16, int(np.gcd(*tile)))
    segments = None if ids is None else Segments(ids, unit, compares_ids_alone(mask))
    return _descend(_Judge(masks, grid, segments), grid)


def by_head(
    mask: Expr,
    n: int,
    m: int,
    tile: tuple[int, int] = (128, 128),
    heads: int = 1,
    documents: ArrayLike | None = None,
    start: int = 0,
) -> tuple[BlockList, ...]:
    """Return a list of tiles for each head; heads with the same mask share one."""
    found: dict[Expr, BlockList] = {}
    masks = [fold(substitute(mask, {"h": number(h)})) for h in range(heads)]
    for each in dict.fromkeys(masks):
        found[each] = classify(each, n, m, tile, documents=documents, start=start)
    return tuple(found[each] for each in masks)


@dataclass(frozen=True, slots=True)
class _Grid:
    n: int
    m: int
    tile: tuple[int, int]
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.n // self.tile[0]), -(-self.m // self.tile[1])

    def squares(self, side: int, row: Array, column: Array) -> Rects:
        """Return squares of side × side tiles, cut off at the ends."""
        edges = []
        for at, tile, size in zip((row, column), self.tile, (self.n, self.m), strict=True):
            low = at * float(tile * side)
            edges += [low, np.minimum(low + (tile * side - 1), size - 1)]
        return self.rects(*edges)

    def rects(self, top: Array, bottom: Array, left: Array, right: Array) -> Rects:
        """Return rectangles of whole tiles, or within one; both ends belong to them."""
        i = _places(top, bottom, self.tile[0], self.n, "i")
        i = Value(i.low + self.start, i.high + self.start, 1, i.run, i.ends, i.reads)
        return {"i": i, "j": _places(left, right, self.tile[1], self.m, "j")}


def _places(low: Array, high: Array, tile: int, size: int, name: str) -> Value:
    """Return positions; a rectangle of many tiles has only as many as its last tile *in each*."""
    length = high - low + 1
    rest = size % tile or tile
    single = (length <= tile) & (np.floor(low / tile) == np.floor(high / tile))
    least = np.where(high == size - 1, rest, tile)
    return Value(low, high, 1, np.where(single, length, least), single, frozenset({name}))


@final
class _Judge:
    """Decides rectangles from two bounds on what is visible: what reads data taken for true,
    in any head, and taken for false, in every head.
    """

    def __init__(self, masks: list[Expr], grid: _Grid, segments: Segments | None) -> None:
        whole = [np.array([each - 1.0]) for each in (1, grid.n, 1, grid.m)]
        domain = grid.rects(whole[0], whole[1], whole[2], whole[3])
        self.upper = [Prover(each, domain, segments, optimistic=True) for each in masks]
        self.lower = self.upper
        self.left = _PATIENCE
        if any(each.blind for each in self.upper):
            self.lower = [Prover(each, domain, segments, optimistic=False) for each in masks]

    def facts(self, at: Rects) -> tuple[Array, Array, Array, Array]:
        """Return, for each rectangle: may see, may hide, each tile sees, each tile hides."""
        self.left -= len(at["i"].low)
        over = [each.prove(at) for each in self.upper]
        under = over if self.lower is self.upper else [each.prove(at) for each in self.lower]
        most, least = over[0], under[0]
        for a, b in zip(over[1:], under[1:], strict=True):
            most, least = one_of(most, a), both(least, b)
        found = (most.maybe_true, least.maybe_false, most.has_true, least.has_false)
        sees, hides, seen, hidden = (np.broadcast_to(each, at["i"].low.shape) for each in found)
        return sees, hides, seen | ~hides, hidden | ~sees

    def kinds(self, at: Rects) -> Array:
        sees, hides, has_seen, has_hidden = self.facts(at)
        kind = np.where(has_seen & has_hidden, np.int8(PARTIAL), np.int8(_OPEN))
        return np.where(~sees, np.int8(EMPTY), np.where(~hides, np.int8(FULL), kind))


def _descend(judge: _Judge, grid: _Grid) -> BlockList:
    """Judge squares of tiles, and cut the undecided ones in four."""
    rows, columns = grid.shape
    side = 1
    while max(rows, columns) > 8 * side:  # the largest squares are seldom decided
        side *= 2
    shape = -(-rows // side), -(-columns // side)
    row, column = (each.ravel() for each in np.indices(shape))
    queue, kept, open_ = deque([(side, row, column)]), [], [(row[:0], column[:0])]
    left = _PATIENCE
    while queue:  # large squares first, so that patience ends with the small ones
        side, row, column = queue.popleft()
        kinds = judge.kinds(grid.squares(side, row, column))
        at = kinds == _OPEN
        left -= 4 * int(at.sum())
        if left < 0 and side > 1:
            kinds[at] = PARTIAL
        for kind in (PARTIAL, FULL):
            at = kinds == kind
            kept.append(_pieces(grid, side, row[at], column[at], np.full(at.sum(), kind == FULL)))
        at = kinds == _OPEN
        if side == 1:
            open_.append((row[at], column[at]))
        else:
            queue += _chunks(side // 2, *_halved(grid, side // 2, row[at], column[at]))
    judge.left = _PATIENCE
    for _, row, column in _chunks(1, *(np.concatenate(each) for each in zip(*open_, strict=True))):
        kinds = _looked_into(judge, grid, row, column)
        at = kinds != EMPTY
        kept.append(_pieces(grid, 1, row[at], column[at], kinds[at] == FULL))
    pieces: Any = (np.concatenate(each) for each in zip(*kept, strict=True))
    return _packed(grid.n, grid.m, grid.tile, *pieces)


def _halved(grid: _Grid, side: int, row: Array, column: Array) -> tuple[Array, Array]:
    """Cut squares into four of this side; what lies beyond the last tile is dropped."""
    rows, columns = grid.shape
    row = np.concatenate([2 * row + step for step in (0, 0, 1, 1)])
    column = np.concatenate([2 * column + step for step in (0, 1, 0, 1)])
    inside = (row * side < rows) & (column * side < columns)
    return row[inside], column[inside]


def _chunks(side: int, row: Array, column: Array) -> list[tuple[int, Array, Array]]:
    return [
        (side, row[at : at + _CHUNK], column[at : at + _CHUNK]) for at in range(0, len(row), _CHUNK)
    ]


def _pieces(
    grid: _Grid, side: int, row: Array, column: Array, full: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the rows of some squares: row, first column, column behind the last, full."""
    rows, columns = grid.shape
    at, row = _spread(row * side, np.minimum((row + 1) * side, rows))
    start = column[at] * side
    return row, start, np.minimum(start + side, columns), full[at]


def _looked_into(judge: _Judge, grid: _Grid, row: Array, column: Array) -> Array:
    """Return the kinds of open tiles: cut them until each shows both kinds of pairs, or is one.

    Some pieces of `causal and (window(252) or sink(4))` are full by the window and
    others by the sink: together full, which no single comparison can say of the tile.
    """
    at = grid.squares(1, row, column)
    edges = [at["i"].low - grid.start, at["i"].high - grid.start, at["j"].low, at["j"].high]
    owner = np.arange(len(row))
    sees, hides = np.zeros(len(row), bool), np.zeros(len(row), bool)
    limit = max(_WIDEST, 4 * len(row))
    while len(owner):
        maybe_seen, maybe_hidden, has_seen, has_hidden = judge.facts(grid.rects(*edges))
        sees[owner[has_seen]] = True
        hides[owner[has_hidden]] = True
        left = maybe_seen & maybe_hidden & ~(sees & hides)[owner]
        owner, edges, left = owner[left], [each[left] for each in edges], left[left]
        for i, j in ((0, 2), (1, 3)):  # two corners: along a diagonal, where distances are equal
            corner = grid.rects(edges[i], edges[i], edges[j], edges[j])
            _, _, has_seen, has_hidden = judge.facts(corner)
            sees[owner[has_seen]] = True
            hides[owner[has_hidden]] = True
        left &= ~(sees & hides)[owner]
        point = (edges[0] == edges[1]) & (edges[2] == edges[3])
        enough = judge.left < 0 or 4 * np.sum(left) > limit
        stuck = owner[left] if enough else owner[left & point]
        sees[stuck] = hides[stuck] = True  # partial: a point nothing is known of, or too many
        left &= ~(sees & hides)[owner]
        owner, edges = _quartered(owner[left], *(each[left] for each in edges))
    return np.where(sees & hides, PARTIAL, np.where(sees, FULL, EMPTY))


def _quartered(
    owner: Array, top: Array, bottom: Array, left: Array, right: Array
) -> tuple[Array, list[Array]]:
    """Cut rectangles in four; one that is a single row or column, in two."""
    low, side = np.floor((top + bottom) / 2), np.floor((left + right) / 2)
    pieces = [
        (top, low, left, side),
        (top, low, side + 1, right),
        (low + 1, bottom, left, side),
        (low + 1, bottom, side + 1, right),
    ]
    edges = [np.concatenate(each) for each in zip(*pieces, strict=True)]
    there = (edges[0] <= edges[1]) & (edges[2] <= edges[3])
    return np.tile(owner, 4)[there], [each[there] for each in edges]
