"""Parts that tokens are sent to, as `explain` says it.

mixture(swiglu, w)    grouped: rows of one expert after those of another, one product for all
take(t) | attn | put  taken: rows of the tokens that are taken, the part as it is by itself
"""

from __future__ import annotations

from ..facts.decoding import obstacle
from ..model import Block, Taken
from ..plan.plan import Lowering


def sent(wholes: list[Block]) -> list[Lowering]:
    """Return how parts of some layers that run on some tokens are computed, each kind once."""
    found: dict[Lowering, None] = {}
    for whole in wholes:
        for part in whole.parts:
            if part.what.experts is not None:
                found[_path(whole, part.what)] = None
            if part.taken is not None:
                found[_taken(whole, part.what.name, part.taken)] = None
    return list(found)


def _taken(whole: Block, part: str, how: Taken) -> Lowering:
    obstacles = []
    known = "the tokens that are taken, each at its position"
    if how == Taken():
        known = "as many tokens as the data says, each at its position"
        why = "how many are taken depends on the data; `largest_tokens` says it"
        obstacles.append(("static", why))
    if (later := obstacle(whole)) is not None:
        obstacles.append(("decoding", later))
    name = f"{whole.name}: {part}, taken"
    return Lowering(name, "taken", f"rows hold {known}", tuple(obstacles))


def _path(whole: Block, part: Block) -> Lowering:
    assert part.experts is not None
    count, most = part.experts.count, part.experts.most
    rows = f"at most {most} for each token" if most is not None else "as many as are chosen"
    reason = (
        f"rows, {rows}, lie expert by expert: one product of groups for each map, or in float64 "
        "and where a width is no multiple of 16 bytes one expert after another"
    )
    obstacles = []
    if most is None:
        why = "how many rows there are depends on the data; a choice by `largest` or `top` says it"
        obstacles.append(("static", why))
    if (later := obstacle(whole)) is not None:
        obstacles.append(("decoding", later))
    name = f"{whole.name}: {count} × {part.name}"
    return Lowering(name, "grouped", reason, tuple(obstacles))
