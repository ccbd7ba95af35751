"""Attention of tokens that leave more behind than keys and values: some queries after the others.

    values that read what is mixed      u = p v + p (share · u): a triangular system
    keys that later tokens carry        k <- k + along · (by · k), by chunks of tokens
    sums over the queries so far        a number a key, from tile to tile

A tile is made again in the backward pass, so that memory grows with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from .maps import normal_exp
from .tiles import TILE, meet, mixed, several


def through_itself(p: Tensor, share: Tensor, v: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """Return what weights p [b, h, n, m] mix of values v + share · itself, and these of n tokens.

    The n queries are the last keys, each of which sees only some before it: in their order, where
    they are `ordered`. share is [b, h, 1, m]; v [b, h, m, e] lacks nothing of the other keys.
    """
    n, wide = p.shape[-2], torch.promote_types(p.dtype, torch.float32)
    with torch.autocast(p.device.type, enabled=False):
        p, share = p.to(wide), share[..., share.shape[-1] - n :].to(wide)
        within = torch.eye(n, dtype=wide, device=p.device) - p[..., p.shape[-1] - n :] * share
        of_others = p @ v.to(wide)
        if ordered:
            u = torch.linalg.solve_triangular(within, of_others, upper=False, unitriangular=True)
        else:
            u = torch.linalg.solve(within, of_others)
    return u.to(v.dtype), v[..., v.shape[-2] - n :, :] + (share.mT * u).to(v.dtype)


def turn_by_turn(
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...],
    tensors: tuple[Any, ...],
    *,
    ordered: bool,
) -> tuple[Tensor, ...]:
    """Return what `through_itself` does, some queries at a time, and what else `weigh` gives.

    weigh(*queries, *keys, *places, *tensors) gives weights and shares. `queries` [..., n, ·] and
    `keys` [..., m, ·] stand along the tokens, `places` [..., m] along the last dimension. Weights
    are made again in the backward pass, so that memory grows with the tokens.
    """
    (b, heads, n, _), m = queries[0].shape, keys[0].shape[-2]
    count = max(16, TILE // max(1, b * heads * m) // 16 * 16)
    if count >= n or not ordered or torch.compiler.is_compiling():
        return one_turn(weigh, (*queries, *keys, *places, *tensors), [v], ordered)
    whole, found = [v[..., : m - n, :]], []
    for a in range(0, n, count):
        last = m - n + min(a + count, n)
        operands = (*up_to(queries, keys, places, a, count, last), *tensors)
        given = [*whole, v[..., m - n + a : last, :]]
        u, values, *more = torch.utils.checkpoint.checkpoint(
            one_turn, weigh, operands, given, True, use_reentrant=False
        )
        whole.append(values)
        found.append((u, *more))
    first, *rest = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
    return first, torch.cat(whole[1:], -2), *rest


def up_to(
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...],
    a: int,
    count: int,
    last: int,
) -> tuple[Any, ...]:
    """Return what `count` queries from number a on, and the first `last` keys, are made of."""
    return (
        *(x if x is None or x.shape[-2] == 1 else x[..., a : a + count, :] for x in queries),
        *(x if x is None or x.shape[-2] == 1 else x[..., :last, :] for x in keys),
        *(x if x is None or x.shape[-1] == 1 else x[..., :last] for x in places),
    )


def one_turn(
    weigh: Callable[..., Any], operands: tuple[Any, ...], values: list[Tensor], ordered: bool
) -> tuple[Tensor, ...]:
    """Return what `through_itself` does of some queries, and what else `weigh` gives of them."""
    p, share, *more = weigh(*operands)
    return *through_itself(p, share, torch.cat(values, -2), ordered), *more


def carried(
    carry: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    q: Tensor,
    k: Tensor,
    streams: tuple[Tensor, ...],
    fresh: Tensor | None,
    idle: Tensor | None,
    size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Return q · k [b, h, n, m] of keys as each query finds them, and the keys after all tokens.

    q is [b, h, n, d], k [b, g, m, d]: m - n keys as they are before the tokens, then those of the
    tokens. carry(k, streams) is what a token does to keys [..., m, d] before it; its streams are
    [b, g, n, ...]. At `fresh` tokens [b, 1, n, 1] a sequence begins, to which no key before them
    belongs; what is `idle` does nothing.

    Chunks of `size` tokens run side by side: what each of their tokens does to the chunk's keys,
    and to unit vectors, which says what it does to any key from before the chunk.
    """
    with torch.autocast(q.device.type, enabled=False):
        return carried_by_chunks(carry, q, k, streams, fresh, idle, size)


