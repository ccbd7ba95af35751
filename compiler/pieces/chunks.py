"""Recurrences for many tokens at once, in chunks: states that fade and are added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor,
    w: Tensor | None = None,
    before: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return q_i @ S_i [b, h, n, e] of S_i = decay_i S_{i-1} + outer(k_i, u_i), and the last S.

    u_i is v_i, or v_i + w_i @ S_{i-1}: the delta rule, with w = -beta k and v = beta v. q, k and
    w are [b, h, n, d]; decay is None for 1, [b, h, n, 1], or [b, h, n, d] for the rows of S;
    `state`, the S before the first token, is [b, h, d, e]. With `before`, S_{i-1} is read.

    The tokens of a chunk meet in one product, under a mask that fades; from chunk to chunk the
    state goes on (Sun et al. 2023, Yang et al. 2023, 2024). Decays are multiplied and never
    divided, so that they may be zero.
    """
    b, h, n = q.shape[:3]
    q, k, v = q.to(state.dtype), k.to(state.dtype), v.to(state.dtype)
    w = None if w is None else w.to(state.dtype)
    with torch.autocast(q.device.type, enabled=False):
        if n == 1:  # a step of decoding
            u = v if w is None else v + w @ state
            last = (state if decay is None else decay.mT * state) + k.mT @ u
            return q @ (state if before else last), last
        size, last, parts = chunk_size(n, 64 if w is None else 32), state.flatten(0, 1), []
        each = section(q, size)
        qs, ks, vs = (torch.split(x, each, dim=2) for x in (q, k, v))
        for some in zip(qs, ks, vs, cut(w, each, n), cut(decay, each, n), strict=True):
            part, last = linear_section(*some, last, size, before)
            parts += part
        o = torch.cat(parts, dim=1)  # [b h, chunks · size, e]
    return o.reshape(b, h, -1, v.shape[3])[:, :, :n], last.reshape(state.shape)


