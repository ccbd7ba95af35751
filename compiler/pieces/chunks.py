"""Recurrences for many tokens at once, in chunks: states that fade and are added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, w: Tensor | None = None,
    before: bool = False, *, q_scale: Tensor | None = None, v_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return q_i @ S_i [b, h, n, e] of S_i = decay_i S_{i-1} + outer(k_i, u_i), and the last S.

    u_i is v_i, or v_i + w_i @ S_{i-1}: the delta rule, with w = -beta k and v = beta v. q, k and
    w are [b, h, n, d]; q, v and w are times their scales [b, h or 1, n, 1], where those are given,
    and w is k where its scale alone is. decay is None for 1, [b, h or 1, n, 1], or [b, h, n, d]
    for the rows of S; `state`, the S before the first token, is [b, h, d, e]. With `before`,
    S_{i-1} is read.

    The tokens of a chunk meet in one product, under a mask that fades; from chunk to chunk the
    state goes on (Sun et al. 2023, Yang et al. 2023, 2024). Decays are multiplied and never
    divided, so that they may be zero.
    """
    b, h, n = q.shape[:3]
    dtype = state.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    w = None if w is None else w.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if n < 2:  # a step of decoding
            q, v = scaled(q, q_scale), scaled(v, v_scale)
            if n == 0:
                return q @ state, state
            w = k if w is None and w_scale is not None else w
            u = v if w is None else v + scaled(w, w_scale) @ state
            last = (state if decay is None else decay.mT * state) + k.mT @ u
            return q @ (state if before else last), last
        size, last, parts = chunk_size(n, 32), state.flatten(0, 1), []
        for some in sections(size, q, k, v, w, decay, q_scale, v_scale, w_scale):
            made, last = linear_section(*some, last, size, before)  # type: ignore[call-arg]
            parts.append(made)
        return of_all_tokens(parts, b, h, n), last.unflatten(0, (b, h))


