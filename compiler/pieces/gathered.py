"""Attention to chosen groups of keys: one group after the other, with the queries that read it.

    group 7 of 64 keys      the 1,152 queries that chose it: their rows of q, sums and maxima
                            are gathered, meet the 64 keys, and are put back

Softmax is taken as its sums go on, so nothing is kept of a pair; the backward pass makes the
weights again, group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATHER_FROM: int | None = None  # from how many tokens on groups are gathered, where not as compiled


def gathers(x: Tensor, least: int) -> bool:
    """Say whether there are so many tokens, x [b, n, …], that it pays to gather chosen groups."""
    least = least if GATHER_FROM is None else GATHER_FROM
    return not torch.compiler.is_compiling() and x.shape[1] >= max(1, least)


def steps_gather(q: Tensor, k: Tensor, least: int) -> bool:
    """Say whether so few queries meet so many keys that only the chosen groups are looked up."""
    least = least if GATHER_FROM is None else GATHER_FROM
    few = not torch.compiler.is_compiling() and q.shape[2] <= 8
    return few and k.shape[2] >= max(1, least)


def over_steps(
    choose: Callable[..., tuple[Any, Tensor, Tensor]],
    sees: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    queries: tuple[Any, ...] = (),
    tables: tuple[Any, ...] = (),
    tensors: tuple[Any, ...] = (),
    *,
    size: int,
    share: int,
    scale: float,
) -> Tensor:
    """Return what `over_groups` does, of a few queries at i [b or 1, 1, n, 1] and all keys so far.

    Of keys and values only the groups are read that one of the queries reads.
    """
    (b, heads, n, _), (groups, m) = q.shape, k.shape[1:3]
    each, count = min(share, heads // groups), -(-m // size)
    first = torch.arange(0, count * size, size, device=q.device)[None, None, None]
    with torch.no_grad():
        made = choose(q, i, *queries, first, first + size - 1, *tables, *tensors)
        chosen, forced = made[:2]
        if isinstance(chosen, tuple):
            picked, there = (x.expand(b, heads // share, n, -1) for x in chosen)
            empty = torch.zeros(b, heads // share, n, count, dtype=torch.bool, device=q.device)
            chosen = empty.scatter(-1, picked, there)
        chosen, forced = (x.expand(b, heads // share, n, count) for x in (chosen, forced))
        some = (chosen | forced).any(2)
        most = max(1, int(some.sum(-1).max()))
        found = some.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        group, there = found.indices[..., :most], found.values[..., :most].bool()
        step = torch.arange(size, device=q.device)
        j = (group[..., None] * size + step).flatten(2)[:, :, None]
        chosen = chosen.gather(-1, group[:, :, None].expand(-1, -1, n, -1))
        seen, always = sees(i, j)
        shown = seen & (always | chosen.repeat_interleave(size, -1)) & (j < m)
        shown = shown & there.repeat_interleave(size, -1)[:, :, None]
        times = share // each
        shown, j = (x.repeat_interleave(times, 1) for x in (shown, j[:, :, 0].clamp(max=m - 1)))
        row = torch.arange(b, device=q.device)[:, None, None]
        head = torch.arange(heads // each, device=q.device) * each * groups // heads
    keys, values = (x[row, head[None, :, None], j] for x in (k, v))
    s = widened(q.reshape(b, heads // each, each, n, -1) @ keys.mT[:, :, None]) * scale
    shown = shown[:, :, None]
    p = s.masked_fill(~shown, torch.finfo(s.dtype).min).softmax(-1) * shown
    return (p.to(v.dtype) @ values[:, :, None]).reshape(b, heads, n, -1)


class Readers(NamedTuple):
    """Which queries read each group of keys, of one unit of heads after the other.

    `pairs` are sorted numbers: group, partly, query, chosen, in so many bits as one takes, a query
    `bits`. Those who read a group `partly` do not see all of it, or only what is always read of it.
    `ends` says of each unit where those of a group begin, whole and then partly, and end.
    """

    pairs: Tensor
    bits: int
    ends: list[list[int]]


def over_groups(
    choose: Callable[..., tuple[Any, Tensor, Tensor]],
    sees: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: tuple[Any, ...] = (),
    tables: tuple[Any, ...] = (),
    tensors: tuple[Any, ...] = (),
    *,
    size: int,
    share: int,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Return softmax attention [b, h, n, e] to the groups of `size` keys that are chosen.

    choose(q, i, *queries, first, last, *tables, *tensors) says of some queries which groups they
    choose, of which they read something always, and of which they see all keys: [b, h / share or
    1, n, groups] each. Groups have their first key at first [1, 1, 1, groups] and their last at
    last. sees(i, j) says of pairs which are seen, and which are always read. Where it is `causal`,
    no query sees later keys.
    """
    (b, heads, n, _), m = q.shape, k.shape[2]
    each, count = min(share, heads // k.shape[1]), -(-m // size)
    units = b * (heads // each)
    some = max(size, 2**20 // max(1, units * count) // size * size)
    found: list[Tensor] = []
    bits = n.bit_length()
    with torch.no_grad():
        for a in range(0, n, some):
            e = min(n, a + some)
            near = min(count, -(-e // (16 * size)) * 16) if causal else count
            first = torch.arange(0, near * size, size, device=q.device)[None, None, None]
            i = torch.arange(a, e, device=q.device)[None, None, :, None]
            mine = [x if x is None or x.shape[-2] == 1 else x[..., a:e, :] for x in queries]
            made = choose(q[:, :, a:e], i, *mine, first, first + size - 1, *tables, *tensors)
            shape, times = (b, heads // share, e - a, near), share // each
            chosen, forced, full = made
            full = (full & (first + size <= m)).expand(shape)
            for partly, of in enumerate(pairs_of(chosen, forced, full, shape)):
                chooser, query, group, flag = (x[:, None] for x in of)
                unit = chooser * times + torch.arange(times, device=q.device)
                key = ((unit * count + group) * 2 + partly << bits) + query + a
                found.append((2 * key + flag).flatten())
        readers = sorted_readers(torch.cat(found), bits, count, units)
    done: Tensor = OverGroups.apply(q, k, v, (sees, readers, size, each, scale))
    return done


def pairs_of(
    chosen: Any, forced: Tensor, full: Tensor, shape: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return who chooses whole groups, and who reads some of a group: chooser, query, group, flag.

    The flag says whether the group is chosen, and not only read of always. What is chosen is a map
    [b, choosers, n, groups], or numbers of groups and which of them there are, as `best_groups`
    gives; a map may be the same for all choosers.
    """
    if not isinstance(chosen, tuple):
        chosen, forced = (x.expand(shape).flatten(0, 1) for x in (chosen, forced))
        whole = chosen & full.flatten(0, 1)
        some = (chosen | forced) & ~whole
        first, second = whole.nonzero(as_tuple=True), some.nonzero(as_tuple=True)
        return (*first, torch.ones_like(first[0])), (*second, chosen[second])
    group, there = (x.expand(*shape[:3], -1).flatten(0, 1) for x in chosen)
    whole = full.gather(-1, group.view(*shape[:3], -1)).flatten(0, 1) & there
    who, query, at = whole.nonzero(as_tuple=True)
    first = who, query, group[who, query, at], torch.ones_like(who)
    who, query, at = (there & ~whole).nonzero(as_tuple=True)
    second = who, query, group[who, query, at], torch.ones_like(who)
    if not bool(forced.any()):
        return first, second
    taken = torch.zeros(shape[0] * shape[1], *shape[2:], dtype=torch.bool, device=group.device)
    taken.scatter_(-1, group, there)
    if forced.shape[:2] == (1, 1):
        query, forced_of = forced.expand(1, 1, *shape[2:])[0, 0].nonzero(as_tuple=True)
        who = torch.arange(len(taken), device=group.device)[:, None].expand(-1, len(query))
        left = ~taken[:, query, forced_of]
        query, forced_of = (x.expand(len(taken), -1)[left] for x in (query, forced_of))
        third = who[left], query, forced_of, torch.zeros_like(query)
    else:
        left = forced.expand(shape).flatten(0, 1) & ~taken
        who, query, forced_of = left.nonzero(as_tuple=True)
        third = who, query, forced_of, torch.zeros_like(query)
    return first, tuple(torch.cat(each) for each in zip(second, third, strict=True))


def sorted_readers(keys: Tensor, bits: int, count: int, units: int) -> Readers:
    """Return pairs, numbered by unit and then as `Readers` has them, as who reads what."""
    keys = keys.sort().values
    ends = torch.bincount(keys >> bits + 1, minlength=2 * count * units).cumsum(0)
    ends = F.pad(ends, (1, 0)).unfold(0, 2 * count + 1, 2 * count)
    return Readers(keys, bits, ends.tolist())


def widened(x: Tensor) -> Tensor:
    """Return half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_of(x: Tensor, unit: int, each: int) -> Tensor:
    """Return x [b, h, n, d] of `each` heads that stand together, widened: [n, each, d]."""
    b, heads = x.shape[:2]
    at = x.reshape(b * heads // each, each, *x.shape[2:])[unit]
    return widened(at).transpose(0, 1)


def grouped_keys(x: Tensor, unit: int, times: int, size: int) -> Tensor:
    """Return x [b, g, m, d] in groups of keys, of those that a unit reads: [groups, size, d].

    As many units as `times` read the same.
    """
    x = widened(x.flatten(0, 1)[unit // times])
    x = F.pad(x, (0, 0, 0, -len(x) % size)) if len(x) % size else x
    return x.reshape(-1, size, x.shape[-1])


PARTS = 32  # of how many groups it is said at once who sees what


def steps_of(given: Any, unit: int, m: int) -> Any:
    """Yield each group with the queries of a unit that read it, and what the last of them miss.

    That is [queries · each, size], of those who read it partly; None where there are none.
    """
    sees, (numbers, bits, every), size, each, _ = given
    begun = every[unit]
    for first in range(0, len(begun) // 2, PARTS):
        ends = begun[2 * first : 2 * (first + PARTS) + 1]
        pairs = numbers[ends[0] : ends[-1]]
        rows = pairs >> 1 & (1 << bits) - 1
        partly = (pairs >> bits + 1 & 1).bool()
        i, part = rows[partly, None], pairs[partly, None]
        group = (part >> bits + 2) - unit * (len(begun) // 2)
        j = group * size + torch.arange(size, device=part.device)
        seen, always = (x[0, 0] for x in sees(i[None, None], j[None, None]))
        missed = ~(seen & (always | (part & 1).bool()) & (j < m)).repeat_interleave(each, 0)
        done = 0
        for at in range(0, len(ends) - 1, 2):
            a, whole, e = (x - ends[0] for x in ends[at : at + 3])
            if a < e:
                last = done + each * (e - whole)
                yield first + at // 2, rows[a:e], missed[done:last] if whole < e else None
                done = last


class Room:
    """Memory for matrices, taken again and again."""

    def __init__(self, like: Tensor) -> None:
        self.of: dict[int, Tensor] = {}
        self.like = like

    def matrix(self, at: int, rows: int, columns: int) -> Tensor:
        """Return a matrix, whose memory is asked for again at the same place."""
        if at not in self.of or len(self.of[at]) < rows * columns:
            self.of[at] = self.like.new_empty(rows * columns)
        return self.of[at][: rows * columns].view(rows, columns)


def hidden_at_end(s: Tensor, missed: Tensor | None, value: float) -> Tensor:
    """Fill what the last rows of s miss, in place."""
    if missed is not None:
        s[len(s) - len(missed) :].masked_fill_(missed, value)
    return s


def row_maxima(steps: Any, queries: Tensor, keys: Tensor) -> Tensor | None:
    """Return the largest logit of each row [n, each]; None where none can be too large.

    Of queries and keys whose products are small, e to the power of a logit is a number as it is.
    keys are [groups, d, size].
    """
    longest = queries.square().sum(-1).amax() * keys.square().sum(-2).amax()
    if longest < 60 * 60:
        return None
    lowest = torch.finfo(queries.dtype).min
    most = queries.new_full(queries.shape[:2], lowest)
    for group, rows, missed in steps:
        x = queries.index_select(0, rows).flatten(0, 1)
        s = hidden_at_end(x @ keys[group], missed, lowest)
        found = torch.maximum(most.index_select(0, rows), s.amax(-1).view(len(rows), -1))
        most.index_copy_(0, rows, found)
    return most


class OverGroups(torch.autograd.Function):
    """What `over_groups` gives, and its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Any) -> Tensor:
        """Go through the groups, and add what each gives to the rows that read it."""
        *_, size, each, scale = given
        (b, heads, n, _), (groups, m) = q.shape, k.shape[1:3]
        out = v.new_empty(b * heads // each, each, n, v.shape[-1])
        lse = widened(q).new_empty(b * heads // each, n, each)
        times, room = heads // each // groups, Room(lse)
        for unit in range(len(lse)):
            queries = unit_of(q, unit, each).mul(scale).contiguous()
            keys = grouped_keys(k, unit, times, size).mT.contiguous()
            values = grouped_keys(v, unit, times, size)
            most = row_maxima(steps_of(given, unit, m), queries, keys)
            mixed, total = queries.new_zeros(n, each, v.shape[-1]), queries.new_zeros(n, each)
            for group, rows, missed in steps_of(given, unit, m):
                count = len(rows) * each
                x = room.matrix(0, count, queries.shape[-1]).view(len(rows), each, -1)
                torch.index_select(queries, 0, rows, out=x)
                p = torch.mm(x.flatten(0, 1), keys[group], out=room.matrix(1, count, size))
                p = p if most is None else p.sub_(most.index_select(0, rows).view(-1, 1))
                hidden_at_end(p, missed, -torch.inf).exp_()
                total.index_add_(0, rows, p.sum(-1).view(-1, each))
                part = torch.mm(p, values[group], out=room.matrix(2, count, v.shape[-1]))
                mixed.index_add_(0, rows, part.view(len(rows), each, -1))
            found = total.log() if most is None else most + total.log()
            lse[unit] = torch.where(total > 0, found, torch.inf)
            out[unit] = mixed.div_(total.masked_fill_(total == 0, 1)[..., None]).transpose(0, 1)
        out = out.view(b, heads, n, -1)
        ctx.given = given
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Make the weights of each group again."""
        q, k, v, out, lse = ctx.saved_tensors
        *_, size, each, scale = ctx.given
        (b, heads, n, d), (groups, m) = q.shape, k.shape[1:3]
        times, room = heads // each // groups, Room(lse)
        of_q = q.new_empty(b * heads // each, each, n, d)
        of_k, of_v = (lse.new_zeros(b * groups, -(-m // size), size, x.shape[-1]) for x in (k, v))
        for unit in range(len(lse)):
            queries = unit_of(q, unit, each).mul(scale).contiguous()
            given = unit_of(grads[0], unit, each).contiguous()
            inner = (given * unit_of(out, unit, each)).sum(-1)
            keys = grouped_keys(k, unit, times, size)
            turned, of_values = keys.mT.contiguous(), grouped_keys(v, unit, times, size).mT
            mine, of_values = torch.zeros_like(queries), of_values.contiguous()
            into_k, into_v = of_k[unit // times], of_v[unit // times]
            for group, rows, missed in steps_of(ctx.given, unit, m):
                x, y = (z.index_select(0, rows).flatten(0, 1) for z in (queries, given))
                p = torch.mm(x, turned[group], out=room.matrix(0, len(x), size))
                p = p.sub_(lse[unit].index_select(0, rows).view(-1, 1))
                hidden_at_end(p, missed, -torch.inf).exp_()
                s = torch.mm(y, of_values[group], out=room.matrix(1, len(x), size))
                s = s.sub_(inner.index_select(0, rows).view(-1, 1)).mul_(p)
                into_v[group].addmm_(p.mT, y)
                into_k[group].addmm_(s.mT, x)
                part = torch.mm(s, keys[group], out=room.matrix(2, len(x), d))
                mine.index_add_(0, rows, part.view(len(rows), each, -1))
            of_q[unit] = mine.mul_(scale).transpose(0, 1)
        of_k, of_v = (x.view(b, groups, -1, x.shape[-1])[:, :, :m] for x in (of_k, of_v))
        return of_q.view_as(q), of_k.to(k.dtype), of_v.to(v.dtype), None
