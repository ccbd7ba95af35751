"""Which calls a lowering takes, where it does not take all of them.

causal, in a kernel                plain: nothing in a cache, no positions, one sequence a row
causal and document, in a kernel   counted: nothing in a cache, no positions
context, in a kernel               context_run: no padding
a number of each key, by sdpa      exact: float32 at least
"""

from __future__ import annotations

from ...ops.shape import pooling
from ..algebra.masks import extent
from ..plan.attention import Attention

_REFUSED = {
    "plain": ("steps with a cache", "calls with positions", "rows of several sequences"),
    "counted": ("steps with a cache", "calls with positions"),
    "exact": ("half precision",),
    "run": ("batches with padding",),
    "context_run": ("batches with padding",),
}


def needed(attention: Attention, *, documents: bool) -> tuple[str, ...]:
    """Return what must hold of a call that is a whole sequence in order, () for every call.

    `plain`: nothing in a cache, no positions, one sequence a row; `counted`: the same of rows of
    several; `run` and `context_run`: no padding. Where `documents` are told apart, a row may hold
    several.
    """
    own = attention.node.dims[2] == "n" and not attention.crosses
    if own and documents:
        return ("counted",)
    needs = []
    if own or (attention.node.dims[2] == "n" and attention.reads_places):
        needs.append("plain")
    causal = not attention.crosses and extent(attention.mix.mask).causal
    of = pooling(str(attention.keys))[0]
    if of in ("n", "m") and not causal:
        needs.append("run" if of == "n" else "context_run")
    return tuple(needs)


def others(needs: tuple[str, ...]) -> str:
    """Say which calls do not fulfil some needs, "" where all do."""
    few = ("sequences of few tokens",)
    found = [each for need in needs for each in _REFUSED.get(need, few)]
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
