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


class Tile(NamedTuple):
    """Some rows of a batch, some of their queries, and the ranges of keys that these may see.

    The first `skip` queries only serve those after them.
    """

    rows: slice
    queries: slice
    keys: tuple[slice, ...]
    skip: int


def turned(tile: Tile, m: int) -> Tile:
    """Return a tile where the m keys stand from the last to the first."""
    keys = [slice(m - each.stop, m - each.start) for each in reversed(tile.keys)]
    return tile._replace(keys=tuple(keys))


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
        s = (q.reshape(b, k.shape[1], -1, d) @ k.mT).view(b, heads, n, k.shape[-2])
    return s.to(wide) if exact or scale == 1 else s.to(wide) * scale


def mixed(p: Tensor, v: Tensor) -> Tensor:
    """Return the sums [b, h, n, e] of values [b, g, m, e] by weights [b, h, n, m]."""
    p = p.to(v.dtype)
    if p.shape[1] == v.shape[1]:
        return p @ v
    b, heads, n, m = p.shape
    return (p.reshape(b, v.shape[1], -1, m) @ v).view(b, heads, n, v.shape[-1])


def over_tiles(
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...] = (),
    tensors: tuple[Any, ...] = (),
    *,
    start: int | None = None,
    back: int | None = None,
    ahead: int | None = None,
    prefix: int = 0,
    own: Tensor | None = None,
    before: int = 0,
    width: int = 1,
    whole: bool = False,
    line: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    at_once: Callable[..., Tensor] | None = None,
) -> Any:
    """Return the mixed values [b, h, n, e], and what else `weigh` gives of each query.

    weigh(*queries, *keys, *places, *tensors) gives the weights [b, h, n, m], or these and
    numbers [b, h, n, ·]. `queries` [..., n, ·] and `keys` [..., m, ·] stand along the tokens,
    `places` [..., m] along the last dimension; the first of them are q and k.

    Query `a` is key `start + a`, None where that is not known; then it sees keys up to `back`
    before it and `ahead` after it, of its sequence `own` [b, 1, n, 1], and the first `prefix`.
    A row reads the `before` queries before it, a pair takes `width` numbers, and a `whole` map
    is made at once; `at_once` gives the mixed values of all, where that is better. What is added
    to the logits by `line(q, i, j)`, of distances i [d] and j = 0, is the last that `weigh` takes.
    """
    q, k = queries[0], keys[0]
    (b, heads, n, _), m = q.shape, k.shape[2]
    few = whole or torch.compiler.is_compiling() or b * heads * n * m * width <= TILE
    if at_once is not None and (few or q.is_cuda):
        return at_once(v, *queries, *keys, *places, *tensors)
    if few:
        bias = () if line is None else (None,)
        made = several(weigh(*queries, *keys, *places, *tensors, *bias))
        done = (mixed(made[0], v), *made[1:])
        return done if len(done) > 1 else done[0]
    tiles = tiles_of(q, k, start, back, ahead, prefix, own, before, width)
    counts = (len(queries), len(keys), len(places))
    added: tuple[Any, ...] = () if line is None else (None,)
    if line is not None and start is not None:  # from the last key back, as the line goes
        distances = torch.arange(start - m + 1, start + n, device=q.device)
        found = line(q, distances, torch.zeros_like(distances))
        added = (found.reshape(-1, found.shape[-1]),)
        v = v.flip(-2)
        keys = tuple(None if x is None else x.flip(-2) for x in keys)
        places = tuple(None if x is None else x.flip(-1) for x in places)
        tiles = [turned(each, m) for each in tiles]
    given = (*queries, *keys, *places, *tensors, *added)
    done = OverTiles.apply(weigh, tiles, counts, line is not None, v, *given)
    return done if len(done) > 1 else done[0]


TILE = 2**21  # how many pairs are weighed at once