def linear_section(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    decay: Tensor | None,
    state: Tensor,
    size: int,
    before: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return what each chunk of a size reads [b h, size, e], and the state [b h, d, e] after it.

    All else has the shapes and the meaning that `chunked_linear` gives it.
    """
    q, k, v = chunks_first(q, size), chunks_first(k, size), chunks_first(v, size)
    w = None if w is None else chunks_first(w, size)
    decay = None if decay is None else chunks_first(decay, size, 1.0)
    since = None if decay is None else decay.cumprod(-2)
    until = None if since is None else one_later(since, 1.0)
    keeps = [None] * len(q) if since is None else since[..., -1:, :].mT.unbind(0)
    reads = scaled(q, until if before else since).unbind(0)
    writes = scaled(k, None if decay is None else after_each(decay)).mT
    if decay is None or decay.shape[-1] == 1:
        fade = fading(k.new_ones(1) if decay is None else decay, size)
        seen = (q @ k.mT) * (one_later(fade) if before else fade)
        met = None if w is None else (w @ k.mT) * one_later(fade)
    else:
        seen = earlier_products(q, k, decay) if before else faded_products(q, k, decay)
        met = None if w is None else earlier_products(w, k, decay)
    parts = []
    if w is None or met is None:
        done, wrote = (seen @ v).unbind(0), (writes @ v).unbind(0)
        for at, keep in enumerate(keeps):
            parts.append(torch.baddbmm(done[at], reads[at], state))
            state = faded_state(state, keep, wrote[at])
        return parts, state
    solved = unit_inverse(met)
    own, reach = (solved @ v).unbind(0), (solved @ scaled(w, until)).unbind(0)
    for at, keep in enumerate(keeps):
        u = torch.baddbmm(own[at], reach[at], state)
        parts.append(torch.baddbmm(seen[at] @ u, reads[at], state))
        state = faded_state(state, keep, writes[at] @ u)
    return parts, state


def faded_sums(x: Tensor, decay: Tensor | None, state: Tensor) -> Tensor:
    """Return z_i = decay_i z_{i-1} + x_i [b, h, n, d] from the z before the first, [b, h, d]."""
    if decay is None:
        return x.cumsum(2) + state[:, :, None]
    n = x.shape[2]
    if n == 1:  # a step of decoding
        return decay * state[:, :, None] + x
    size, last, parts = chunk_size(n, 64), state.flatten(0, 1)[:, None], []
    with torch.autocast(x.device.type, enabled=False):
        each = section(x, size)
        cuts = (torch.split(x, each, dim=2), torch.split(decay, each, dim=2))
        for part, fade in zip(*cuts, strict=True):
            sums, fades = chunks_first(part, size), chunks_first(fade, size, 1.0)
            since = fades.cumprod(-2)
            if decay.shape[-1] == 1:
                sums = fading(fades, size) @ sums
            else:
                step = 1
                while step < size:  # sums of 2, 4, 8 … tokens
                    sums = sums + fades * F.pad(sums[..., :-step, :], (0, 0, step, 0))
                    fades = fades * F.pad(fades[..., :-step, :], (0, 0, step, 0), value=1.0)
                    step *= 2
            for own, faded in zip(sums.unbind(0), since.unbind(0), strict=True):
                parts.append(torch.addcmul(own, faded, last))
                last = parts[-1][:, -1:]
    return torch.cat(parts, dim=1).reshape(*x.shape[:2], -1, x.shape[3])[:, :, :n]


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
    return one_later(faded_products(next_, k, decay))


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


def one_later(x: Tensor, first: float = 0.0) -> Tensor:
    """Return x [..., n, d] with each row one place later, after a first of this value."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def scaled(x: Tensor, by: Tensor | None) -> Tensor:
    """Return x times what it is scaled by, if by anything."""
    return x if by is None else x * by


def faded_state(state: Tensor, keep: Tensor | None, wrote: Tensor) -> Tensor:
    """Return keep · state + wrote."""
    return wrote + state if keep is None else torch.addcmul(wrote, keep, state)


def section(x: Tensor, size: int) -> int:
    """Return how many tokens of x [b, h, n, d], in chunks of a size, to work on at a time.

    What is made of them then stays in the cache of a processor.
    """
    b, h, n, d = x.shape
    return n if torch.compiler.is_compiling() else max(1, 2**18 // (b * h * d * size)) * size


def cut(x: Tensor | None, each: int, n: int) -> list[Tensor | None]:
    """Return n tokens x [b, h, n, d] as sections of so many `each`; a None for each of None."""
    return [None] * -(-n // each) if x is None else [*torch.split(x, each, dim=2)]


def chunk_size(n: int, most: int) -> int:
    """Return a power of two that holds n tokens, or at most so many."""
    size = 1
    while size < min(n, most):
        size *= 2
    return size


def in_chunks(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Return x [b, h, n, d] as [b, h, chunks, size, d], the last chunk filled up."""
    if x.shape[2] % size:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % size), value=fill)
    return x.reshape(*x.shape[:2], -1, size, x.shape[3])


def chunks_first(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Return x [b, h, n, d] as [chunks, b h, size, d], the last chunk filled up."""
    return in_chunks(x, size, fill).flatten(0, 1).transpose(0, 1).contiguous()


def whole_linear(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, fresh: Tensor | None = None
) -> Tensor:
    """Return q_i @ S [b, h, n, e] of S = state + the sum of all outer(k_j, v_j).

    Where documents begin at `fresh` tokens [b, 1, n, 1], each has a sum of its own.
    """
    if fresh is None:
        return q @ (state + k.mT @ v)
    shape, nothing = (*k.shape[:3], 1), torch.zeros_like(state)
    ends = F.pad(fresh[:, :, 1:], (0, 0, 0, 1), value=True)
    begun, _ = chunked_linear(q, k, v, (~fresh).to(k.dtype).expand(shape), nothing)
    open_ = (~ends).to(k.dtype).expand(shape).flip(2)
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
    earlier = torch.cat([state[:, :, None], z[:, :, :-1]], dim=2)
    return earlier if fresh is None else earlier.masked_fill(fresh, anew)


def decay_of(
    decay: Tensor | None,
    fresh: Tensor | None,
    idle: Tensor | None,
    size: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor | None:
    """Return a decay [b, h, n, d or 1] that is 0 where sequences begin, and 1 at padding.

    Both are [b, 1, n, 1], or None where there are none; `size` is that of a decay that is None.
    """
    if fresh is not None:
        decay = (~fresh).to(dtype).expand(size) if decay is None else decay.masked_fill(fresh, 0)
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
