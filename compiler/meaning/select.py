"""The meaning of `select` and `keep`: which of the visible keys a query reads, by content.

Keys and queries are laid out in whole groups, what is missing at the end as pairs that nobody
sees. Then every choice is one row of a table: [batch, heads that choose, rows that choose, groups].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..model import Keep, Select


def selected(
    select: Select, visible: Tensor, score: Tensor, always: Tensor, among: Tensor, by_heads: bool
) -> Tensor:
    """Return who reads whom [b, heads, n, m], of who sees whom.

    `score` is that of every visible pair. Where it is not `by_heads`, it is the same for all.
    """
    always = visible & always
    free = visible & among & ~always
    tiles = _tiles(select, free)
    some = tiles.flatten(-2).any(-1)  # [b, choosing heads, sharing heads, rows, groups]
    values = _tiles(select, score.double()).flatten(-2)
    inside = tiles.flatten(-2)
    count = inside.sum(-1).clamp(min=1)
    match select.within:
        case "sum":
            e = values.masked_fill(~inside, 0).sum(-1)
        case "lse":
            e = values.masked_fill(~inside, -torch.inf).logsumexp(-1)
        case "mean":
            e = values.masked_fill(~inside, 0).sum(-1) / count
        case _:  # also where all are the same
            e = values.masked_fill(~inside, -torch.inf).amax(-1)
    if by_heads:
        e = e.masked_fill(~some, 0).sum(2)
    else:
        e = e.amax(2)
    some = some.any(2)
    room = torch.full_like(e, select.amount)[..., :1]
    if select.counted:
        room = room - _tiles(select, always).flatten(-2).any(-1).any(2).sum(-1, keepdim=True)
    chosen = _chosen(select, e.nan_to_num(-torch.inf, torch.inf, -torch.inf), some, room)
    _, heads, n, m = visible.shape
    spread = chosen.repeat_interleave(select.share, 1).repeat_interleave(select.rows, 2)
    spread = spread.repeat_interleave(select.size, 3)[:, :heads, :n, :m]
    return always | (visible & spread)


def kept(keep: Keep, read: Tensor, score: Tensor, always: Tensor) -> Tensor:
    """Return which keys stay held [b, choosing heads, m], of those a query reads [b, heads, m]."""
    b, heads, keys = read.shape
    shape = (b, heads // keep.share, keep.share, keys)
    stays = (read & always).reshape(shape).any(2)
    free = read.reshape(shape).any(2) & ~stays
    e = score.double().masked_fill(~read, 0).reshape(shape).sum(2)
    e = e.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    held: Tensor = stays | (free & (_better(e, free).sum(-1) < keep.count))
    return held


def _tiles(select: Select, x: Tensor) -> Tensor:
    """Cut [b, heads, n, m] into [b, choosing, sharing, rows, groups, queries, keys]."""
    rows, size, share = select.rows, select.size, select.share
    n, m = x.shape[-2:]
    x = functional.pad(x, (0, -m % size, 0, -n % rows))
    b, heads, n, m = x.shape
    x = x.reshape(b, heads // share, share, n // rows, rows, m // size, size)
    return x.transpose(4, 5)


def _chosen(select: Select, e: Tensor, some: Tensor, room: Tensor) -> Tensor:
    """Return which of the groups that there are some of are chosen."""
    match select.kind:
        case "above":
            return some & (e > select.amount)
        case "mass":
            p = e.masked_fill(~some, -torch.inf).softmax(-1).nan_to_num(0)
            better = _better(p, some)
            before = (p[..., None, :] * better).sum(-1)
            return some & (before < select.amount)
        case _:
            return some & (_better(e, some).sum(-1) < room)


def _better(e: Tensor, some: Tensor) -> Tensor:
    """Say of each group (before the last dimension) which others (the last) are better."""
    at = torch.arange(e.shape[-1], device=e.device)
    own, other = e[..., :, None], e[..., None, :]
    return some[..., None, :] & ((other > own) | ((other == own) & (at < at[:, None])))
