"""The functions an emitted module may need, as ordinary code.

The emitter copies the ones it uses, word for word, into the file it writes. Nothing here
may use anything but torch and other pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope(x: Tensor, positions: Tensor, theta: float, dims: int = 0, scaling: float = 1.0) -> Tensor:
    """Turn the feature pairs (c, c + r/2) of x [b, (h,) n, d] by angles that grow with position.

    dims > 0 turns the first so many features, dims < 0 the last, 0 all of them.
    """
    turned = abs(dims) or x.shape[-1]
    still = x.shape[-1] - turned
    part = x[..., still:] if dims < 0 else x[..., :turned]
    cos, sin = rope_angles(x, positions, turned, theta, scaling)
    a, b = part.chunk(2, dim=-1)
    done = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    if still == 0:
        return done
    return torch.cat([x[..., :still], done] if dims < 0 else [done, x[..., turned:]], dim=-1)


def rope_interleaved(
    x: Tensor, positions: Tensor, theta: float, dims: int = 0, scaling: float = 1.0
) -> Tensor:
    """Turn the feature pairs (2c, 2c + 1) of x [b, (h,) n, d] by angles that grow with position.

    dims > 0 turns the first so many features, dims < 0 the last, 0 all of them.
    """
    turned = abs(dims) or x.shape[-1]
    still = x.shape[-1] - turned
    part = x[..., still:] if dims < 0 else x[..., :turned]
    cos, sin = rope_angles(x, positions, turned, theta, scaling)
    a, b = part[..., 0::2], part[..., 1::2]
    done = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    if still == 0:
        return done
    return torch.cat([x[..., :still], done] if dims < 0 else [done, x[..., turned:]], dim=-1)


def rope_angles(
    x: Tensor, positions: Tensor, turned: int, theta: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [(b, 1,) n, r/2] for positions [n] or [b, n]."""
    power = torch.arange(0, turned, 2, dtype=torch.float64, device=x.device) / turned
    angle = (positions.to(torch.float64) / scaling)[..., None] * theta**-power
    if positions.ndim == 2 and x.ndim == 4:
        angle = angle[:, None]
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension of x to length one."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * (exact.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def l1_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension of x by the sum of its absolute values."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(exact, p=1.0, dim=-1, eps=eps).to(x.dtype)


def hard_step(a: Tensor) -> Tensor:
    """Return 1 where a > 0, else 0; the gradient passes straight through to a."""
    stepped = a.clone()
    stepped.detach().copy_(a > 0)
    return stepped


def top_features(x: Tensor, count: int) -> Tensor:
    """Keep the `count` largest of the last dimension, the first of equal ones; the rest is 0."""
    order = x.detach().argsort(dim=-1, descending=True, stable=True)
    rest = torch.zeros_like(x, dtype=torch.bool).scatter(-1, order[..., count:], True)
    return x.masked_fill(rest, 0)


def bernoulli(x: Tensor, rate: float, training: bool) -> Tensor:
    """Draw a number for each token of x, 1 at this rate, else 0; all are 1 out of training."""
    size = (*x.shape[:-1], 1)
    if not training:
        return x.new_ones(size)
    return (torch.rand(size, dtype=torch.float32, device=x.device) < rate).to(x.dtype)


def drop_heads(x: Tensor, count: int, training: bool) -> Tensor:
    """Zero `count` heads of each sequence of x [b, heads, n, d] in training."""
    if not training:
        return x
    order = torch.rand(x.shape[:-2], dtype=torch.float32, device=x.device).argsort(dim=-1)
    return x.masked_fill((order < count)[..., None, None], 0)


def add_noise(x: Tensor, std: float, training: bool) -> Tensor:
    """Add a normal number of deviation `std` to every element of x in training."""
    if not training:
        return x
    return x + std * torch.randn(x.shape, dtype=torch.float32, device=x.device).to(x.dtype)


