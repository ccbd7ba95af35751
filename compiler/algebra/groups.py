"""What a mask says of groups of keys, told by the first and the last of each.

j <= i, groups of 64      some key is seen where the first is; all are where the last is
(i - j) % 3 == 0          neither
"""

from __future__ import annotations

from functools import lru_cache

from ...grammar.expr import FALSE, TRUE
from ...grammar.syntax import Expr, Number, walk
from .points import numbers

_MOST = 1 << 23  # pairs that are tried at most
_LARGEST = 1 << 20


@lru_cache(maxsize=256)
def told_at_ends(mask: Expr, size: int, *, both: bool) -> bool:
    """Say whether a mask of i and j holds somewhere in a group just where it does at an end.

    With `both`, also whether it holds all over where it does at both ends. Queries and groups are
    tried about all sums and multiples of its constants.
    """
    if mask in (TRUE, FALSE):
        return True
    import numpy as np

    sizes = {
        abs(int(node.value)) for node in walk(mask)
        if isinstance(node, Number) and abs(node.value) < _LARGEST
    } | {size}  # fmt: skip
    ends = {a * b for a in sizes for b in range(5)} | {a + b for a in sizes for b in sizes}
    some = {end + step for end in ends for step in (-size, -2, -1, 0, 1, 2, size)}
    groups = np.array(sorted({at // size for at in some if at >= 0} | set(range(8))))
    i = np.array(sorted({at for at in some if at >= 0} | set(range(4 * size))))
    if len(groups) * len(i) * size > _MOST:
        i = i[:: -(-len(groups) * len(i) * size // _MOST)]
    j = groups[:, None] * size + np.arange(size)
    with np.errstate(all="ignore"):
        holds = numbers(mask, {"i": i[:, None, None], "j": j[None]})
    holds = np.broadcast_to(np.asarray(holds, dtype=bool), (len(i), *j.shape))
    first, last = holds[..., 0], holds[..., -1]
    told = bool(np.array_equal(holds.any(-1), first | last))
    return told and (not both or bool(np.array_equal(holds.all(-1), first & last)))