def linear_section(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor | None,
    q_scale: Tensor | None, v_scale: Tensor | None, w_scale: Tensor | None,
    state: Tensor, size: int, before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what the chunks of a size read [chunks, b h, size, e], and the state after them.

    All else has the shapes and the meaning that `chunked_linear` gives it.
    """
    q, k, v = (chunks_first(each, size, 0.0) for each in (q, k, v))
    if w is not None or w_scale is not None:
        w = k if w is None else chunks_first(w, size, 0.0)
        w = scaled(w, in_chunks_too(w_scale, size))
    q, v = scaled(q, in_chunks_too(q_scale, size)), scaled(v, in_chunks_too(v_scale, size))
    decay = None if decay is None else chunks_first(decay, size, 1.0)
    since = None if decay is None else decay.cumprod(-2)
    until = None if since is None else one_later(since, 1.0)
    keeps = [] if since is None else [of_every_head(since[..., -1:, :].mT, q.shape[1])]
    reads = scaled(q, until if before else since)
    writes = scaled(k, None if decay is None else after_each(decay)).mT
    if decay is None or decay.shape[-1] == 1:
        fade = fading(k.new_ones(1, 1, 1, 1) if decay is None else decay, size)
        seen = scaled(q @ k.mT, one_later(fade, 0.0) if before else fade)
        met = None if w is None else scaled(w @ k.mT, one_later(fade, 0.0))
    else:
        seen = earlier_products(q, k, decay) if before else faded_products(q, k, decay)
        met = None if w is None else earlier_products(w, k, decay)
    if w is None or met is None:
        (states,), last = over_chunks(held_and_added, state, writes @ v, *keeps)
    else:
        solved = unit_inverse(met)
        own, reach = solved @ v, solved @ scaled(w, until)
        (states, v), last = over_chunks(held_and_corrected, state, own, reach, writes, *keeps)
    read = torch.baddbmm((seen @ v).flatten(0, 1), reads.flatten(0, 1), states.flatten(0, 1))
    return read.unflatten(0, seen.shape[:2]), last


def held_and_added(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
    """Return the state after a chunk, and the one that the chunk finds."""
    wrote, *keep = chunk
    return faded_state(state, wrote, *keep), (handed_out(state),)


def held_and_corrected(
    state: Tensor, chunk: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the state after a chunk that corrects it; the one it finds, and what it writes."""
    own, reach, writes, *keep = chunk
    u = torch.baddbmm(own, reach, state)
    return faded_state(state, torch.bmm(writes, u), *keep), (handed_out(state), u)


def handed_out(x: Tensor) -> Tensor:
    """Return x, to a compiler a copy: what its loop hands out is not what it goes on with."""
    return x.clone() if torch.compiler.is_compiling() else x


def over_chunks(
    step: Callable[..., Any], state: Tensor, *chunks: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what `step` makes of the chunks, of all of them together, and the state at the end.

    A compiler gets the loop as one operator, for any number of chunks: it would unroll it.
    """
    if torch.compiler.is_compiling():
        state, made = torch._higher_order_ops.scan(step, state.contiguous(), chunks)
        return made, state
    parts = []
    for chunk in zip(*(each.unbind(0) for each in chunks), strict=True):
        state, part = step(state, chunk)
        parts.append(part)
    return tuple(torch.stack(each) for each in zip(*parts, strict=True)), state


def faded_sums(x: Tensor, decay: Tensor | None, state: Tensor) -> Tensor:
    """Return z_i = decay_i z_{i-1} + x_i [b, h, n, d] from the z before the first, [b, h, d]."""
    if decay is None:
        return x.cumsum(2) + state[:, :, None]
    b, h, n = x.shape[:3]
    if decay.shape[1] < h:  # all heads fade alike
        sums = faded_sums(x.transpose(1, 2).flatten(2)[:, None], decay, state.flatten(1)[:, None])
        by_head: Tensor = sums[:, 0].unflatten(2, (h, -1))
        return by_head.transpose(1, 2)
    if n < 2:  # a step of decoding
        return decay * state[:, :, None] + x
    size, last, parts = chunk_size(n, 64), state.flatten(0, 1)[:, None], []
    with torch.autocast(x.device.type, enabled=False):
        for part, fade in sections(size, x, decay):
            sums, fades = chunks_first(part, size, 0.0), chunks_first(fade, size, 1.0)
            since = fades.cumprod(-2)
            if decay.shape[-1] == 1:
                sums = fading(fades, size) @ sums
            else:
                step = 1
                while step < size:  # sums of 2, 4, 8 … tokens
                    sums = sums + fades * F.pad(sums[..., :-step, :], (0, 0, step, 0))
                    fades = fades * F.pad(fades[..., :-step, :], (0, 0, step, 0), value=1.0)
                    step *= 2
            (made,), last = over_chunks(sums_of_chunk, last, sums, since)
            parts.append(made)
        return of_all_tokens(parts, b, h, n)


def sums_of_chunk(last: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
    """Return the last sum of a chunk, and all of them, from the last of the chunk before."""
    own, faded = chunk
    sums = torch.addcmul(own, faded, last)
    return handed_out(sums[:, -1:]), (sums,)


def faded_products(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Return q_i · (decay_i … decay_{j+1} k_j) for j ≤ i, 0 after: [..., n, n].

    Where every feature fades by itself, the halves of the tokens meet in their middle: what the
    first half wrote fades until there, and what the second reads fades from there.
    """
    n = q.shape[-2]
    if decay.shape[-1] == 1:
        return (q @ k.mT) * fading(decay, n)
    if n == 1:
        return (q * k).sum(-1, keepdim=True)
    q, k, decay = (
        each.reshape(*each.shape[:-2], 2, n // 2, each.shape[-1]) for each in (q, k, decay)
    )
    first, second = faded_products(q, k, decay).unbind(-3)
    reads = q[..., 1, :, :] * decay[..., 1, :, :].cumprod(-2)
    wrote = k[..., 0, :, :] * after_each(decay[..., 0, :, :])
    across = reads @ wrote.mT
    above = torch.cat([first, torch.zeros_like(first)], dim=-1)
    return torch.cat([above, torch.cat([across, second], dim=-1)], dim=-2)


def earlier_products(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Return q_i · (decay_{i-1} … decay_{j+1} k_j) for j < i, 0 from i on: [..., n, n]."""
    next_ = F.pad(q[..., 1:, :], (0, 0, 0, 1))
    return one_later(faded_products(next_, k, decay), 0.0)


def fading(decay: Tensor, n: int) -> Tensor:
    """Return decay_i … decay_{j+1} for j ≤ i, 0 after: [..., n, n] for a decay [..., n, 1]."""
    ones = decay.new_ones(n, n)
    return (ones.tril(-1) * decay + ones.triu()).cumprod(-2) * ones.tril()


def unit_inverse(x: Tensor) -> Tensor:
    """Return the inverse of 1 - x for x [..., n, n] that is 0 on and above its diagonal."""
    ones = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
    found: Tensor = torch.linalg.solve_triangular(
        -x, ones, upper=False, left=False, unitriangular=True
    )
    return found


def after_each(decay: Tensor) -> Tensor:
    """Return the products of the decays [..., n, d] after each token, 1 for the last."""
    after = F.pad(decay[..., 1:, :], (0, 0, 0, 1), value=1.0)
    return after.flip(-2).cumprod(-2).flip(-2)


def one_later(x: Tensor, first: float) -> Tensor:
    """Return x [..., n, d] with each row one place later, after a first of this value."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def scaled(x: Tensor, by: Tensor | None) -> Tensor:
    """Return x [chunks, b h, …] times what scales it [chunks, b h or b, …], if anything does."""
    if by is None or by.shape[1] == x.shape[1]:
        return x if by is None else x * by
    apart: Tensor = x.unflatten(1, (by.shape[1], -1))
    return (apart * by[:, :, None]).flatten(1, 2)


def of_every_head(x: Tensor, heads: int) -> Tensor:
    """Return x [chunks, b h or b, …] for all b h `heads`."""
    if x.shape[1] == heads:
        return x
    each = heads // x.shape[1]
    return x[:, :, None].expand(-1, -1, each, *x.shape[2:]).flatten(1, 2)


def faded_state(state: Tensor, wrote: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return keep · state + wrote."""
    return wrote + state if keep is None else torch.addcmul(wrote, keep, state)


def sections(size: int, *operands: Tensor | None) -> list[tuple[Any, ...]]:
    """Return tensors [b, h, n, d], in chunks of a size, so many tokens of each at a time.

    What is made of some then stays in the caches of the processors, of each as many as there are
    threads; a compiler gets all at once. The first is a tensor, others may be None.
    """
    if torch.compiler.is_compiling():
        return [operands]
    first = operands[0]
    assert first is not None
    held = 2**17 * torch.get_num_threads()
    each = max(1, held // max(1, first[:, :, :size].numel())) * size
    count = -(-first.shape[2] // each)
    cut = ([None] * count if x is None else torch.split(x, each, dim=2) for x in operands)
    return [*zip(*cut, strict=True)]


def chunk_size(n: int, most: int) -> int:
    """Return a power of two that holds n tokens, or at most so many; to a compiler, the most."""
    if torch.compiler.is_compiling():
        return most
    size = 1
    while size < min(n, most):
        size *= 2
    return size


def in_chunks(x: Tensor, size: int, fill: float) -> Tensor:
    """Return x [b, h, n, d] as [b, h, chunks, size, d], the last chunk filled up."""
    n = x.shape[2]
    if torch.compiler.is_compiling():  # two chunks or more, whatever n is
        chunks = (n + 2 * size - 1) // size
        x = F.pad(x, (0, 0, 0, chunks * size - n), value=fill)
    else:
        chunks, x = -1, F.pad(x, (0, 0, 0, -n % size), value=fill) if n % size else x
    found: Tensor = x.unflatten(2, (chunks, size))
    return found


def tokens_of_chunks(x: Tensor, n: int) -> Tensor:
    """Return the first n tokens [..., n, d] of chunks x [..., chunks, size, d].

    A compiler takes them one by one: what a slice is like depends on whether it is all there is.
    """
    if torch.compiler.is_compiling():
        token, size = torch.arange(n, device=x.device), x.shape[-2]
        return x[..., token // size, token % size, :]
    return x.flatten(-3, -2)[..., :n, :]


def chunks_first(x: Tensor, size: int, fill: float) -> Tensor:
    """Return x [b, h, n, d] as [chunks, b h, size, d], the last chunk filled up."""
    return in_chunks(x, size, fill).flatten(0, 1).transpose(0, 1).contiguous()


def in_chunks_too(scale: Tensor | None, size: int) -> Tensor | None:
    """Return what scales tokens [b, h, n, 1] as what it scales is laid out, if anything does."""
    return None if scale is None else chunks_first(scale, size, 0.0)


def of_all_tokens(parts: list[Tensor], b: int, h: int, n: int) -> Tensor:
    """Return the n tokens [b, h, n, d] of the chunks [chunks, b h, size, d] in some parts.

    They are laid out as projections take them: token by token, the heads of one together.
    """
    if torch.compiler.is_compiling():
        found: Tensor = tokens_of_chunks(parts[0].transpose(0, 1), n).unflatten(0, (b, h))
    else:
        laid = [each.unflatten(1, (b, h)).permute(1, 0, 3, 2, 4) for each in parts]
        found = torch.cat(laid, dim=1).flatten(1, 2)[:, :n].transpose(1, 2)
    return found


def whole_linear(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, fresh: Tensor | None = None
) -> Tensor:
    """Return q_i @ S [b, h, n, e] of S = state + the sum of all outer(k_j, v_j).

    Where documents begin at `fresh` tokens [b, 1, n, 1], each has a sum of its own.
    """
    if fresh is None:
        return q @ (state + k.mT @ v)
    nothing = torch.zeros_like(state)
    ends = F.pad(fresh, (0, 0, 0, 1), value=True)[:, :, 1:]
    begun, _ = chunked_linear(q, k, v, (~fresh).to(k.dtype), nothing)
    open_ = (~ends).to(k.dtype).flip(2)
    asked = q.masked_fill(ends, 0).flip(2)  # from the last token backwards
    rest, _ = chunked_linear(asked, k.flip(2), v.flip(2), open_, nothing, before=True)
    return begun + rest.flip(2) + q @ state


def whole_sums(x: Tensor, state: Tensor, fresh: Tensor | None = None) -> Tensor:
    """Return z = state [b, h, d] + the sum of all x_j [b, h, n, d], the same for every token.

    Where documents begin at `fresh` tokens [b, 1, n, 1], each has a sum of its own.
    """
    if fresh is None:
        return (state[:, :, None] + x.sum(2, keepdim=True)).expand_as(x)
    which = fresh.cumsum(2).expand_as(x)
    sums = torch.zeros_like(x).scatter_add(2, which, x)
    return state[:, :, None] + sums.gather(2, which)


def one_before(z: Tensor, state: Tensor, fresh: Tensor | None = None, anew: float = 0.0) -> Tensor:
    """Return z_{i-1} for the values z_i [b, h, n, d] of a state [b, h, d].

    The tokens that are `fresh` find it `anew`.
    """
    earlier = torch.cat([state[:, :, None], z], dim=2)[:, :, :-1]
    return earlier if fresh is None else earlier.masked_fill(fresh, anew)


def decay_of(
    decay: Tensor | None, fresh: Tensor | None, idle: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Return a decay [b, h, n, d or 1] that is 0 where sequences begin, and 1 at padding.

    Both are [b, 1, n, 1], or None where there are none. One that was None is [b, 1, n, 1].
    """
    if fresh is not None:
        decay = (~fresh).to(dtype) if decay is None else decay.masked_fill(fresh, 0)
    if idle is not None and decay is not None:
        decay = decay.masked_fill(idle, 1)
    return decay


def zeroed(x: Tensor, at: Tensor | None) -> Tensor:
    """Return x [b, h, n, d], zero at some tokens [b, 1, n, 1]."""
    return x if at is None else x.masked_fill(at, 0)


def begun_at(x: Tensor, first: float, decay: Tensor | None, fresh: Tensor | None) -> Tensor:
    """Return what is added to a state, which begins at `first` where a sequence begins."""
    if fresh is None:
        return x
    return x + first * fresh if decay is None else x + first * decay * fresh


def last_of(x: Tensor, before: Tensor) -> Tensor:
    """Return the last of x [b, h, n, …], or what was `before` where there are no tokens."""
    return x[:, :, -1] if x.shape[2] else before


def marks_of(fresh: Tensor | None, idle: Tensor | None) -> Tensor | None:
    """Return 1 for tokens [b, 1, n, 1] that begin a sequence, 2 for padding, else 0, as [b, n]."""
    marks = None if fresh is None else fresh.to(torch.int8)
    if idle is not None:
        marks = torch.zeros_like(idle, dtype=torch.int8) if marks is None else marks
        marks = marks.masked_fill(idle, 2)
    return None if marks is None else marks[:, 0, :, 0]


def interleaved(*parts: Tensor) -> Tensor:
    """Lay several [b, h, n, d] out as one [b, h, parts · n, d], token by token."""
    return torch.stack(parts, dim=3).flatten(2, 3)
