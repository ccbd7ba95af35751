"""Masks that show nothing to anyone: `causal and j > i`, `window(0)`.

What a mask's extent proves holds for sequences of any length. Where it proves nothing and no
pair of the first few positions is visible, all pairs are looked at up to a length that goes
beyond the numbers in the mask; what depends on data counts as visible.
"""

from __future__ import annotations

from itertools import product

from ...grammar.expr import NotConstant, evaluate
from ...grammar.syntax import Expr, Number, walk
from .masks import extent

_FEW = 4  # positions tried one by one
_LONGEST = 2048  # tokens looked at; a mask of larger numbers is left alone


def unseen(mask: Expr, heads: int) -> str:
    """Say how far a mask shows nothing to anyone; "" where it may show something."""
    if extent(mask).nothing:
        return "no query sees a key"
    if _shows_soon(mask, heads):
        return ""
    constants = [abs(node.value) for node in walk(mask) if isinstance(node, Number)]
    tokens = int(min(_LONGEST, 2 * sum(constants))) + 64
    if tokens > _LONGEST:
        return ""
    from .counting import pairs  # loads numpy, which few checks need

    try:
        seen = pairs(mask, tokens, tokens, heads)
    except (TypeError, KeyError):  # it reads data after all
        return ""
    return "" if seen else f"no query sees a key among the first {tokens:,} tokens"


def _shows_soon(mask: Expr, heads: int) -> bool:
    """Say whether one of the first few queries may see one of the first few keys."""
    for i, j, h in product(range(_FEW), range(_FEW), range(heads)):
        try:
            if evaluate(mask, {"i": i, "j": j, "h": h, "n": _LONGEST, "m": _LONGEST}):
                return True
        except NotConstant:
            return True
    return False