def carried_by_chunks(
    carry: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    q: Tensor,
    k: Tensor,
    streams: tuple[Tensor, ...],
    fresh: Tensor | None,
    idle: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return what `carried` does, in the precision of what is given, float32 at least."""
    (b, heads, n, d), (groups, m) = q.shape, k.shape[1:3]
    count, more = -(-n // size), -n % size
    wide = torch.promote_types(q.dtype, torch.float32)
    old, new = k[..., : m - n, :].to(wide), side_by_side(k[..., m - n :, :].to(wide), size)
    asked = side_by_side(q.reshape(b, groups, heads // groups, n, d).movedim(3, 2).to(wide), size)
    every = [side_by_side(x.to(wide), size) for x in streams]
    live = None
    if idle is not None or more:
        none = torch.zeros(b, 1, n, 1, dtype=torch.bool, device=q.device)
        live = side_by_side(~(none if idle is None else idle), size)  # what is filled up is not
    first = None if fresh is None else side_by_side(fresh, size)
    keys = torch.eye(d, dtype=wide, device=q.device).expand(b, groups, count, d, d)
    rows = []
    for t in range(size):
        moved = carry(keys, tuple(x[:, :, :, t : t + 1] for x in every))
        keys = moved if live is None else torch.where(live[:, :, :, t : t + 1], moved, keys)
        keys = keys if first is None else keys.masked_fill(first[:, :, :, t : t + 1], 0)
        keys = torch.cat([keys, new[:, :, :, t : t + 1]], -2)
        rows.append(F.pad(asked[:, :, :, t] @ keys.mT, (0, size - 1 - t)))
    found = torch.stack(rows, 3)  # [b, g, chunks, tokens, heads of a group, d + size]
    before, within = found[..., :d], found[..., d:]
    parts, whole = [], m + more
    for at in range(count):
        met = before[:, :, at] @ old[:, :, None].mT
        part = torch.cat([met, within[:, :, at]], -1)
        parts.append(F.pad(part, (0, whole - part.shape[-1])))
        old = torch.cat([old @ keys[:, :, at, :d], keys[:, :, at, d:]], -2)
    if not parts:
        return q.new_zeros(b, heads, n, m, dtype=wide), k
    s = torch.cat(parts, 2)[:, :, :n, :, :m]
    return s.movedim(2, 3).reshape(b, heads, n, m), old[..., :m, :].to(k.dtype)


def side_by_side(x: Tensor, size: int) -> Tensor:
    """Return x [b, g, n, ...] as [b, g, chunks, size, ...], filled up with zeros."""
    if x.shape[2] == size:
        return x[:, :, None]
    pad = [0, 0] * (x.ndim - 3) + [0, -x.shape[2] % size]
    laid: Tensor = F.pad(x, pad).unflatten(2, (-1, size))
    return laid


def carried_tiles(
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...],
    tensors: tuple[Any, ...],
    streams: tuple[Tensor, Tensor],
    fresh: Tensor | None,
    idle: Tensor | None,
    *,
    ordered: bool,
) -> tuple[Tensor, ...]:
    """Return the mixed values [b, h, n, e], the keys after all tokens, and what else weigh gives.

    Each token makes k + along · (by · k) of every key k before it; `streams` are along and by,
    [b, g, n, d]. weigh(s, *queries, *keys, *places, *tensors) gives the weights of products s
    [b, h, n, m]; m - n of the keys are as they are before the tokens. At `fresh` tokens
    [b, 1, n, 1] a sequence begins, what is `idle` does nothing. Where tokens are `ordered`, no
    query sees keys after its own.
    """
    q, k = queries[0], keys[0]
    (b, heads, n, _), m, wide = q.shape, k.shape[2], torch.promote_types(q.dtype, torch.float32)
    if n == 0:
        p, *more = several(weigh(meet(q, k), *queries, *keys, *places, *tensors))
        return mixed(p, v), k, *more
    size = 128  # where it is compiled, for every length of so many chunks
    if not torch.compiler.is_compiling():
        size = min(n, max(16, min(size, 8 * TILE // max(1, b * heads * m) // 16 * 16)))
    one = torch.compiler.is_exporting()  # a loop would be unrolled, for so many chunks alone
    size, starts = (n, [0]) if one else (size, range(0, n, size))
    along, by = (x.to(wide) for x in streams)
    along = along if idle is None else along.masked_fill(idle, 0)
    with torch.autocast(q.device.type, enabled=False):
        new = k[..., m - n :, :].to(wide)
        chunks = torch.utils.checkpoint.checkpoint(
            carried_chunks, q.to(wide), new, along, by, fresh, size, use_reentrant=False
        )
    asked, within, left, passed = (x.unbind(-3) for x in chunks)
    old, found = k[..., : m - n, :].to(wide), []
    for at, a in enumerate(starts):
        count = min(size, n - a)
        last = m - n + a + count if ordered else m
        operands = (*up_to(queries, keys, places, a, count, last), *tensors)
        before = [old, *left[:at]], passed[:at]
        found.append(torch.utils.checkpoint.checkpoint(
            carried_tile, weigh, operands, v[..., :last, :], asked[at], within[at], before,
            count, use_reentrant=False,
        ))  # fmt: skip
    o, *more = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
    with torch.autocast(q.device.type, enabled=False):
        return o, keys_after([old, *left], passed)[..., :m, :].to(k.dtype), *more


def carried_chunks(
    q: Tensor, k: Tensor, along: Tensor, by: Tensor, fresh: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what chunks of `size` tokens do to keys, in the terms of `carried_tiles`.

    asked [b, h, chunks, size, d] are the queries as keys from before the chunk find them, within
    [b, h, chunks, size, size] the products of queries and keys of a chunk, left [b, g, chunks,
    size, d] its keys as it leaves them, passed [b, g, chunks, d, d] is what it makes of keys from
    before. A product of such maps is one of this form (Bischof & Van Loan 1987), of the solution
    of a triangular system: what is read along `by` of each key when it comes to a token.
    """
    groups = k.shape[1]
    asked = side_by_side(q, size).unflatten(1, (groups, -1))  # [b, g, r, chunks, size, d]
    k, along, by = (side_by_side(x, size)[:, :, None] for x in (k, along, by))
    met, read = (by @ along.mT).tril(-1), (by @ k.mT).tril(-1)
    within, turned = (asked @ k.mT).tril(), (asked @ along.mT).tril()
    run = None if fresh is None else side_by_side(fresh, size)[:, :, None].cumsum(-2)
    if run is not None:  # nothing goes from sequence to sequence
        met, read, within, turned = (x * (run == run.mT) for x in (met, read, within, turned))
        asked, by = asked * (run == 0), by * (run == 0)
    one = torch.eye(size, dtype=k.dtype, device=k.device)
    found = torch.linalg.solve_triangular(
        one - met, torch.cat([by, read], -1), upper=False, unitriangular=True
    )
    by, read = found.split([by.shape[-1], size], -1)
    left = k + read.mT @ along
    passed = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) + along.mT @ by
    if run is not None:
        last = run[..., -1:, :]
        left, passed = left * (run == last), passed * (last == 0)
    asked, within = asked + turned @ by, within + turned @ read
    return asked.flatten(1, 2), within.flatten(1, 2), left[:, :, 0], passed[:, :, 0]


