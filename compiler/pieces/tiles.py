"""Attention some queries at a time, with just the keys that they may see.

    causal and window(256), 256 queries at a time      queries 512 … 767: keys 257 … 767

A tile of the map is made, used, and made again in the backward pass, so that memory grows with
the tokens and not with their pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE = 2**20  # how many pairs are weighed at once


class Tile(NamedTuple):
    """Some rows of a batch, heads, queries, and the ranges of keys that these may see.

    `groups` are the key heads of the heads; the first `skip` queries only serve those after them.
    """

    rows: slice
    heads: slice
    groups: slice
    queries: slice
    keys: tuple[slice, ...]
    skip: int


class Standing(NamedTuple):
    """How many operands stand along queries, along keys, and along keys in the last dimension.

    After them, `tables` are of rows of the batch, but of no key or query. The first of the former
    are q and k; the last operand of all is a line where it is `biased`.
    """

    queries: int
    keys: int
    places: int
    biased: bool
    tables: int = 0

    def along(self, at: int) -> int:
        """Return the dimension in which operand number `at` stands along the tokens."""
        return -2 if at < self.queries + self.keys else -1


class Weighing(NamedTuple):
    """How a tile is weighed: by `weigh`, of what a tile is made of.

    Where there is a `scale`, it first takes q · k times that; and it `reads` q or k beside.
    `compiled` is the same compiled, with its derivative.
    """

    weigh: Callable[..., Any]
    scale: float | None
    reads: bool
    compiled: Any

    def products(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Return the products that come first, if any."""
        return () if self.scale is None else (meet(q, k, self.scale),)

    def made(self, *leaves: Any) -> tuple[Tensor, ...]:
        """Return the weights of a tile and numbers of its rows; nothing is derived of them."""
        return several((self.compiled or self).weigh(*leaves))

    def gradients(
        self, some: list[int], leaves: list[Any], outer: list[Tensor], skip: int
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the weights without the first `skip` rows, and the gradients of some leaves."""
        if self.compiled is not None:
            found: tuple[Tensor, tuple[Tensor | None, ...]]
            found = self.compiled.gradients(some, leaves, outer)
            return found
        for at in some:
            leaves[at] = leaves[at].detach().requires_grad_()
        with torch.enable_grad():
            made = [x[..., skip:, :] for x in several(self.weigh(*leaves))]
        outer[0] = outer[0].to(made[0].dtype)
        pairs = [(x, grad) for x, grad in zip(made, outer, strict=True) if x.requires_grad]
        if not pairs:
            return made[0], (None,) * len(some)
        outputs, theirs = zip(*pairs, strict=True)
        inputs = [leaves[at] for at in some]
        grads = torch.autograd.grad(outputs, inputs, theirs, allow_unused=True)
        return made[0].detach(), grads


def meet(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale` times the products [b, h, n, m] of q [b, h, n, d] and k [b, g, m, d].

    They are float32 at least. A group of h / g query heads reads one key head, which is not
    copied for them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    exact = q.dtype == wide  # else a scaled query would lose digits
    q = q * scale if exact and scale != 1 else q
    if q.shape[1] == k.shape[1]:
        s = q @ k.mT
    else:
        b, heads, n, d = q.shape
        each = heads // k.shape[1] * n
        s = (q.reshape(b, k.shape[1], each, d) @ k.mT).view(b, heads, n, k.shape[-2])
    return s.to(wide) if exact or scale == 1 else s.to(wide) * scale


def mixed(p: Tensor, v: Tensor) -> Tensor:
    """Return the sums [b, h, n, e] of values [b, g, m, e] by weights [b, h, n, m]."""
    p = p.to(v.dtype)
    if p.shape[1] == v.shape[1]:
        return p @ v
    b, heads, n, m = p.shape
    each = heads // v.shape[1] * n
    return (p.reshape(b, v.shape[1], each, m) @ v).view(b, heads, n, v.shape[-1])


def over_tiles(
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...] = (),
    tensors: tuple[Any, ...] = (),
    *,
    tables: tuple[Any, ...] = (),
    scale: float | None = None,
    reads: bool = False,
    compiled: Callable[..., Any] | None = None,
    start: int | None = None,
    back: int | None = None,
    ahead: int | None = None,
    prefix: int = 0,
    own: Tensor | None = None,
    before: int = 0,
    width: int = 1,
    whole: bool = False,
    apart: bool = False,
    line: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    visible: Callable[..., Tensor] | None = None,
    at_once: Callable[..., Tensor] | None = None,
) -> Any:
    """Return the mixed values [b, h, n, e], and what else `weigh` gives of each query.

    weigh(*queries, *keys, *places, *tables, *tensors) gives the weights [b, h, n, m], or these
    and numbers [b, h, n, ·]. `queries` [..., n, ·] and `keys` [..., m, ·] stand along the tokens,
    `places` [..., m] along the last dimension; the first of them are q and k. `tables` [b, …] are
    read at any place. Where there is a
    `scale`, `weigh` takes their products times that before all else; it may `read` them as well.

    Query `a` is key `start + a`, None where that is not known; then it sees keys up to `back`
    before it and `ahead` after it, of its sequence `own` [b, 1, n, 1], and the first `prefix`.
    A row reads the `before` queries before it, a pair takes `width` numbers, heads that stand
    `apart` are weighed alike, and a `whole` map is made at once; `at_once` gives the mixed values
    of all, where that is better. visible(*queries, …) says who sees whom. What is added to the
    logits by `line(q, i, j)`, of distances i [d] and j = 0, is the last that `weigh` takes; then
    heads need only stand apart beside it. Tiles are weighed by compiled(weigh), where it is given.
    """
    q, k = queries[0], keys[0]
    (b, heads, n, _), m = q.shape, k.shape[2]
    operands = (*queries, *keys, *places, *tables, *tensors)
    none = () if line is None else (None,)
    how = Weighing(weigh, scale, reads, None)
    for_all = torch.compiler.is_compiling()  # then no size is asked for: it would be a guard
    few = whole or for_all or b * heads * n * m * width <= TILE
    a_step = not (q.is_cuda or for_all) and n < 8 and m >= 4096
    if at_once is not None and (few or q.is_cuda) and not a_step:  # whose keys are not copied
        return at_once(v, *operands)
    if few:
        made = several(weigh(*how.products(q, k), *operands, *none))
        done = (mixed(made[0], v), *made[1:])
        return done if len(done) > 1 else done[0]
    alike = compiled is not None and n > 1  # a single query is compiled for by itself
    how = how._replace(compiled=compiled(weigh)) if compiled is not None and alike else how
    standing = Standing(len(queries), len(keys), len(places), False, len(tables))
    rows = ranges_of(q, m, start, back, ahead, prefix, own, max(128, 4 * before))
    turned = line is not None and start is not None
    if line is not None and start is not None:  # from the last key back, as the line goes
        distances = torch.arange(start - m + 1, start + n, device=q.device)
        found = line(q, distances, torch.zeros_like(distances))
        keys = tuple(None if x is None else x.flip(-2) for x in keys)
        places = tuple(None if x is None else x.flip(-1) for x in places)
        v = v.flip(-2)
        given = (*queries, *keys, *places, *tables, *tensors, found.reshape(-1, found.shape[-1]))
    else:
        given = (*operands, *none)
        if visible is not None:
            rows = [seen_ranges(visible, each, standing, operands) for each in rows]
    if alike:
        rows = [(*row[:3], two_keys(row[3], m)) for row in rows]
    tiles = [
        tile._replace(keys=tuple(slice(m - x.stop, m - x.start) for x in tile.keys[::-1]))
        if turned else tile
        for tile in tiles_of(
            q, k, v, rows, before, width, apart and turned == (line is not None), alike
        )
    ]  # fmt: skip
    done = OverTiles.apply(how, tiles, standing._replace(biased=turned), v, *given)
    return done if len(done) > 1 else done[0]


def in_steps(first: int, end: int, count: int) -> list[tuple[int, int]]:
    """Return ranges of `count` numbers from first to end; the last is never a single one of them.

    What is compiled for two rows or more is not for one.
    """
    edges = list(range(first, end, count))
    if len(edges) > 1 and end - edges[-1] == 1:
        edges.pop()
    return list(zip(edges, [*edges[1:], end], strict=True))


def two_keys(keys: tuple[slice, ...], m: int) -> tuple[slice, ...]:
    """Return ranges of m keys, two of them at least: one that nobody sees weighs nothing."""
    first = keys[0].start
    if m < 2 or sum(each.stop - each.start for each in keys) > 1:
        return keys
    return (slice(min(first, m - 2), min(first, m - 2) + 2),)


def ranges_of(
    q: Tensor,
    m: int,
    start: int | None,
    back: int | None,
    ahead: int | None,
    prefix: int,
    own: Tensor | None,
    count: int,
) -> list[tuple[slice, int, int, tuple[slice, ...]]]:
    """Return which of m keys each `count` queries of q [b, h, n, d] may see.

    A range is of all rows of a batch, or of each one where sequences `own` tell them apart.
    """
    b, _, n, _ = q.shape
    edges = in_steps(0, n, count)
    first, last = [0] * len(edges), [m] * len(edges)
    if start is not None:
        if back is not None:
            first = [max(0, start + a - back) for a, _ in edges]
        if ahead is not None:
            last = [max(0, min(m, start + e + ahead)) for _, e in edges]
    found = []
    together = own is None or start != 0 or own.shape[0] == 1
    for row in range(1 if together else b):
        low, high, sinks = first, last, [0] * len(edges)
        if own is not None and start == 0:
            run = own[row : row + 1, 0, :, 0].contiguous()
            low, high, sinks = within_sequences(run, edges, first, last, prefix)
        for (a, e), lo, hi, sink in zip(edges, low, high, sinks, strict=True):
            ranges = united(sink, min(m, sink + prefix), lo, hi)
            found.append((slice(0, b) if together else slice(row, row + 1), a, e, ranges))
    return found


def seen_ranges(
    visible: Callable[..., Tensor],
    row: tuple[slice, int, int, tuple[slice, ...]],
    standing: Standing,
    given: tuple[Any, ...],
) -> tuple[slice, int, int, tuple[slice, ...]]:
    """Return a row of the map with the keys that any of its queries sees, in blocks of 64."""
    rows, a, e, keys = row
    every, found = slice(None), []
    for each in keys:
        tile = Tile(rows, every, every, slice(a, e), (each,), 0)
        part = visible(*cut(tile, standing, given))
        count = each.stop - each.start
        some = part.expand(*part.shape[:-1], count).reshape(-1, count).any(0)
        blocks = torch.nn.functional.pad(some, (0, -count % 64)).view(-1, 64).any(1)
        edges = torch.nn.functional.pad(blocks.to(torch.int8), (1, 1)).diff().nonzero()[:, 0]
        for first, last in edges.view(-1, 2).tolist():
            found.append(slice(each.start + 64 * first, min(each.start + 64 * last, each.stop)))
    return rows, a, e, tuple(found) or (slice(0, 1),)


def tiles_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[tuple[slice, int, int, tuple[slice, ...]]],
    before: int,
    width: int,
    apart: bool,
    alike: bool,
) -> list[Tile]:
    """Cut rows of the map into tiles of about TILE pairs: by heads, rows, queries at last.

    Those that are `alike` are of one row, and of two heads or more where there are two.
    """
    heads, groups = q.shape[1], max(k.shape[1], v.shape[1])
    each, apart = heads // groups, apart and k.shape[1] == v.shape[1]
    tiles = []
    for row, a, e, keys in rows:
        seen = sum(x.stop - x.start for x in keys)
        room = max(1, TILE // max(1, (e - a) * seen * width))
        some = max(2 if alike else 1, min(groups, room // each)) if apart else groups
        batch = 1 if alike else max(1, min(row.stop - row.start, room // (some * each)))
        count, of_query = e - a, max(1, batch * some * each * seen * width)
        if count * of_query > TILE:
            count = max(16, 4 * before, TILE // of_query // 16 * 16)
        for r in range(row.start, row.stop, batch):
            for g, until in in_steps(0, groups, some):
                for at, end in in_steps(a, e, count):
                    skip = min(before, at)
                    tiles.append(Tile(
                        slice(r, min(r + batch, row.stop)), slice(g * each, until * each),
                        slice(g, until) if apart else slice(None),
                        slice(at - skip, end), keys, skip,
                    ))  # fmt: skip
    return tiles


def within_sequences(
    run: Tensor, edges: list[tuple[int, int]], first: list[int], last: list[int], prefix: int
) -> tuple[list[int], list[int], list[int]]:
    """Keep the ranges [first, last) of some queries within their sequences `run` [1, n].

    Returns them, and where the sequences begin whose first `prefix` keys are seen as well;
    where queries are of several of them, these are in the range.
    """
    at = torch.tensor(edges, device=run.device).T
    begun, later = (
        torch.searchsorted(run, run[:, each])[0].tolist() for each in (at[0], at[1] - 1)
    )
    ended = torch.searchsorted(run, run[:, at[1] - 1], right=True)[0].tolist()
    near = [max(lo, sink) if sink == end or not prefix else sink
            for lo, sink, end in zip(first, begun, later, strict=True)]  # fmt: skip
    return near, [*map(min, last, ended)], begun


def united(a: int, b: int, c: int, d: int) -> tuple[slice, ...]:
    """Return the ranges [a, b) and [c, d), a <= c, as one where they touch."""
    if a == b:
        return (slice(c, max(c, d)),)
    if c <= b:
        return (slice(a, max(b, d)),)
    return (slice(a, b), slice(c, max(c, d)))


def several(made: Any) -> tuple[Tensor, ...]:
    """Return what a function gave as a tuple, also where it is one tensor."""
    return made if isinstance(made, tuple) else (made,)


def joined_parts(parts: list[Tensor], dim: int) -> Tensor:
    """Return parts one after the other; a single one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def along_keys(x: Tensor, tile: Tile, dim: int) -> list[Tensor]:
    """Return the parts of x along a dimension of keys that a tile is of."""
    if x.shape[dim] == 1:
        return [x]
    return [x.narrow(dim, each.start, each.stop - each.start) for each in tile.keys]


def parts_of(x: Tensor, at: int, standing: Standing, tile: Tile) -> list[Tensor]:
    """Return the parts of operand number `at` that a tile is made of; what is no batch is whole."""
    queries, keys, places, _, tables = standing
    if at >= queries + keys + places + tables:
        return [x]
    x = x[tile.rows] if x.ndim > 2 and x.shape[0] > 1 else x
    if at >= queries + keys + places:
        return [x]
    if at < queries:
        x = x[:, tile.heads] if at == 0 else x
        return [x[..., tile.queries, :] if x.shape[-2] > 1 else x]
    x = x[:, tile.groups] if at == queries else x
    return along_keys(x, tile, standing.along(at))


def of_line(line: Tensor, tile: Tile) -> Tensor:
    """Return the part [heads, queries, keys] of a line [heads, n + m - 1] that a tile is of.

    Query a and key c, of keys from the last to the first, have its number a + c.
    """
    line = line[tile.heads] if len(line) > 1 else line
    count, first = (
        tile.queries.stop - tile.queries.start,
        line.storage_offset() + tile.queries.start,
    )
    parts = [
        line.as_strided((len(line), count, each.stop - each.start), (line.stride(0), 1, 1),
                        first + each.start)
        for each in tile.keys
    ]  # fmt: skip
    return joined_parts(parts, -1)


def add_to_line(into: Tensor, tile: Tile, grad: Tensor) -> None:
    """Add what a tile gives to the gradient of a line: the sums along its diagonals."""
    into = into[tile.heads] if len(into) > 1 else into
    heads, count, at = len(into), grad.shape[1], 0
    for each in tile.keys:
        width = each.stop - each.start
        part = torch.nn.functional.pad(grad[..., at : at + width], (0, count))
        sheared = part.flatten(1)[:, : count * (width + count - 1)].view(heads, count, -1)
        first = tile.queries.start + each.start
        into[:, first : first + width + count - 1] += sheared.sum(1)
        at += width


def cut(tile: Tile, standing: Standing, given: tuple[Any, ...]) -> list[Any]:
    """Return what a tile is made of."""
    parts: list[Any] = []
    for at, x in enumerate(given):
        if x is None:
            parts.append(None)
        elif standing.biased and at == len(given) - 1:
            parts.append(of_line(x, tile))
        else:
            parts.append(joined_parts(parts_of(x, at, standing, tile), standing.along(at)))
    return parts


def values_of(v: Tensor, tile: Tile) -> Tensor:
    """Return the values [b, g, m, e] that a tile mixes."""
    return joined_parts(along_keys(v[tile.rows, tile.groups], tile, -2), -2)


def results_of(x: Tensor, tile: Tile) -> Tensor:
    """Return the part of a result x [b, h, n, ·] that a tile gives."""
    return x[tile.rows, tile.heads, tile.queries.start + tile.skip : tile.queries.stop]


class OverTiles(torch.autograd.Function):
    """What `over_tiles` gives, and its gradients, of one tile after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Weighing,
        tiles: list[Tile],
        standing: Standing,
        v: Tensor,
        *given: Any,
    ) -> tuple[Tensor, ...]:
        """Weigh every tile, keep nothing of it."""
        ctx.how, ctx.tiles, ctx.standing = how, tiles, standing
        kind = v.device.type
        ctx.cast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(v, *given)
        b, heads, n, _ = given[0].shape
        done: list[Tensor] = []
        for tile in tiles:
            cuts = cut(tile, standing, given)
            made = how.made(*how.products(cuts[0], cuts[standing.queries]), *cuts)
            parts = [mixed(made[0], values_of(v, tile)), *made[1:]]
            done = done or [x.new_empty(b, heads, n, x.shape[-1]) for x in parts]
            for whole, part in zip(done, parts, strict=True):
                results_of(whole, tile).copy_(part[..., tile.skip :, :] if tile.skip else part)
        return tuple(done)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Weigh every tile again."""
        v, *given = ctx.saved_tensors
        with torch.autocast(ctx.cast[0], ctx.cast[1], ctx.cast[2]):
            if torch.is_grad_enabled():  # a derivative of this derivative is asked for
                return (None, None, None, *differentiable(ctx, v, given, grads))
            sums = [torch.zeros_like(x) if need else None
                    for x, need in zip(given, ctx.needs_input_grad[4:], strict=True)]  # fmt: skip
            of_v = torch.zeros_like(v)
            for tile in ctx.tiles:
                add_tile(ctx, tile, v, given, sums, of_v, grads)
        return (None, None, None, of_v if ctx.needs_input_grad[3] else None, *sums)


def add_tile(
    ctx: Any,
    tile: Tile,
    v: Tensor,
    given: list[Any],
    sums: list[Tensor | None],
    of_v: Tensor,
    grads: tuple[Tensor, ...],
) -> None:
    """Add the gradients of one tile to those of v and of all that is given."""
    how, standing = ctx.how, ctx.standing
    parts = cut(tile, standing, tuple(given))
    q, k = parts[0], parts[standing.queries]
    met = how.products(q, k)
    apart = (0, standing.queries) if met and not how.reads else ()
    wanted = [at for at, into in enumerate(sums) if into is not None and at not in apart]
    some = [*range(len(met)), *(at + len(met) for at in wanted)]
    of_o, *outer = (results_of(x, tile) for x in grads)
    of_p = meet(of_o, values_of(v, tile))
    p, found = how.gradients(some, [*met, *parts], [of_p, *outer], tile.skip)
    p, groups = p.to(v.dtype), v[:1, tile.groups].shape[1]
    p, of_o = (x.reshape(len(p), groups, -1, x.shape[-1]) for x in (p, of_o))
    add_products(along_keys(of_v[tile.rows, tile.groups], tile, -2), p.mT, of_o)
    if met:
        of_s, *found = found
        if of_s is not None:
            add_met(of_s, q, k, how.scale, sums, tile, standing)
    for at, grad in zip(wanted, found, strict=True):
        into = sums[at]
        if grad is None or into is None:
            continue
        if standing.biased and at == len(sums) - 1:
            add_to_line(into, tile, grad)
        else:
            add(parts_of(into, at, standing, tile), grad, standing.along(at))


def add_met(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    sums: list[Tensor | None],
    tile: Tile,
    standing: Standing,
) -> None:
    """Add what the gradient of meet(q, k, scale) is for q and k."""
    of_q, of_k = sums[0], sums[standing.queries]
    exact = q.dtype == grad.dtype  # as in `meet`, whose digits are kept
    grad = (grad if exact else grad * scale).to(q.dtype)
    grad = grad.reshape(len(grad), k.shape[1], -1, grad.shape[-1])
    if of_q is not None:
        found = (grad @ k).view(q.shape)
        add(parts_of(of_q, 0, standing, tile), found * scale if exact else found, -2)
    if of_k is not None:
        each = (q * scale if exact else q).reshape(len(q), k.shape[1], -1, q.shape[-1])
        add_products(parts_of(of_k, standing.queries, standing, tile), grad.mT, each)


def add_products(parts: list[Tensor], a: Tensor, b: Tensor) -> None:
    """Add a [b, g, m, n] @ b [b, g, n, d] to parts that stand one after the other along m."""
    at = 0
    for part in parts:
        some = a.narrow(-2, at, part.shape[-2])
        at += part.shape[-2]
        for into, one, other in zip(part, some, b, strict=True):
            into.baddbmm_(one, other)  # in place: no product that is only added is written


def add(parts: list[Tensor], grad: Tensor, dim: int) -> None:
    """Add a gradient to the parts that stand one after the other along a dimension."""
    if len(parts) == 1:
        parts[0].add_(grad)
        return
    at = 0
    for part in parts:
        part.add_(grad.narrow(dim, at, part.shape[dim]))
        at += part.shape[dim]


def differentiable(
    ctx: Any, v: Tensor, given: list[Any], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of v and of all that is given, with derivatives of their own."""
    operands = [*given[:-1], every_pair(given[-1], given)] if ctx.standing.biased else given
    met = ctx.how.products(given[0], given[ctx.standing.queries])
    made = several(ctx.how.weigh(*met, *operands))
    outputs = [mixed(made[0], v), *made[1:]]
    inputs = [v, *given]
    wanted = [at for at, need in enumerate(ctx.needs_input_grad[3:]) if need]
    found = torch.autograd.grad(
        outputs, [inputs[at] for at in wanted], grads, create_graph=True, allow_unused=True
    )
    every: list[Tensor | None] = [None] * len(inputs)
    for at, grad in zip(wanted, found, strict=True):
        every[at] = grad
    return tuple(every)


def every_pair(line: Tensor, given: list[Any]) -> Tensor:
    """Return a line [heads, n + m - 1] laid out for every pair, with derivatives."""
    n, m = given[0].shape[2], line.shape[1] - given[0].shape[2] + 1
    at = torch.arange(n, device=line.device)[:, None] + torch.arange(m, device=line.device)
    return line[:, at]


def with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v with one more feature: `scale` times the product of q and k has bias in it.

    bias is [b, h or 1, m]. Key and value heads are repeated to those of the queries. A CPU takes
    any number of features, others multiples of eight; those of v are zero.
    """
    heads, d = q.shape[1], q.shape[-1]
    k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
            for x in (k, v))  # fmt: skip
    bias = (bias.to(k.dtype) / scale).expand(k.shape[0], heads, -1)[..., None]
    size = max(d, v.shape[-1]) + 1
    size += 0 if q.device.type == "cpu" else -size % 8
    rest = size - d - 1
    q = torch.cat([q, q.new_ones(1).expand(*q.shape[:-1], 1), *_none(q, rest)], dim=-1)
    k = torch.cat([k, bias, *_none(k, rest)], dim=-1)
    return q, k, torch.nn.functional.pad(v, (0, size - v.shape[-1]))


def _none(x: Tensor, features: int) -> list[Tensor]:
    return [x.new_zeros(1).expand(*x.shape[:-1], features)] if features else []
