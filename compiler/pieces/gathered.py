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
    return x.shape[1] >= max(1, least) and not torch.compiler.is_compiling()


class Readers(NamedTuple):
    """Which queries read each group, sorted by groups, then by who chooses.

    `query` [pairs] is a query's number, `chosen` whether the group was (else only what is always
    read of it is), None where all were; [groups, choosers] are where each one's pairs begin, and
    how many there are, `most` of them.
    """

    query: Tensor
    chosen: Tensor | None
    first: Tensor
    counts: Tensor
    most: list[int]

    def of(self, group: int, nobody: int) -> tuple[Tensor, Tensor | None]:
        """Return the queries [choosers, most] of a group, `nobody` where there are fewer."""
        step = torch.arange(self.most[group], device=self.query.device)
        there = step < self.counts[group, :, None]
        at = (self.first[group, :, None] + step).mul_(there).flatten()
        query = self.query.index_select(0, at).view(there.shape).masked_fill(~there, nobody)
        if self.chosen is None:
            return query, None
        return query, self.chosen.index_select(0, at).view(there.shape) & there


class Layout(NamedTuple):
    """How heads share: `each` query heads of a unit read one key head by one choice."""

    each: int
    choosers: int  # of all rows of a batch
    units: int


def over_groups(
    choose: Callable[..., tuple[Tensor, Tensor, Tensor]],
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
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    (b, heads, n, _), m = q.shape, k.shape[2]
    count, choosers = -(-m // size), b * (heads // share)
    some = max(size, 2**19 // max(1, choosers * share * count) // size * size)
    with torch.no_grad():
        for a in range(0, n, some):
            e = min(n, a + some)
            near = min(count, -(-e // size)) if causal else count
            first = torch.arange(0, near * size, size, device=q.device)[None, None, None]
            i = torch.arange(a, e, device=q.device)[None, None, :, None]
            mine = [x if x is None or x.shape[-2] == 1 else x[..., a:e, :] for x in queries]
            made = choose(q[:, :, a:e], i, *mine, first, first + size - 1, *tables, *tensors)
            shape = (b, heads // share, e - a, near)
            chosen, forced, full = (x.expand(shape).reshape(choosers, e - a, near) for x in made)
            full = chosen & full & (first[0, 0] + size <= m)
            for each, pairs in zip(found, (full, (chosen | forced) & ~full), strict=True):
                who, query, group = pairs.nonzero(as_tuple=True)
                key = (group * choosers + who).mul_(n).add_(query).add_(a)
                each.append(key if each is found[0] else 2 * key + chosen[who, query, group])
        whole = sorted_readers(torch.cat(found[0]), None, n, count, choosers)
        marked = torch.cat(found[1])
        parts = sorted_readers(marked, marked, n, count, choosers)
    given = (sees, whole, parts, size, share, scale)
    done: Tensor = OverGroups.apply(q, k, v, given)
    return done


def sorted_readers(
    keys: Tensor, marked: Tensor | None, n: int, count: int, choosers: int
) -> Readers:
    """Return pairs, numbered by group, chooser and query, as who reads what; some are `marked`."""
    keys = keys.sort().values
    flag = None if marked is None else (keys % 2).bool()
    keys = keys if marked is None else keys // 2
    counts = torch.bincount(keys // n, minlength=count * choosers)
    first = (counts.cumsum(0) - counts).view(count, choosers)
    counts = counts.view(count, choosers)
    return Readers(keys % n, flag, first, counts, counts.amax(1).tolist())


def widened(x: Tensor) -> Tensor:
    """Return half precision as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_units(x: Tensor, units: int) -> Tensor:
    """Return x [b, h, n, d] with a row of zeros at its end, as [b · units, n + 1, h / units, d]."""
    b, heads, n, d = x.shape
    x = F.pad(widened(x), (0, 0, 0, 1)).reshape(b * units, heads // units, n + 1, d)
    return x.transpose(1, 2).contiguous()


def out_of_units(x: Tensor, b: int) -> Tensor:
    """Return what `in_units` was given."""
    of, n, each, d = x.shape
    return x[:, :-1].transpose(1, 2).reshape(b, of // b * each, n - 1, d)


def grouped_keys(x: Tensor, size: int, units: int) -> Tensor:
    """Return x [b, g, m, d] in groups of keys, for units that share heads: [groups, units, …].

    Beside its features each key has a one.
    """
    b, heads, m, d = x.shape
    x = F.pad(F.pad(widened(x), (0, 1), value=1.0), (0, 0, 0, -m % size))
    x = x.view(b, heads, -1, size, d + 1)
    x = x.repeat_interleave(units // heads, 1) if units > heads else x
    return x.flatten(0, 1).transpose(0, 1).contiguous()


def ungrouped_keys(x: Tensor, like: Tensor, units: int) -> Tensor:
    """Return the gradient of what `grouped_keys` was given, of that of what it gave."""
    b, heads, m, d = like.shape
    x = x.transpose(0, 1).reshape(b, heads, units // heads, -1, d).sum(2)
    return x[:, :, :m].to(like.dtype)


def layout_of(q: Tensor, k: Tensor, share: int) -> Layout:
    """Return how heads share."""
    b, heads = q.shape[:2]
    each = min(share, heads // k.shape[1])
    return Layout(each, b * heads // share, heads // each)


def steps_of(given: Any, layout: Layout, b: int, n: int, m: int, device: torch.device) -> Any:
    """Yield each group with the rows that read it, of units · (n + 1), and who sees what.

    The last is [units, most · each, size], None where all is seen.
    """
    sees, whole, parts, size, _, _ = given
    of_chooser = b * layout.units // layout.choosers
    unit = torch.arange(b * layout.units, device=device)[:, None] * (n + 1)
    for group in range(-(-m // size)):
        for each in (whole, parts):
            if not each.most[group]:
                continue
            query, chosen = each.of(group, n)
            spread = query if of_chooser == 1 else query.repeat_interleave(of_chooser, 0)
            shown = None
            if chosen is not None:
                j = torch.arange(group * size, (group + 1) * size, device=device)
                seen, always = sees(query[:, None, :, None], j[None, None, None])
                seen = (seen & (always | chosen[:, None, :, None]) & (j < m))[:, 0]
                seen = seen.expand(*query.shape, size)
                shown = seen.repeat_interleave(of_chooser, 0).repeat_interleave(layout.each, 1)
            yield group, (spread + unit).flatten(), shown


def row_maxima(
    given: Any, layout: Layout, queries: Tensor, keys: Tensor, sizes: tuple[int, int, int]
) -> Tensor | None:
    """Return the largest logit of each row [rows, each, 1]; None where none can be too large.

    Of queries and keys whose products are small, e to the power of a logit is a number as it is.
    """
    longest = queries.norm(dim=-1).amax() * keys[..., :-1].norm(dim=-1).amax()
    if longest < 60:
        return None
    b, n, m = sizes
    most = queries.new_full((len(queries), layout.each), torch.finfo(queries.dtype).min)
    for group, rows, shown in steps_of(given, layout, b, n, m, queries.device):
        s = in_rows(queries, rows, b * layout.units) @ keys[group, ..., :-1].mT.contiguous()
        s = s if shown is None else s.masked_fill(~shown, torch.finfo(s.dtype).min)
        found = torch.maximum(most.index_select(0, rows), s.amax(-1).view(-1, layout.each))
        most.index_copy_(0, rows, found)
    return most[..., None]


def in_rows(x: Tensor, rows: Tensor, units: int) -> Tensor:
    """Return rows of x [·, each, d] as [units, most · each, d]."""
    return x.index_select(0, rows).view(units, -1, x.shape[-1])


class Room:
    """Memory for products of matrices, taken again and again."""

    def __init__(self, like: Tensor) -> None:
        self.of: dict[int, Tensor] = {}
        self.like = like

    def product(self, at: int, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b [units, ·, ·], until it is asked for at the same place again."""
        shape = (*a.shape[:2], b.shape[-1])
        count = a.shape[0] * a.shape[1] * b.shape[-1]
        if at not in self.of or len(self.of[at]) < count:
            self.of[at] = self.like.new_empty(count)
        out: Tensor = torch.bmm(a, b, out=self.of[at][:count].view(shape))
        return out


class OverGroups(torch.autograd.Function):
    """What `over_groups` gives, and its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Any) -> Tensor:
        """Go through the groups, and add what each gives to the rows that read it.

        Sums of weights are made as the products of weights and ones.
        """
        _, _, _, size, share, scale = given
        layout, (b, _, n, _), m = layout_of(q, k, share), q.shape, k.shape[2]
        units, each = layout.units, layout.each
        queries = in_units(widened(q) * scale, units).flatten(0, 1)
        keys, values = grouped_keys(k, size, units), grouped_keys(v, size, units)
        most = row_maxima(given, layout, queries, keys, (b, n, m))
        if most is None:
            keys = keys[..., :-1]
        else:
            queries = torch.cat([queries, -most], -1)
        keys, values = keys.mT.contiguous(), values[..., :-1].contiguous()
        mixed = queries.new_zeros(len(queries), each, values.shape[-1])
        total = queries.new_zeros(len(queries), each)
        room = Room(queries)
        for group, rows, shown in steps_of(given, layout, b, n, m, q.device):
            p = room.product(0, in_rows(queries, rows, b * units), keys[group])
            p = p if shown is None else p.masked_fill_(~shown, -torch.inf)
            p.exp_()
            total.index_add_(0, rows, p.sum(-1).view(-1, each))
            part = room.product(1, p, values[group])
            mixed.index_add_(0, rows, part.view(len(rows), each, -1))
        total = total[..., None]
        lse = torch.where(total > 0, total.log() if most is None else most + total.log(), torch.inf)
        out = mixed.div_(total.masked_fill(total == 0, 1))
        out = out_of_units(out.view(b * units, n + 1, each, -1), b)
        ctx.given, ctx.layout = given, layout
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(v.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Make the weights of each group again."""
        q, k, v, out, lse = ctx.saved_tensors
        _, _, _, size, _, scale = ctx.given
        layout, (b, _, n, d), m = ctx.layout, q.shape, k.shape[2]
        units, each = layout.units, layout.each
        inner = (widened(grads[0]) * out).sum(-1, keepdim=True)
        queries = torch.cat([in_units(widened(q) * scale, units).flatten(0, 1), -lse], -1)
        given = in_units(torch.cat([widened(grads[0]), -inner], -1), units).flatten(0, 1)
        keys, values = grouped_keys(k, size, units), grouped_keys(v, size, units)
        turned, of_values = keys.mT.contiguous(), values.mT.contiguous()
        keys = keys[..., :-1].contiguous()
        of_q = queries.new_zeros(len(queries), each, d)
        of_k, of_v = torch.zeros_like(keys), torch.zeros_like(values[..., :-1])
        room = Room(queries)
        for group, rows, shown in steps_of(ctx.given, layout, b, n, m, q.device):
            x, y = (in_rows(z, rows, b * units) for z in (queries, given))
            p = room.product(0, x, turned[group])
            p = p if shown is None else p.masked_fill_(~shown, -torch.inf)
            p.exp_()
            of_v[group] += p.mT @ y[..., :-1]
            s = room.product(1, y, of_values[group]).mul_(p)
            of_k[group] += s.mT @ x[..., :-1]
            part = room.product(2, s, keys[group])
            of_q.index_add_(0, rows, part.view(len(rows), each, d))
        of_q = out_of_units(of_q.view(b * units, n + 1, each, d), b) * scale
        return (
            of_q.to(q.dtype),
            ungrouped_keys(of_k, k, units),
            ungrouped_keys(of_v, v, units),
            None,
        )