def carried_tile(
    weigh: Callable[..., Any],
    operands: tuple[Any, ...],
    v: Tensor,
    asked: Tensor,
    within: Tensor,
    before: tuple[list[Tensor], tuple[Tensor, ...]],
    count: int,
) -> tuple[Tensor, ...]:
    """Return the mixed values of the first `count` queries of a chunk, and what else weigh gives.

    `before` are the keys of chunks before it, as each leaves them, and what all but the first of
    these make of keys; values v [b, g, m, e] are of as many keys as are seen.
    """
    groups = before[0][0].shape[1]
    with torch.autocast(v.device.type, enabled=False):
        pulled, parts = asked.unflatten(1, (groups, -1)).flatten(2, 3), []
        for keys, passed in zip(before[0][:0:-1], before[1][::-1], strict=True):
            parts.append(pulled @ keys.mT)
            pulled = pulled @ passed
        parts.append(pulled @ before[0][0].mT)
        each = asked.shape[1] // groups
        met = torch.cat(parts[::-1], -1).unflatten(2, (each, -1)).flatten(1, 2)
        s = torch.cat([met, within], -1)[:, :, :count]
        s = F.pad(s, (0, v.shape[-2] - s.shape[-1]))
    p, *more = several(weigh(s, *operands))
    return mixed(p, v), *more


def keys_after(left: list[Tensor], passed: tuple[Tensor, ...]) -> Tensor:
    """Return all keys [b, g, m, d] after all chunks; `left` has old ones first, before any."""
    found, whole = [], None
    for keys, each in zip(left[:0:-1], passed[::-1], strict=True):
        found.append(keys if whole is None else keys @ whole.mT)
        whole = each if whole is None else whole @ each
    found.append(left[0] if whole is None else left[0] @ whole.mT)
    return torch.cat(found[::-1], -2)