class HeadLinear(nn.Module):
    """A linear map of its own for each head."""

    def __init__(self, heads: int, into: int, out: int) -> None:
        super().__init__()
        unit = torch.empty(heads, out, into).uniform_(-1, 1)
        self.weight = nn.Parameter(unit * into**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [b, heads, n, into] to [b, heads, n, out]."""
        return x @ self.weight.mT


class ReparamLinear(nn.Module):
    """A linear map whose weight is divided by its size, and multiplied by a learned gain.

    The size is the largest singular value (`spectral`) or that of each row (`weight_norm`).
    """

    def __init__(self, into: int, out: int, reparam: str, bias: bool = False) -> None:
        super().__init__()
        self.reparam = reparam
        self.weight = nn.Parameter(torch.empty(out, into).uniform_(-1, 1) * into**-0.5)
        self.gain = nn.Parameter(torch.ones(() if reparam == "spectral" else (out,)))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, into] to […, out]."""
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.reparam == "spectral":
            size = torch.linalg.matrix_norm(exact, ord=2)
        else:
            size = torch.linalg.vector_norm(exact, dim=-1)
        weight = (self.gain / size)[..., None] * exact
        return F.linear(x, weight.to(self.weight.dtype), self.bias)


class ShortConv(nn.Module):
    """A convolution along the tokens, each feature with weights of its own."""

    def __init__(self, features: int, width: int, bias: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.before = width - 1 if causal else (width - 1) // 2
        self.weight = nn.Parameter(torch.empty(features, width).uniform_(-1, 1) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Map x [b, (heads,) n, d] to the same.

        Outside of the tokens there are zeros, or the tokens `before` the first.
        """
        features, width = self.weight.shape
        given = x if before is None else torch.cat([before, x], dim=-2)
        rows = given.mT.reshape(-1, features, given.shape[-2])  # [b, features, n]
        rows = F.pad(rows, (self.before if before is None else 0, width - 1 - self.before))
        rows = F.conv1d(rows, self.weight[:, None], self.bias, groups=features)
        return rows.reshape(x.mT.shape).mT


class Latents(nn.Module):
    """A learned list of tokens, the same for every sequence."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(count, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, count, features] for the batch of x [b, …]."""
        return self.weight.to(x.dtype).expand(x.shape[0], -1, -1)


def sinusoidal(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return sines and cosines of positions [(b,) n] at falling frequencies: [(b,) n, width]."""
    power = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    angle = positions[..., None].to(torch.float64) * 10_000**-power
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width].to(dtype)


def by_query(positions: Tensor) -> Tensor:
    """Lay positions [n] or [b, n] along the queries of [b, h, n, m]."""
    return positions[:, None, :, None] if positions.ndim == 2 else positions[:, None]


def by_key(positions: Tensor) -> Tensor:
    """Lay positions [m] or [b, m] along the keys of [b, h, n, m]."""
    return positions[:, None, None, :] if positions.ndim == 2 else positions[None]


def steps_on(x: Tensor, steps: Tensor) -> Tensor:
    """Return, for each token of x [b, (h,) m, d], the one so many `steps` [(b, 1,) m] on.

    Steps are rounded down; past an end, it is the token at that end.
    """
    m = x.shape[-2]
    rows = torch.arange(m, device=x.device) + steps.floor().long()
    rows = rows.clamp(0, m - 1)[..., None]
    return x.gather(-2, (rows[:, 0] if rows.ndim > x.ndim else rows).expand(x.shape))


def over_queries(
    rows: Callable[..., Any],
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    width: int = 1,
    before: int = 0,
) -> Any:
    """Return rows(*queries, *keys), of some queries at a time where there are many pairs.

    `rows` gives a tensor [..., queries, d], or several of them.

    The backward pass computes each part again, so that memory grows with the tokens and not
    with their pairs. A pair takes `width` numbers; a row reads the `before` queries before it.
    """
    q, k = queries[0], keys[0]
    n, pairs = q.shape[-2], q.shape[0] * q.shape[1] * k.shape[-2] * width
    each = max(1, 2**24 // max(1, pairs), 4 * before)
    if torch.compiler.is_compiling() or n <= each:
        return rows(*queries, *keys)
    parts = []
    for start in range(0, n, each):
        first = max(0, start - before)
        part = [x.narrow(-2, first, min(start + each, n) - first) for x in queries]
        if torch.is_grad_enabled():
            made = torch.utils.checkpoint.checkpoint(rows, *part, *keys, use_reentrant=False)
        else:
            made = rows(*part, *keys)
        several = isinstance(made, tuple)
        made = made if several else (made,)
        parts.append([each[..., start - first :, :] for each in made])
    done = tuple(torch.cat(each, dim=-2) for each in zip(*parts, strict=True))
    return done if several else done[0]


def mean_of_visible(x: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Return the mean of x over what is visible along a dimension, 0 where nothing is."""
    visible = visible.expand(x.shape)
    count = visible.sum(dim, keepdim=True).clamp(min=1)
    return x.masked_fill(~visible, 0).sum(dim, keepdim=True) / count


def max_of_visible(x: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Return the largest x that is visible along a dimension, 0 where nothing is."""
    visible = visible.expand(x.shape)
    top = x.masked_fill(~visible, -torch.inf).amax(dim, keepdim=True)
    return top.masked_fill(~visible.any(dim, keepdim=True), 0)


def rank_keys(x: Tensor) -> Tensor:
    """Return how many of its row are larger than each x, or as large and before it."""
    order = torch.argsort(x, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1)


def coin(s: Tensor, rate: float, training: bool) -> Tensor:
    """Return 1 at this rate, else 0, for each pair; 1 outside of training."""
    if not training:
        return torch.ones_like(s)
    return (torch.rand(s.shape, dtype=torch.float32, device=s.device) < rate).to(s.dtype)


def joint(parts: list[Tensor], logs: list[Tensor]) -> Tensor:
    """Return the mean of parts [..., d] weighed by denominators, of which the logs [..., 1] are."""
    every = torch.stack(logs)
    shares = every.clamp(min=torch.finfo(every.dtype).min).softmax(0)
    return (torch.stack(parts) * shares).sum(0)


def mix_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Return maps [b, g, n, m] that are sums of maps x [b, h, n, m] by weights [g, h]."""
    return torch.einsum("gh,bhnm->bgnm", weight.to(x.dtype), x)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Slide a kernel [(heads,) a, c] over maps x [b, heads, n, m].

    It reads a - 1 queries back and as many keys to both sides; outside there are zeros.
    """
    back, across = kernel.shape[-2] - 1, kernel.shape[-1] - 1
    x = F.pad(x, (across // 2, across - across // 2, back, 0))
    weight = kernel.to(x.dtype).expand(x.shape[1], -1, -1)[:, None]
    return F.conv2d(x, weight, groups=x.shape[1])


def expect(name: str, x: Tensor, width: int) -> None:
    """Raise `ValueError` unless x is [b, tokens, width]."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"`{name}` must be [b, tokens, {width}], it is {list(x.shape)}")


def row_threshold(weight: Callable[[Tensor, Tensor], Tensor], s: Tensor, visible: Tensor) -> Tensor:
    """Return tau [..., 1] such that the visible weight(s, tau) of each row sum to one.

    Bisection finds it; one Newton step outside of `no_grad` gives it its exact gradient.
    """

    def total(tau: Tensor) -> Tensor:
        return weight(s, tau).masked_fill(~visible, 0).sum(-1, keepdim=True)

    empty = ~visible.any(-1, keepdim=True)
    with torch.no_grad():
        top = s.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).masked_fill(empty, 0)
        scale = 1.0 + top.abs()
        low, high = top - scale, top + scale
        for _ in range(64):
            if not bool((grow := (total(low) < 1) & ~empty).any()):
                break
            low = torch.where(grow, low - scale, low)
            scale = scale * 2
        scale = 1.0 + top.abs()
        for _ in range(64):
            if not bool((grow := (total(high) > 1) & ~empty).any()):
                break
            high = torch.where(grow, high + scale, high)
            scale = scale * 2
        for _ in range(80 if s.dtype == torch.float64 else 48):
            middle = (low + high) / 2
            above = total(middle) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    with torch.enable_grad():
        tau = ((low + high) / 2).detach().requires_grad_()
        slope = torch.autograd.grad(total(tau).sum(), tau)[0]
    slope = torch.where(empty | (slope == 0), -torch.ones_like(slope), slope).detach()
    tau = tau.detach()
    return tau - (total(tau) - 1).masked_fill(empty, 0) / slope


def expect_per_token(name: str, given: Tensor, x: Tensor) -> None:
    """Raise `ValueError` unless there is one number for each token of x: [n] or [b, n]."""
    b, n = x.shape[:2]
    if given.shape not in ((n,), (1, n), (b, n)):
        raise ValueError(f"`{name}` must be [{n}] or [{b}, {n}], it is {list(given.shape)}")


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


def new_documents(doc: Tensor, last: Tensor | None) -> Tensor:
    """Say which tokens [b, 1, n, 1] have another document than the token before them.

    `last` [b] is the document of the token before the first, where there was one.
    """
    first = doc[:, :1] if last is None else last[:, None]
    return (doc != torch.cat([first, doc[:, :-1]], dim=1))[:, None, :, None]


def interleaved(*parts: Tensor) -> Tensor:
    """Lay several [b, h, n, d] out as one [b, h, parts · n, d], token by token."""
    return torch.stack(parts, dim=3).flatten(2, 3)


def leveled_linear(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor | None, weights: Tensor,
    state: Tensor, place: int, before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sum over levels l of weights_il q_i @ S_il [b, h, n, e], and the last levels.

    In every level S_i = decay_i S_{i-1} + outer(k_i, w_i @ S_{i-1}); outer(k_i, v_i) is written
    into level 0 alone, and levels are merged as `merged_levels` says (Guo et al. 2025). decay is
    [b, h, n, 1 or d], weights are [b, h, n, levels]; `state` [b, h, levels, d, e] is what `place`
    tokens left behind. With `before`, q_i reads what token i finds.

    Within a chunk, tokens meet in one product, weighed by the level in which i finds j. Chunks
    begin at multiples of their size, so that `across_chunks` merges whole ones.
    """
    n, dtype, most = q.shape[2], state.dtype, state.shape[2] - 1
    decay = torch.ones_like(k[..., :1]) if decay is None else decay
    q, k, v, decay, weights = (each.to(dtype) for each in (q, k, v, decay, weights))
    w = None if w is None else w.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if n == 1:  # a step of decoding
            state = merged_levels(state, place)
            last = decay[:, :, 0, None, :, None] * state
            if w is not None:
                last = last + k.mT[:, :, None] @ (w[:, :, None] @ state)
            last = with_written(last, k.mT @ v)
            return q @ summed_levels(state if before else last, weights[:, :, 0]), last
        size = chunk_size(n, 64)
        front = place % size
        q, k, v, weights = (
            in_chunks(F.pad(each, (0, 0, front, 0)), size) for each in (q, k, v, weights)
        )
        decay = in_chunks(F.pad(decay, (0, 0, front, 0), value=1.0), size, 1.0)
        since = decay.cumprod(-2)
        begun = one_later(since, 1.0)
        pairs = earlier_products(q, k, decay) if before else faded_products(q, k, decay)
        reads = q * (begun if before else since)
        keeps, writes = since[..., -1, :, None], (k * after_each(decay)).mT
        if w is not None:  # what a token writes depends on what those before it wrote
            w = in_chunks(F.pad(w, (0, 0, front, 0)), size)
            inverse = unit_inverse(earlier_products(w, k, decay))
            reach = inverse @ (w * begun)
            reads = reads + pairs @ reach
            keeps = keeps * torch.eye(k.shape[-1], dtype=dtype, device=q.device) + writes @ reach
            pairs, writes = pairs @ inverse, writes @ inverse
        token = torch.arange(size, device=q.device)
        found = level_between(token[:, None], token).clamp(max=most)
        within = (pairs * weights.gather(-1, found.expand(pairs.shape))) @ v
        end = torch.tensor(place + n - 1, device=q.device)
        here = level_between(token, end % size).clamp(max=most)
        here = here == torch.arange(most + 1, device=q.device)[:, None]
        last = (writes[:, :, -1, None] * here[:, None]) @ v[:, :, -1, None]
        across, older = across_chunks(reads, keeps, writes @ v, weights, state, place, place + n)
    return (within + across).flatten(2, 3)[:, :, front : front + n], last + older


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


class Cache:
    """What the tokens so far left behind, by name."""

    def __init__(self, **kept: Tensor) -> None:
        self.length = 0
        self.kept = kept

    @property
    def nbytes(self) -> int:
        """Bytes held, whether written yet or not."""
        return sum(each.nbytes for each in self.kept.values())


class KeyValueCache(Cache):
    """What the tokens so far left behind for later queries to read.

    `sizes` says what is kept of each token: name → (heads or None, features). With a `ring`,
    only the first `prefix` tokens and the last `ring` are kept.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        sizes: dict[str, tuple[int | None, int]],
        ring: int | None = None,
        prefix: int = 0,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.is_ring = ring is not None and prefix + ring < length
        self.capacity = prefix + ring if ring is not None and self.is_ring else length
        self.positions: Tensor | None = None  # kept only where they are not 0, 1, 2 …
        self.kept = {
            name: torch.zeros(
                (batch, self.capacity, dim)
                if heads is None
                else (batch, heads, self.capacity, dim),
                dtype=torch.int64 if name == "doc" else dtype,
                device=device,
            )
            for name, (heads, dim) in sizes.items()
        }

    def update(self, positions: Tensor | None, **new: Tensor) -> tuple[Tensor, ...]:
        """Take up new tokens; return all that is visible now, and the positions j of its keys."""
        start, count = self.length, next(iter(new.values())).shape[-2]
        end = start + count
        if end > self.capacity and not self.is_ring:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were given")
        for name, each in new.items():
            if each.shape[0] != self.kept[name].shape[0]:
                raise ValueError(f"the cache is for a batch of {self.kept[name].shape[0]}; "
                                 f"{each.shape[0]} sequences were given")  # fmt: skip
        if self.is_ring and positions is not None:
            raise ValueError("a cache that forgets counts positions itself; leave them out")
        index = torch.arange(start, end, device=next(iter(new.values())).device)
        self.length = end
        if end <= self.capacity or count == 1:
            self._write(index, new)
            held = min(end, self.capacity)
            return (*(each[..., :held, :] for each in self.kept.values()),
                    self._places(positions, start, held))  # fmt: skip
        held = min(start, self.capacity)
        joined = [
            torch.cat([old[..., :held, :], new[name]], dim=-2) for name, old in self.kept.items()
        ]
        places = torch.cat([self._slots(start, held), index])
        keep = (index < self.prefix) | (index >= end - (self.capacity - self.prefix))
        self._write(index[keep], {name: each[..., keep, :] for name, each in new.items()})
        return (*joined, places)

    def _write(self, index: Tensor, new: dict[str, Tensor]) -> None:
        ring = max(1, self.capacity - self.prefix)
        slots = torch.where(
            index < self.prefix, index, self.prefix + (index - self.prefix) % ring
        ) if self.is_ring else index  # fmt: skip
        for name, each in new.items():
            self.kept[name].index_copy_(self.kept[name].ndim - 2, slots,
                                        each.detach().to(self.kept[name].dtype))  # fmt: skip

    def _slots(self, length: int, held: int) -> Tensor:
        """Return the position that each of the first `held` slots holds after `length` tokens."""
        slot = torch.arange(held, device=next(iter(self.kept.values())).device)
        if length <= self.capacity:
            return slot
        ring = self.capacity - self.prefix
        latest = length - 1 - (length - 1 - slot) % ring
        return torch.where(slot < self.prefix, slot, latest)

    def _places(self, positions: Tensor | None, start: int, held: int) -> Tensor:
        if positions is None and self.positions is None:
            return self._slots(self.length, held)
        count = self.length - start
        device = next(iter(self.kept.values())).device
        if self.positions is None:
            batch = next(iter(self.kept.values())).shape[0]
            self.positions = torch.arange(self.capacity, device=device).repeat(batch, 1)
        new = torch.arange(start, self.length, device=device) if positions is None else positions
        self.positions[:, start : start + count] = new
        return self.positions[:, :held]


class ContextCache(Cache):
    """The keys and values of a context, computed once."""


class StateCache(Cache):
    """The states of a recurrence after the tokens so far."""

    doc: Tensor | None = None  # the segment of the last token, where segments are given


class TailCache(Cache):
    """The last tokens that stages with a memory have read."""

    def before(self, name: str, x: Tensor, count: int) -> Tensor:
        """Return the `count` tokens before x [..., n, d], zeros at first; keep the last of x."""
        empty = x.new_zeros(*x.shape[:-2], count, x.shape[-1])
        old = self.kept.get(name, empty)
        self.kept[name] = torch.cat([old, x], dim=-2)[..., -count:, :].detach()
        return old


class BlockCache:
    """The caches of a block that keeps several things, by name."""

    def __init__(self, **parts: Cache) -> None:
        self.length = 0
        self.parts = parts

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self.parts.values())