def tiles_of(
    q: Tensor,
    k: Tensor,
    start: int | None,
    back: int | None,
    ahead: int | None,
    prefix: int,
    own: Tensor | None,
    before: int,
    width: int,
) -> list[Tile]:
    """Cut the map of q [b, h, n, d] and k [b, g, m, d] into tiles, none with too many pairs."""
    (b, heads, n, _), m = q.shape, k.shape[2]
    reach = m if start is None or back is None or ahead is None else back + ahead + prefix
    seen = min(m, reach + (256 if reach < m else 0))
    rows = max(1, min(b, TILE // (64 * heads * seen * width)))
    count = max(4 * before, min(256, max(16, TILE // (rows * heads * seen * width) // 16 * 16)))
    edges = [(a, min(a + count, n)) for a in range(0, n, count)]
    first, last = [0] * len(edges), [m] * len(edges)
    if start is not None:
        if back is not None:
            first = [max(0, start + a - back) for a, _ in edges]
        if ahead is not None:
            last = [max(0, min(m, start + e + ahead)) for _, e in edges]
    tiles = []
    for row in range(0, b, rows):
        low, high, sinks = first, last, [0] * len(edges)
        if own is not None and start == 0:
            run = own[row : row + rows, 0, :, 0].contiguous()
            low, high, sinks = within_sequences(run, edges, first, last, prefix)
        for (a, e), lo, hi, sink in zip(edges, low, high, sinks, strict=True):
            skip = min(before, a)
            ranges = united(sink, min(m, sink + prefix), lo, hi)
            tiles.append(Tile(slice(row, row + rows), slice(a - skip, e), ranges, skip))
    return tiles


def within_sequences(
    run: Tensor, edges: list[tuple[int, int]], first: list[int], last: list[int], prefix: int
) -> tuple[list[int], list[int], list[int]]:
    """Keep the ranges [first, last) of some queries within their sequences `run` [b, n].

    Returns them, and where the sequences begin whose first `prefix` keys are seen as well;
    where queries are of several of them, these are in the range.
    """
    at = torch.tensor(edges, device=run.device).T
    begun, later = (torch.searchsorted(run, run[:, each]) for each in (at[0], at[1] - 1))
    ended = torch.searchsorted(run, run[:, at[1] - 1], right=True).amax(0).tolist()
    sinks, one = begun.amin(0).tolist(), (later.amax(0) == begun.amin(0)).tolist()
    near = [max(lo, sink) if same or not prefix else sink
            for lo, sink, same in zip(first, sinks, one, strict=True)]  # fmt: skip
    return near, [*map(min, last, ended)], sinks


def united(a: int, b: int, c: int, d: int) -> tuple[slice, ...]:
    """Return the ranges [a, b) and [c, d), a <= c, as one where they touch."""
    if a == b or c <= b:
        return (slice(c if a == b else a, max(b if a != b else c, d)),)
    return (slice(a, b), slice(c, max(c, d)))


def several(made: Any) -> tuple[Tensor, ...]:
    """Return what a function gave as a tuple, also where it is one tensor."""
    return made if isinstance(made, tuple) else (made,)


def of_rows(x: Tensor, tile: Tile) -> Tensor:
    """Return the rows of x [b, …] that a tile is of; what has no batch is of all."""
    return x[tile.rows] if x.ndim > 2 and x.shape[0] > 1 else x


def of_queries(x: Tensor, tile: Tile) -> Tensor:
    """Return the queries of x [..., n, ·] that a tile is of."""
    x = of_rows(x, tile)
    return x[..., tile.queries, :] if x.shape[-2] > 1 else x


def of_keys(x: Tensor, tile: Tile, dim: int) -> Tensor:
    """Return the keys of x along a dimension that a tile is of."""
    x = of_rows(x, tile)
    if x.shape[dim] == 1:
        return x
    parts = [x.narrow(dim, each.start, each.stop - each.start) for each in tile.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def of_line(line: Tensor, tile: Tile) -> Tensor:
    """Return the part [heads, queries, keys] of a line [heads, n + m - 1] that a tile is of.

    Query a and key c, of keys from the last to the first, have its number a + c.
    """
    count, heads = tile.queries.stop - tile.queries.start, len(line)
    parts = [
        line.as_strided(
            (heads, count, each.stop - each.start), (line.stride(0), 1, 1),
            line.storage_offset() + tile.queries.start + each.start,
        )
        for each in tile.keys
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def add_to_line(into: Tensor, tile: Tile, grad: Tensor) -> None:
    """Add what a tile gives to the gradient of a line: the sums along its diagonals."""
    heads, count, at = len(into), grad.shape[1], 0
    for each in tile.keys:
        width = each.stop - each.start
        part = torch.nn.functional.pad(grad[..., at : at + width], (0, count))
        sheared = part.flatten(1)[:, : count * (width + count - 1)].view(heads, count, -1)
        first = tile.queries.start + each.start
        into[:, first : first + width + count - 1] += sheared.sum(1)
        at += width


def cut(
    tile: Tile, counts: tuple[int, int, int], biased: bool, given: tuple[Any, ...]
) -> list[Any]:
    """Return the parts of queries, keys, places, tensors and of a line that a tile is made of."""
    queries, keys, places = counts
    parts: list[Any] = []
    for at, x in enumerate(given):
        if x is not None and biased and at == len(given) - 1:
            parts.append(of_line(x, tile))
        elif x is None or at >= queries + keys + places:
            parts.append(x)
        elif at < queries:
            parts.append(of_queries(x, tile))
        else:
            parts.append(of_keys(x, tile, -2 if at < queries + keys else -1))
    return parts


class OverTiles(torch.autograd.Function):
    """What `over_tiles` gives, and its gradients, of one tile after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        weigh: Callable[..., Any],
        tiles: list[Tile],
        counts: tuple[int, int, int],
        biased: bool,
        v: Tensor,
        *given: Any,
    ) -> tuple[Tensor, ...]:
        """Weigh every tile, keep nothing of it."""
        ctx.weigh, ctx.tiles, ctx.counts, ctx.biased = weigh, tiles, counts, biased
        kind = v.device.type
        ctx.cast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(v, *given)
        b, heads, n, _ = given[0].shape
        done: list[Tensor] = []
        for tile in tiles:
            made = several(weigh(*cut(tile, counts, biased, given)))
            parts = [mixed(made[0], of_keys(v, tile, -2)), *made[1:]]
            done = done or [x.new_empty(b, heads, n, x.shape[-1]) for x in parts]
            for whole, part in zip(done, parts, strict=True):
                at = slice(tile.queries.start + tile.skip, tile.queries.stop)
                whole[tile.rows, :, at] = part[..., tile.skip :, :]
        return tuple(done)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Weigh every tile again."""
        v, *given = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        with torch.autocast(ctx.cast[0], ctx.cast[1], ctx.cast[2]):
            if torch.is_grad_enabled():  # a derivative of this derivative is asked for
                return (None, None, None, None, *differentiable(ctx, v, given, grads))
            sums = [torch.zeros_like(x) if need else None
                    for x, need in zip(given, needed, strict=True)]  # fmt: skip
            of_v = torch.zeros_like(v)
            for tile in ctx.tiles:
                add_tile(ctx, tile, v, given, sums, of_v, grads)
        return (None, None, None, None, of_v if ctx.needs_input_grad[4] else None, *sums)


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
    parts = cut(tile, ctx.counts, ctx.biased, tuple(given))
    leaves = [x if into is None else x.detach().requires_grad_()
              for x, into in zip(parts, sums, strict=True)]  # fmt: skip
    with torch.enable_grad():
        made = [x[..., tile.skip :, :] for x in several(ctx.weigh(*leaves))]
    own = Tile(tile.rows, slice(tile.queries.start + tile.skip, tile.queries.stop), tile.keys, 0)
    outer = [of_queries(x, own) for x in grads]
    values, p = of_keys(v, tile, -2), made[0].detach().to(v.dtype)
    groups = v.shape[1]
    p = p.reshape(len(p), groups, -1, p.shape[-1])
    add(of_v, tile, -2, p.mT @ outer[0].reshape(len(p), groups, -1, v.shape[-1]))
    outer[0] = meet(outer[0], values).to(made[0].dtype)
    wanted = [at for at, into in enumerate(sums) if into is not None]
    pairs = [(x, grad) for x, grad in zip(made, outer, strict=True) if x.requires_grad]
    if not wanted or not pairs:
        return
    outputs, theirs = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, [leaves[at] for at in wanted], theirs, allow_unused=True)
    queries, keys, places = ctx.counts
    for at, grad in zip(wanted, found, strict=True):
        into = sums[at]
        if grad is None or into is None:
            continue
        if ctx.biased and at == len(sums) - 1:
            add_to_line(into, tile, grad)
        elif at < queries:
            of_queries(into, tile).add_(grad)
        elif at < queries + keys + places:
            add(into, tile, -2 if at < queries + keys else -1, grad)
        else:
            into.add_(grad)


def add(into: Tensor, tile: Tile, dim: int, grad: Tensor) -> None:
    """Add what a tile gives to the gradient of keys."""
    into = of_rows(into, tile)
    if into.shape[dim] == 1:
        into.add_(grad)
        return
    at = 0
    for each in tile.keys:
        count = each.stop - each.start
        into.narrow(dim, each.start, count).add_(grad.narrow(dim, at, count))
        at += count


def differentiable(
    ctx: Any, v: Tensor, given: list[Any], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of v and of all that is given, with derivatives of their own."""
    bias = [] if not ctx.biased else [None if given[-1] is None else every_pair(given[-1], given)]
    made = several(ctx.weigh(*(given[:-1] if ctx.biased else given), *bias))
    outputs = [mixed(made[0], v), *made[1:]]
    inputs = [v, *given]
    wanted = [at for at, need in enumerate(ctx.needs_input_grad[4:]) if need]
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