def summed_tiles(
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...],
    tensors: tuple[Any, ...],
    sums: tuple[Tensor | None, ...],
    *,
    scale: float | None = None,
    ordered: bool,
) -> tuple[Tensor, ...]:
    """Return the mixed values [b, h, n, e], the `sums` afterwards, and what else weigh gives.

    The sums [b, h, m, 1] are of the queries before these, None for nothing; they are the last of
    the keys that weigh takes, which gives them anew. All else is as in `carried_tiles`; where
    there is a `scale`, weigh takes products times that.
    """
    (b, heads, n, _), m = queries[0].shape, keys[0].shape[-2]
    count = max(16, min(256, 4 * TILE // max(1, b * heads * m) // 16 * 16))
    if not ordered or torch.compiler.is_compiling() or count >= n:
        operands = (*queries, *keys, *sums, *places, *tensors)
        return summed_tile(weigh, operands, len(queries), v, scale)
    written, found = list(sums), []
    for a in range(0, n, count):
        last = m - n + min(a + count, n)
        grown = [None if x is None else more_keys(x, last) for x in written]
        operands = (*up_to(queries, (*keys, *grown), places, a, count, last), *tensors)
        made = torch.utils.checkpoint.checkpoint(
            summed_tile, weigh, operands, len(queries), v[..., :last, :], scale, use_reentrant=False
        )
        written = list(made[1 : 1 + len(sums)])
        found.append((made[0], *made[1 + len(sums) :]))
    o, *more = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
    return o, *made[1 : 1 + len(sums)], *more


def more_keys(x: Tensor, count: int) -> Tensor:
    """Return numbers x [b, h, m, 1] of so many keys: of those that are new, nothing."""
    return F.pad(x, (0, 0, 0, count - x.shape[-2]))


def summed_tile(
    weigh: Callable[..., Any],
    operands: tuple[Any, ...],
    queries: int,
    v: Tensor,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Return the mixed values of a tile, sums and what else weigh gives of it."""
    met = () if scale is None else (meet(operands[0], operands[queries], scale),)
    p, *more = several(weigh(*met, *operands))
    return mixed(p, v), *more


def fading_products(q: Tensor, k: Tensor, late: Tensor, early: Tensor) -> Tensor:
    """Return Σ_c q_ic k_jc exp(late_ic - early_jc) [b, h, n, m] of keys up to each query.

    The n queries are the last keys; late [b, h, n, d] and early [b, h, m, d] are sums of numbers
    below zero, so that they fall from token to token. All factors are one at most; other pairs
    have some finite number.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    n, m, each = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, late, early = q.to(wide), k.to(wide), late.to(wide), early.to(wide)
        k = k.repeat_interleave(each, 1) if each > 1 else k
        if torch.compiler.is_compiling():  # which would count the halves of one length
            gap = late[..., :, None, :] - early[..., None, :, :]
            return (q[..., :, None, :] * k[..., None, :, :] * gap.clamp(max=0).exp()).sum(-1)
        size = 1 << max(0, n - 1).bit_length()
        rows = [F.pad(x, (0, 0, 0, size - n)) for x in (q, k[..., m - n :, :], late)]
        before = fading_halves(q, k[..., : m - n, :], late, early[..., : m - n, :])
        s = (rows[0] * rows[1]).sum(-1)[..., None, None]  # of [b, h, size] blocks of one token
        half = 1
        while half < size:
            asked, seen, faded = (x.unflatten(-2, (-1, 2, half)) for x in rows)
            met = fading_halves(
                asked[..., 1, :, :], seen[..., 0, :, :], faded[..., 1, :, :], faded[..., 0, :, :]
            )
            first, last = s.unflatten(-3, (-1, 2)).unbind(-3)
            s = torch.cat([F.pad(first, (0, half)), torch.cat([met, last], -1)], -2)
            half *= 2
        return torch.cat([before, s[..., 0, :n, :n]], -1)


def fading_halves(q: Tensor, k: Tensor, late: Tensor, early: Tensor) -> Tensor:
    """Return products of queries and keys before all of them, which fade as `fading_products` says.

    What has faded where the queries begin scales both, and changes nothing.
    """
    begun = late[..., :1, :].detach()
    after = normal_exp((late - begun).clamp(max=0))
    return (q * after) @ (k * normal_exp((begun - early).clamp(max=0))).mT
