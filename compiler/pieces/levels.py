"""States that are kept in levels: one for each level of a tree over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import (
    after_each,
    chunk_size,
    earlier_products,
    faded_products,
    in_chunks,
    one_later,
    tokens_of_chunks,
    unit_inverse,
)
from .steps import over_tokens


def leveled_linear(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor | None, weights: Tensor,
    state: Tensor, place: int | Tensor, fresh: Tensor | None = None, counts: Tensor | None = None,
    before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sum over levels l of weights_il q_i @ S_il [b, h, n, e], and the last levels.

    In every level S_i = decay_i S_{i-1} + outer(k_i, w_i @ S_{i-1}); outer(k_i, v_i) is written
    into level 0 alone, and levels are merged as `merged_levels` says (Guo et al. 2025). decay is
    [b, h, n, 1 or d], weights are [b, h, n, levels]; `state` [b, h, levels, d, e] is what `place`
    tokens left behind, one number or [b]. With `before`, q_i reads what token i finds. At `fresh`
    tokens [b, 1, n, 1] all begins anew; of a row the first `counts` [b] tokens are taken up.

    Within a chunk, tokens meet in one product, weighed by the level in which i finds j. Chunks
    begin at multiples of their size, so that `across_chunks` merges whole ones.
    """
    n, dtype, most = q.shape[2], state.dtype, state.shape[2] - 1
    if n == 0:
        return q @ summed_levels(state, weights.new_zeros(state.shape[:3])), state
    if fresh is not None or counts is not None or (isinstance(place, Tensor) and n > 1):
        apart = leveled_by_token if torch.compiler.is_compiling() else leveled_by_row
        return apart(q, k, v, w, decay, weights, state, place, fresh, counts, before)
    decay = torch.ones_like(k[..., :1]) if decay is None else decay
    q, k, v, decay, weights = (each.to(dtype) for each in (q, k, v, decay, weights))
    w = None if w is None else w.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if n == 1:  # a step of decoding
            at = place if isinstance(place, int) else place[:, None, None]
            state = merged_levels(state, at)
            last = decay[:, :, 0, None, :, None] * state
            if w is not None:
                last = last + k.mT[:, :, None] @ (w[:, :, None] @ state)
            last = with_written(last, k.mT @ v)
            return q @ summed_levels(state if before else last, weights[:, :, 0]), last
        assert isinstance(place, int)
        size = chunk_size(n, 64)
        front = place % size
        q, k, v, weights = (
            in_chunks(F.pad(each, (0, 0, front, 0)), size, 0.0) for each in (q, k, v, weights)
        )
        decay = in_chunks(F.pad(decay, (0, 0, front, 0), value=1.0), size, 1.0)
        since = decay.cumprod(-2)
        begun = one_later(since, 1.0)
        pairs = earlier_products(q, k, decay) if before else faded_products(q, k, decay)
        reads = q * (begun if before else since)
        keeps, writes = since[..., -1, :, None], (k * after_each(decay)).mT
        if w is not None:  # what a token writes depends on what those before it wrote
            w = in_chunks(F.pad(w, (0, 0, front, 0)), size, 0.0)
            inverse = unit_inverse(earlier_products(w, k, decay))
            reach = inverse @ (w * begun)
            reads = reads + pairs @ reach
            keeps = keeps * torch.eye(k.shape[-1], dtype=dtype, device=q.device) + writes @ reach
            pairs, writes = pairs @ inverse, writes @ inverse
        token = torch.arange(size, device=q.device)
        found = level_between(token[:, None], token).clamp(max=most)
        within = (pairs * weights.gather(-1, found.expand(pairs.shape))) @ v
        end = torch.full((1,), front + n - 1, device=q.device)
        here = level_between(token, end % size).clamp(max=most)
        here = here == torch.arange(most + 1, device=q.device)[:, None]
        written, of_end = (each.index_select(2, end // size) for each in (writes, v))
        last = (written * here[:, None]) @ of_end
        if torch.compiler.is_compiling() and place == 0:
            across, older = chunk_by_chunk(reads, keeps, writes @ v, weights, state, end // size)
        else:
            across, older = across_chunks(
                reads, keeps, writes @ v, weights, state, place, place + n
            )
        o = tokens_of_chunks(within + across, front + n)
    return o[:, :, front:], last + older


def leveled_by_row(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor | None, weights: Tensor,
    state: Tensor, place: int | Tensor, fresh: Tensor | None, counts: Tensor | None, before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `leveled_linear` does where rows stand at different places.

    Each sequence of each row is taken up by itself.
    """
    b, n = q.shape[0], q.shape[2]
    places = [place] * b if isinstance(place, int) else place.tolist()
    many = [n] * b if counts is None else counts.tolist()
    parts, lasts = [], []
    for row, (at, count) in enumerate(zip(places, many, strict=True)):
        first = [] if fresh is None else fresh[row, 0, :count, 0].nonzero()[:, 0].tolist()
        last, done = state[row : row + 1], [q.new_zeros(1, q.shape[1], 0, v.shape[-1])]
        for start, stop in zip([0, *first], [*first, count], strict=True):
            if start in first:
                last, at = torch.zeros_like(last), 0
            if start < stop:
                qs, ks, vs, ls = (x[row : row + 1, :, start:stop] for x in (q, k, v, weights))
                ws, ds = (
                    None if x is None else x[row : row + 1, :, start:stop] for x in (w, decay)
                )
                o, last = leveled_linear(qs, ks, vs, ws, ds, ls, last, at, before=before)
                done.append(o)
                at += stop - start
        parts.append(F.pad(torch.cat([each.to(state.dtype) for each in done], 2),
                           (0, 0, 0, n - count)))  # fmt: skip
        lasts.append(last)
    return torch.cat(parts), torch.cat(lasts)


def leveled_by_token(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor | None, weights: Tensor,
    state: Tensor, place: int | Tensor, fresh: Tensor | None, counts: Tensor | None, before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `leveled_by_row` does, wherever sequences begin: token by token."""
    n, number = q.shape[2], torch.arange(q.shape[2], device=q.device)
    begun = -torch.as_tensor(place, device=q.device).expand(q.shape[0])[:, None].expand(-1, n)
    if fresh is not None:
        begun = torch.where(fresh[:, 0, :, 0], number, begun).cummax(1)[0]
    idle = None if counts is None else (number >= counts[:, None])[:, None]

    def token(states: tuple[Tensor, ...], streams: list[Any]) -> Any:
        *vectors, at, fresh_t, idle_t = streams
        state = states[0]
        if fresh_t is not None:
            state = state.masked_fill(fresh_t[..., None, None], 0)
        one: list[Any] = [None if x is None else x[:, :, None] for x in vectors]
        q, k, v, w, decay, weights = one
        o, last = leveled_linear(q, k, v, w, decay, weights, state, at[:, 0], before=before)
        if idle_t is not None:
            last = torch.where(idle_t[..., None, None, None], state, last)
        return (last,), (o[:, :, 0],)

    streams = (q, k, v, w, decay, weights, (number - begun)[:, None], fresh, idle)
    (last,), (o,) = over_tokens(token, (state,), streams, n)
    return o, last


def chunk_by_chunk(
    reads: Tensor, keeps: Tensor, wrote: Tensor, weights: Tensor, state: Tensor, final: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `across_chunks` does of tokens from the first on: one operator for a compiler.

    What the `final` [1] chunk that has tokens writes is left to others.
    """
    size, chunk = reads.shape[3], torch.arange(reads.shape[2], device=reads.device)
    wrote = wrote * (chunk < final)[:, None, None]
    place = torch.where(chunk <= final, chunk * size, 0)
    each = [x.movedim(2, 0) for x in (reads, keeps, wrote, weights)]
    left, found = torch._higher_order_ops.scan(chunk_of_levels, state, [*each, place])
    return found.movedim(0, 2), left


def chunk_of_levels(state: Tensor, chunk: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the levels that a chunk leaves, and what its tokens read of those it finds."""
    reads, keeps, wrote, weights, place = chunk
    state = merged_levels(state, place)
    # a compiler's own broadcasting of products loses the number of levels
    side_by_side = state.movedim(2, 3).flatten(3)  # [b, h, d, levels · e]
    found = (reads @ side_by_side).unflatten(3, (state.shape[2], -1))
    kept = keeps @ side_by_side if keeps.shape[-1] > 1 else keeps * side_by_side
    kept = kept.unflatten(3, (state.shape[2], -1)).movedim(3, 2)
    return with_written(kept, wrote), (weights[..., None] * found).sum(3)


def across_chunks(
    reads: Tensor, keeps: Tensor, wrote: Tensor, weights: Tensor, state: Tensor, start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what tokens read of the chunks before theirs, and the levels that those leave.

    A chunk reads `reads @ S` [b, h, chunks, size, e] of a state S, and leaves `keeps @ S + wrote`;
    `keeps * S` where that is [b, h, chunks, d or 1, 1]. From one level of the tree to the next,
    what two neighbours leave becomes what both leave, after the second has read the first.
    """
    dense = keeps.shape[-1] > 1
    meet = torch.matmul if dense else torch.mul
    size, most, device = reads.shape[3], state.shape[2] - 1, reads.device
    first, chunks = start // size, reads.shape[2]
    nothing = torch.ones_like(keeps[:, :, :1])  # what an empty node makes of a state
    nothing = nothing * torch.eye(keeps.shape[-1], device=device) if dense else nothing
    since = nothing.repeat(1, 1, chunks, 1, 1)  # from the beginning of each chunk's node to it
    last = keeps[:, :, -1]
    out = reads.new_zeros(*reads.shape[:4], wrote.shape[-1])
    left = [torch.zeros_like(state[:, :, 0])] * (most + 1)
    low, bit = first, 0  # the number of the first node, and that of the level of nodes
    while keeps.shape[2] > 1:
        pairs = [(at, (first + at >> bit) - 1 - low) for at in range(chunks)
                 if first + at >> bit & 1 and first + at >> bit > low]  # fmt: skip
        if pairs:
            level = min(size.bit_length() + bit, most)
            seconds, firsts = torch.tensor(pairs, device=device).unbind(1)
            found = meet(since[:, :, seconds], wrote[:, :, firsts])
            told = weights[:, :, seconds, :, level, None] * (reads[:, :, seconds] @ found)
            out.index_add_(2, seconds, told)
            since.index_copy_(2, seconds, meet(since[:, :, seconds], keeps[:, :, firsts]))
            if pairs[-1][0] == chunks - 1:
                left[level] = left[level] + meet(last, found[:, :, -1])
        odd = (low % 2, (low + keeps.shape[2]) % 2)  # nodes without a neighbour get an empty one
        wrote = F.pad(wrote, (0, 0, 0, 0, *odd))
        keeps = torch.cat([nothing] * odd[0] + [keeps] + [nothing] * odd[1], dim=2)
        wrote = meet(keeps[:, :, 1::2], wrote[:, :, ::2]) + wrote[:, :, 1::2]
        keeps = meet(keeps[:, :, 1::2], keeps[:, :, ::2])
        low, bit = low // 2, bit + 1
    if start:  # what was there before the first token
        token = first * size + torch.arange(chunks * size, device=device)
        there = level_between(token, torch.full_like(token, start - 1))
        filled = (at + 1 for at in range((start - 1).bit_length()) if start - 1 >> at & 1)
        for level in sorted({0, *(min(each, most) for each in filled)}):
            found = meet(since, state[:, :, None, level])
            which = there.clamp(level, most).view(-1, size, 1).expand(*reads.shape[:4], 1)
            out = out + weights.gather(-1, which) * (reads @ found)
            at = min(max((stop - 1 ^ start - 1).bit_length(), level), most)
            left[at] = left[at] + meet(last, found[:, :, -1])
    return out, torch.stack(left, dim=2)


def level_between(i: Tensor, j: Tensor) -> Tensor:
    """Return the level in which token i finds token j: how many bits i xor j has, 0 where i = j."""
    return torch.frexp((i ^ j).double()).exponent.long()


def merged_levels(state: Tensor, place: int | Tensor) -> Tensor:
    """Merge the levels of a state [b, h, levels, …] that are full before token number `place`.

    Before token i, levels 0 … z are merged into level z + 1, where 2^z is the largest power of
    two that divides i; the last level takes what would go beyond. `place` is one number, or one
    a sequence [b, 1, 1].
    """
    sizes = 2 ** torch.arange(state.shape[2] - 1, device=state.device)
    full = (place % sizes == 0) & (place > 0)
    gives = F.pad(full, (0, 1))
    takes = F.pad(full, (1, 0), value=True) & ~gives
    gives, takes = (each.reshape(*each.shape, *[1] * (state.ndim - 3)) for each in (gives, takes))
    moved = state.masked_fill(~gives, 0).sum(2, keepdim=True)
    return state.masked_fill(gives, 0) + torch.where(takes, moved, 0)


def summed_levels(state: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the levels of a state [b, h, levels, …], weighed by [b, h, levels]."""
    return (state * weights.reshape(*weights.shape, *[1] * (state.ndim - 3))).sum(2)


def with_written(state: Tensor, written: Tensor) -> Tensor:
    """Add what a token writes [b, h, …] to the first level of a state [b, h, levels, …]."""
    first = state[:, :, 0] + written
    return torch.cat([first[:, :, None], state[:, :, 1:]], dim=2)
