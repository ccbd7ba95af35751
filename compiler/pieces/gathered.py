"""Attention to chosen groups of keys: one group after the other, with the queries that read it.

    group 7 of 64 keys      the 1,152 queries that chose it: their rows of q, sums and maxima
                            are gathered, meet the 64 keys, and are put back

Softmax is taken as its sums go on, so nothing is kept of a pair; the backward pass makes the
weights again, group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
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
    """Which queries read each group, sorted by groups, then by units.

    `row` [pairs] is where a query of a unit stands among all, `chosen` whether the group was (else
    only what is always read of it is), None where all were. `ends` says of each group where the
    pairs of each unit begin, and end.
    """

    row: Tensor
    chosen: Tensor | None
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
    some = max(size, 2**19 // max(1, units * count) // size * size)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for a in range(0, n, some):
            e = min(n, a + some)
            near = min(count, -(-e // size)) if causal else count
            first = torch.arange(0, near * size, size, device=q.device)[None, None, None]
            i = torch.arange(a, e, device=q.device)[None, None, :, None]
            mine = [x if x is None or x.shape[-2] == 1 else x[..., a:e, :] for x in queries]
            made = choose(q[:, :, a:e], i, *mine, first, first + size - 1, *tables, *tensors)
            shape, times = (b, heads // share, e - a, near), share // each
            chosen, forced, full = made
            full = (full & (first + size <= m)).expand(shape)
            for into, (unit, query, group, flag) in zip(
                found, pairs_of(chosen, forced, full, shape), strict=True
            ):
                units_of = unit[:, None] * times + torch.arange(times, device=q.device)
                key = (group[:, None] * units + units_of) * n + (query[:, None] + a)
                into.append((key if into is found[0] else 2 * key + flag[:, None]).flatten())
        parts = sorted_readers(torch.cat(found[1]), True, n, count, units)
        whole = sorted_readers(torch.cat(found[0]), False, n, count, units)
    done: Tensor = OverGroups.apply(q, k, v, (sees, whole, parts, size, each, scale))
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
        return (*first, first[0]), (*second, chosen[second])
    group, there = (x.expand(*shape[:3], -1).flatten(0, 1) for x in chosen)
    whole = full.gather(-1, group.view(*shape[:3], -1)).flatten(0, 1) & there
    who, query, at = whole.nonzero(as_tuple=True)
    first = who, query, group[who, query, at], who
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


def sorted_readers(keys: Tensor, marked: bool, n: int, count: int, units: int) -> Readers:
    """Return pairs, numbered by group, unit and query, as who reads what; some may be marked."""
    keys = keys.sort().values
    flag = (keys % 2).bool() if marked else None
    keys = keys // 2 if marked else keys
    ends = torch.bincount(keys // n, minlength=count * units).cumsum(0).view(count, units)
    begun = F.pad(ends[:-1, -1], (1, 0))[:, None]
    return Readers(keys % (units * n), flag, torch.cat([begun, ends], 1).tolist())


def widened(x: Tensor) -> Tensor:
    """Return half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_units(x: Tensor, each: int) -> Tensor:
    """Return x [b, h, n, d] as rows of units, `each` heads beside one another: [·, each, d]."""
    b, heads, n, d = x.shape
    x = widened(x).reshape(b * heads // each, each, n, d)
    return x.transpose(1, 2).reshape(-1, each, d)


def out_of_units(x: Tensor, like: Tensor) -> Tensor:
    """Return what `in_units` was given, of the size of q [b, h, n, ·]."""
    b, heads, n, _ = like.shape
    each, d = x.shape[1:]
    return x.view(-1, n, each, d).transpose(1, 2).reshape(b, heads, n, d)


def grouped_keys(x: Tensor, size: int, units: int) -> Tensor:
    """Return x [b, g, m, d] in groups of keys, for units that share heads: [groups, units, …]."""
    b, heads, m, d = x.shape
    x = F.pad(widened(x), (0, 0, 0, -m % size)).view(b, heads, -1, size, d)
    x = x.repeat_interleave(units // heads, 1) if units > heads else x
    return x.flatten(0, 1).transpose(0, 1)


def ungrouped_keys(x: Tensor, like: Tensor, units: int) -> Tensor:
    """Return the gradient of what `grouped_keys` was given, of that of what it gave."""
    b, heads, m, d = like.shape
    x = x.transpose(0, 1).reshape(b, heads, units // heads, -1, d).sum(2)
    return x[:, :, :m].to(like.dtype)


def steps_of(given: Any, n: int, m: int, device: torch.device) -> Any:
    """Yield each group with the rows that read it, where those of each unit end, and who sees what.

    The last is [rows · each, size], None where all is seen.
    """
    sees, whole, parts, size, each, _ = given
    for group in range(-(-m // size)):
        for readers in (whole, parts):
            first, *ends = readers.ends[group]
            if first == ends[-1]:
                continue
            rows, shown = readers.row[first : ends[-1]], None
            if readers.chosen is not None:
                j = torch.arange(group * size, (group + 1) * size, device=device)
                i = (rows % n)[None, None, :, None]
                seen, always = sees(i, j[None, None, None])
                chosen = readers.chosen[first : ends[-1], None]
                shown = (seen[0, 0] & (always[0, 0] | chosen) & (j < m)).repeat_interleave(each, 0)
            yield group, rows, [each * (end - first) for end in (first, *ends)], shown


def by_units(a: Tensor, b: Tensor, ends: list[int], out: Tensor) -> Tensor:
    """Return rows of a [rows, ·] times the matrix of their unit in b [units, ·, ·]."""
    for unit, (first, last) in enumerate(pairwise(ends)):
        if last > first:
            torch.mm(a[first:last], b[unit], out=out[first:last])
    return out


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


def row_maxima(given: Any, queries: Tensor, keys: Tensor, n: int, m: int) -> Tensor | None:
    """Return the largest logit of each row [rows, each, 1]; None where none can be too large.

    Of queries and keys whose products are small, e to the power of a logit is a number as it is.
    keys are [groups, units, d, size].
    """
    longest = queries.norm(dim=-1).amax() * keys.norm(dim=-2).amax()
    if longest < 60:
        return None
    lowest, room = torch.finfo(queries.dtype).min, Room(queries)
    most = queries.new_full(queries.shape[:2], lowest)
    for group, rows, ends, shown in steps_of(given, n, m, queries.device):
        x = queries.index_select(0, rows).flatten(0, 1)
        s = by_units(x, keys[group], ends, room.matrix(0, len(x), keys.shape[-1]))
        s = s if shown is None else s.masked_fill_(~shown, lowest)
        found = torch.maximum(most.index_select(0, rows), s.amax(-1).view(len(rows), -1))
        most.index_copy_(0, rows, found)
    return most[..., None]


class OverGroups(torch.autograd.Function):
    """What `over_groups` gives, and its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Any) -> Tensor:
        """Go through the groups, and add what each gives to the rows that read it."""
        _, _, _, size, each, scale = given
        n, m, units = q.shape[2], k.shape[2], q.shape[1] // each
        queries = in_units(widened(q) * scale, each)
        keys = grouped_keys(k, size, units).mT.contiguous()
        values = grouped_keys(v, size, units).contiguous()
        most = row_maxima(given, queries, keys, n, m)
        mixed = queries.new_zeros(len(queries), each, values.shape[-1])
        total, room = queries.new_zeros(len(queries), each), Room(queries)
        for group, rows, ends, shown in steps_of(given, n, m, q.device):
            x = queries.index_select(0, rows).flatten(0, 1)
            p = by_units(x, keys[group], ends, room.matrix(0, len(x), size))
            p = p if most is None else p.sub_(most.index_select(0, rows).view(-1, 1))
            p = p if shown is None else p.masked_fill_(~shown, -torch.inf)
            p.exp_()
            total.index_add_(0, rows, p.sum(-1).view(-1, each))
            part = by_units(p, values[group], ends, room.matrix(1, len(x), values.shape[-1]))
            mixed.index_add_(0, rows, part.view(len(rows), each, -1))
        total = total[..., None]
        lse = torch.where(total > 0, total.log() if most is None else most + total.log(), torch.inf)
        out = out_of_units(mixed.div_(total.masked_fill(total == 0, 1)), q)
        ctx.given = given
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(v.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Make the weights of each group again."""
        q, k, v, out, lse = ctx.saved_tensors
        _, _, _, size, each, scale = ctx.given
        n, m, units = q.shape[2], k.shape[2], q.shape[1] // each
        inner = in_units((widened(grads[0]) * out).sum(-1, keepdim=True), each)
        queries, given = in_units(widened(q) * scale, each), in_units(grads[0], each)
        keys, values = (grouped_keys(x, size, units).contiguous() for x in (k, v))
        turned, of_values = keys.mT.contiguous(), values.mT.contiguous()
        of_q, room = torch.zeros_like(queries), Room(queries)
        of_k, of_v = torch.zeros_like(keys), torch.zeros_like(values)
        for group, rows, ends, shown in steps_of(ctx.given, n, m, q.device):
            x, y = (z.index_select(0, rows).flatten(0, 1) for z in (queries, given))
            p = by_units(x, turned[group], ends, room.matrix(0, len(x), size))
            p = p.sub_(lse.index_select(0, rows).view(-1, 1))
            p = p if shown is None else p.masked_fill_(~shown, -torch.inf)
            p.exp_()
            s = by_units(y, of_values[group], ends, room.matrix(1, len(x), size))
            s = s.sub_(inner.index_select(0, rows).view(-1, 1)).mul_(p)
            for unit, (first, last) in enumerate(pairwise(ends)):
                of_v[group, unit].addmm_(p[first:last].mT, y[first:last])
                of_k[group, unit].addmm_(s[first:last].mT, x[first:last])
            part = by_units(s, keys[group], ends, room.matrix(2, len(x), keys.shape[-1]))
            of_q.index_add_(0, rows, part.view(len(rows), each, -1))
        of_q = out_of_units(of_q, q).mul_(scale)
        of_k, of_v = ungrouped_keys(of_k, k, units), ungrouped_keys(of_v, v, units)
        return of_q.to(q.dtype), of_k, of_v, None
