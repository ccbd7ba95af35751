"""Attention over pairs: where tokens stand, parts of the map, functions of all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def expect(name: str, x: Tensor, width: int, module: nn.Module) -> None:
    """Raise `ValueError` unless x is [b, tokens, width] in a dtype that the module computes in."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"`{name}` must be [b, tokens, {width}], it is {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"`{name}` must be features in floating point, it is {x.dtype}")
    if x.dtype == next(module.parameters(), x).dtype or torch.is_autocast_enabled(x.device.type):
        return
    own = {each.dtype for each in module.parameters()}
    computes = all(each.is_floating_point and each.itemsize > 1 for each in own)
    if computes and x.dtype not in own:  # others are weights in another form than they are read
        raise ValueError(f"`{name}` is {x.dtype}, the module {next(iter(own))}: convert one of "
                         "them, or call it under torch.autocast")  # fmt: skip


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
