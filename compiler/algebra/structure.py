"""What a mask is, as data that a lowering reads: a band, blocks, a set of distances, or less.

    j <= i, not (j > i), i - j >= 0                  Band(back=None, ahead=0)
    0 <= i - j < 256, causal and window(256)         Band(back=255, ahead=0)
    causal and (window(256) or sink(4))              Band(back=255, ahead=0, prefix=4)
    j < 4 or j <= i                                  Band(None, 0, 4, prefix_ahead=True)
    i // 64 == j // 64 and j <= i                    Blocks(64, back=0, ahead=0, causal=True)

How a mask is written does not matter. The edges of a band are looked for along a line of
pairs, and what they claim is proved (`proofs`) over the whole plane of distances and keys, or
over all pairs of blocks: for every position below 2**32, which no sequence passes. What cannot
be proved is one of the looser kinds, which say less and are never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import numpy as np

from ...grammar.expr import fold, names, number, rebuild, substitute
from ...grammar.syntax import Binary, Expr, Name, Number, walk
from ..model import without_document
from .intervals import Value
from .masks import Extent, affine, extent, is_known, of_distance
from .proofs import Prover

FAR = 2**32 - 1  # no position lies beyond it
_MOST = 64  # pieces of a line that are open at once; a mask of more has no edges to speak of


@dataclass(frozen=True, slots=True)
class Band:
    """Exactly the keys with -ahead <= i - j <= back, and those of a prefix; None: unbounded.

    A key j < prefix is visible where i - j >= -ahead, however far back it lies, and with
    `prefix_ahead` also to all earlier queries. Fields are the least that say it: no prefix
    where the band holds it, no `prefix_ahead` where it adds no pair. Nothing beside a prefix
    is back=-1, ahead=0.

        causal and (window(256) or sink(4))     Band(back=255, ahead=0, prefix=4)
    """

    back: int | None
    ahead: int | None
    prefix: int = 0
    prefix_ahead: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """Exactly the keys with -ahead <= i // size - j // size <= back; None: unbounded.

    With `causal`, which only comes with ahead=0, those of them up to the query.

        i // 64 == j // 64                      Blocks(64, back=0, ahead=0)
        i // 64 == j // 64 and j <= i           Blocks(64, back=0, ahead=0, causal=True)
        j < (i // 64 + 1) * 64                  Blocks(64, back=None, ahead=0)
    """

    size: int
    back: int | None
    ahead: int | None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Distance:
    """Whether a key is visible depends on i - j alone, within an extent.

    (i - j) % 4 == 0 and 0 <= i - j < 64        Distance(Extent(low=0, high=63, ahead=0))
    """

    extent: Extent


@dataclass(frozen=True, slots=True)
class Heads:
    """One structure for each head, and not all the same.

    0 <= i - j < 16 * (h + 1), of 2 heads       Heads((Band(15, 0), Band(31, 0)))
    """

    each: tuple[Structure, ...]


@dataclass(frozen=True, slots=True)
class Documents:
    """Exactly the keys of the query's own document that `inner` shows.

    causal and document                         Documents(Band(back=None, ahead=0))
    """

    inner: Structure


@dataclass(frozen=True, slots=True)
class Tiles:
    """Anything else that is known before a call, at most its lengths: `tiles` can classify it.

    i % 8 == j % 8                              Tiles(Extent())
    """

    extent: Extent


@dataclass(frozen=True, slots=True)
class Data:
    """It reads streams or parameters; nothing is visible beyond the extent.

    causal and keep[j] > 0                      Data(Extent(low=0, ahead=0))
    """

    extent: Extent


Structure = Band | Blocks | Distance | Heads | Documents | Tiles | Data


MOST_SIZES = 8  # of blocks, that are tried


@lru_cache(maxsize=1024)
def structure(mask: Expr, heads: int) -> Structure:
    """Return what a checked mask is, for so many heads."""
    rest = without_document(mask)
    if rest != mask:
        return Documents(structure(rest, heads))
    if "h" in names(mask):
        each = [structure(fold(substitute(mask, {"h": number(h)})), 1) for h in range(heads)]
        return each[0] if len(set(each)) == 1 else Heads(tuple(each))
    if not is_known(mask):
        return Data(extent(mask))
    if not names(mask) & {"n", "m"}:
        found = _band(mask) or _blocks(mask)
        if found is not None:
            return found
        if of_distance(mask):
            return Distance(extent(mask))
    return Tiles(extent(mask))


# ── proofs along a line ──────────────────────────────────────────────────────────────────

Ends = tuple[int, int]  # both belong to it
Box = Mapping[str, Ends]


@final
class _Judge:
    """Says where a mask shows everything, or nothing, over boxes of some variables."""

    def __init__(self, mask: Expr, domain: Box) -> None:
        whole = {name: _value(name, *ends) for name, ends in domain.items()}
        self.upper = self.lower = Prover(mask, whole, None, optimistic=True)
        if self.upper.blind:
            self.lower = Prover(mask, whole, None, optimistic=False)

    def runs(self, box: Box, along: str) -> list[tuple[int, int, bool]] | None:
        """Cut a box along one variable into runs all or none of which is visible, in order.

        None where it does not come apart in few pieces.
        """
        low, high = (np.array([float(end)]) for end in box[along])
        found: list[tuple[int, int, bool]] = []
        fixed = {name: _value(name, *ends) for name, ends in box.items()}
        while len(low):
            at = fixed | {along: _value(along, low, high)}
            all_ = np.broadcast_to(~self.lower.prove(at).maybe_false, low.shape)
            none = np.broadcast_to(~self.upper.prove(at).maybe_true, low.shape)
            for shows, truth in ((all_, True), (none, False)):
                ends = zip(low[shows].tolist(), high[shows].tolist(), strict=True)
                found += [(int(a), int(b), truth) for a, b in ends]
            left = ~(all_ | none)
            low, high = low[left], high[left]
            if len(low) > _MOST or np.any(low == high):
                return None
            middle = np.floor((low + high) / 2)
            low, high = np.concatenate([low, middle + 1]), np.concatenate([middle, high])
        return _joined(sorted(found))

    def all_are(self, truth: bool, box: Box, *along: str) -> bool:
        """Say whether all of a box is proved visible, or hidden; an empty box is both."""
        if any(low > high for low, high in box.values()):
            return True
        for each in along:
            runs = self.runs(box, each)
            if runs is not None:
                return all(shows == truth for _, _, shows in runs)
        return False


def _value(name: str, low: object, high: object) -> Value:
    low, high = np.asarray(low, float), np.asarray(high, float)
    return Value(low, high, 1, high - low + 1, np.ones_like(low, bool), frozenset({name}))


def _joined(runs: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    joined: list[tuple[int, int, bool]] = []
    for low, high, shows in runs:
        if joined and joined[-1][2] == shows:
            low = joined.pop()[0]
        joined.append((low, high, shows))
    return joined


def _only(runs: list[tuple[int, int, bool]] | None) -> Ends | None:
    """Return the one run that is visible; (0, -1) where none is, None where several are."""
    if runs is None:
        return None
    shown = [(low, high) for low, high, shows in runs if shows]
    return (0, -1) if not shown else shown[0] if len(shown) == 1 else None


# ── bands ────────────────────────────────────────────────────────────────────────────────


def _band(mask: Expr) -> Band | None:
    """Return the band that a mask of i and j is; its variables are then d = i - j, and j."""
    by_distance = substitute(mask, {"i": Binary("+", Name("d"), Name("j"))})
    judge = _Judge(by_distance, {"d": (-FAR, FAR), "j": (0, FAR)})
    band = _only(judge.runs({"d": (-FAR, FAR), "j": (FAR, FAR)}, "d"))
    if band is None:
        return None
    low, high = band
    before, behind = (-FAR, low - 1), (high + 1, FAR)  # distances outside the band
    if high < FAR:
        start = _only(judge.runs({"d": (FAR, FAR), "j": (0, FAR)}, "j"))
    elif low > -FAR:
        start = _only(judge.runs({"d": (low - 1, low - 1), "j": (max(0, 1 - low), FAR)}, "j"))
    else:
        start = (0, -1)
    if start is None:
        return None
    prefix = start[1] + 1
    early = {"d": (1 - prefix, low - 1), "j": (0, prefix - 1)}  # keys of the prefix, seen ahead
    ahead = prefix > 1 - low and prefix > 0 and judge.all_are(True, _existing(early), "d", "j")
    claims = [
        (True, {"d": band, "j": (0, FAR)}),
        (False, {"d": behind, "j": (prefix, FAR)}),
        (True, {"d": behind, "j": (0, prefix - 1)}),
        (False, {"d": before, "j": (prefix, FAR)}),
        (ahead, early),
    ]
    if not all(judge.all_are(truth, _existing(box), "d", "j") for truth, box in claims):
        return None
    return Band(None if high == FAR else high, None if low == -FAR else -low, prefix, ahead)


def _existing(box: Box) -> Box:
    """Leave out distances that lie before the first query, whatever the key."""
    (low, high), j = box["d"], box["j"]
    return {"d": (max(low, -j[1]), high), "j": (max(j[0], -high), j[1])}


# ── blocks ───────────────────────────────────────────────────────────────────────────────


def _blocks(mask: Expr) -> Blocks | None:
    """Return the band of blocks that a mask of i and j is, of one of the sizes it divides by.

    One that divides by many sizes is none, and is not looked at for each of them.
    """
    sizes = {
        node.right.value
        for node in walk(mask)
        if isinstance(node, Binary)
        and node.op in ("//", "%")
        and isinstance(node.right, Number)
        and node.right.value >= 2
    }
    for size in sorted(sizes) if len(sizes) <= MOST_SIZES else ():
        if float(size).is_integer() and (found := _blocks_of(mask, int(size))) is not None:
            return found
    return None


def _blocks_of(mask: Expr, size: int) -> Blocks | None:
    """Return the band of blocks of one size: i = size · (d + b) + r, j = size · b + s."""
    at = Binary("+", Name("d"), Name("b"))
    i = Binary("+", Binary("*", Number(size), at), Name("r"))
    j = Binary("+", Binary("*", Number(size), Name("b")), Name("s"))
    divided = _divided(substitute(mask, {"i": i, "j": j}), size)
    far, last = FAR // size, size - 1
    whole = {"d": (-far, far), "b": (0, far), "r": (0, last), "s": (0, last)}
    judge = _Judge(divided, whole)
    if (near := _only(judge.runs(whole, "d"))) is not None:
        return Blocks(
            size, None if near[1] == far else near[1], None if near[0] == -far else -near[0]
        )
    behind = _only(judge.runs(whole | {"d": (1, far)}, "d"))
    if behind is None or behind[0] > 1 or not judge.all_are(False, whole | {"d": (-far, -1)}, "d"):
        return None
    own = {"d": (0, 0), "b": (0, far), "s": (0, last)}  # now r = e + s
    inside = _Judge(
        substitute(divided, {"r": Binary("+", Name("e"), Name("s"))}), own | {"e": (-last, last)}
    )
    if not inside.all_are(True, own | {"e": (0, last)}, "e"):
        return None
    if not inside.all_are(False, own | {"e": (-last, -1)}, "e"):
        return None
    return Blocks(size, None if behind[1] == far else max(0, behind[1]), 0, causal=True)


def _divided(expr: Expr, size: int) -> Expr:
    """Carry out divisions by the size: (size · b + s) // size is b, for s is less."""
    expr = rebuild(expr, lambda each: _divided(each, size))
    match expr:
        case Binary("%", left, Number(by)) if by == size:
            block = _divided(Binary("//", left, Number(by)), size)
            return Binary("-", left, Binary("*", Number(size), block))
        case Binary("//", left, Number(by)) if by == size:
            terms, c = affine(left)
            whole = {term: each // size for term, each in terms.items() if each % size == 0}
            rest = {term: each for term, each in terms.items() if each % size}
            more = _sum(rest, c % size)
            if more not in (Name("r"), Name("s"), Number(0)):
                return Binary("+", _sum(whole, c // size), Binary("//", more, Number(size)))
            return _sum(whole, c // size)
    return expr


def _sum(terms: Mapping[Expr, int | float], c: int | float) -> Expr:
    """Return a sum as an expression."""
    total: Expr = Number(c)
    for term, factor in terms.items():
        total = Binary("+", total, Binary("*", Number(factor), term))
    return fold(total)
