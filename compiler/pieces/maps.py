"""Attention over pairs: where tokens stand, parts of the map, functions of all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_query(number: Tensor | None) -> Any:
    """Lay a number of each token, [n] or [b, n], along the queries of [b, h, n, m]."""
    if number is None:
        return None
    return number[:, None, :, None] if number.ndim == 2 else number[:, None]


def by_key(number: Tensor | None) -> Any:
    """Lay a number of each token, [m] or [b, m], along the keys of [b, h, n, m]."""
    if number is None:
        return None
    return number[:, None, None, :] if number.ndim == 2 else number[None]


def together(own: Tensor | None, other: Tensor | None) -> Any:
    """Say which keys are of a query's sequence, or are no padding where there is no `own`.

    They are numbers of sequences along queries and keys; None where all are of one.
    """
    if other is None:
        return None
    return other >= 0 if own is None else own == other


def both_there(own: Tensor | None, other: Tensor | None) -> Any:
    """Say which pairs of a query and a key of other tokens are no padding; None where all are."""
    if own is None or other is None:
        return together(None, own if other is None else other)
    return (own >= 0) & (other >= 0)


def hiding(visible: Tensor, s: Tensor) -> Tensor:
    """Return what hides logits s [b, h, n, m] that are not visible, when it is added to them."""
    return torch.where(visible, s.new_zeros(()), torch.finfo(s.dtype).min)


def seen_of(visible: Tensor, s: Tensor) -> Tensor:
    """Return how many keys each query of s [b, h, n, m] sees, 1 at least."""
    count = visible.expand(*visible.shape[:-2], *s.shape[-2:]).sum(-1, keepdim=True)
    return count.clamp(min=1).to(s.dtype)


def tokens_of(own: Tensor | None, other: Tensor | None, x: Tensor) -> Tensor:
    """Return how many of the tokens of x [b, h, m, d] are of each query's sequence."""
    seen = together(own, other)
    if seen is None:
        return torch.tensor(x.shape[-2], device=x.device)
    counted: Tensor = seen.sum(-1, keepdim=True)
    return counted


def steps_on(x: Tensor, steps: Tensor, other: Tensor | None = None) -> Tensor:
    """Return, for each token of x [b, (h,) m, d], the one so many `steps` [(b, 1,) m] on.

    Steps are rounded down; past an end of its sequence, of which `other` [b, 1, 1, m] is the
    number, it is the token at that end.
    """
    m = x.shape[-2]
    at = torch.arange(m, device=x.device)
    rows, first, last = at + steps.floor().long(), torch.zeros_like(at), at.new_full((), m - 1)
    if other is not None:
        run = other[:, 0, 0] if x.ndim == 3 else other[:, 0]  # [b, (1,) m]
        new = torch.ones_like(run, dtype=torch.bool)
        new[..., 1:] = run[..., 1:] != run[..., :-1]
        ends = torch.cat([new[..., 1:], torch.ones_like(new[..., :1])], -1)
        first = torch.where(new, at, 0).cummax(-1)[0]
        last = torch.where(ends, at, m).flip(-1).cummin(-1)[0].flip(-1)
        rows = rows[:, 0] if rows.ndim > run.ndim else rows
    elif rows.ndim > x.ndim - 1:
        rows = rows[:, 0]
    rows = torch.minimum(torch.maximum(rows, first), last)[..., None]
    return x.gather(-2, rows.expand(x.shape))


def mean_of_visible(x: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Return the mean of x over what is visible along a dimension, 0 where nothing is."""
    visible = visible.expand(x.shape)
    count = visible.sum(dim, keepdim=True).clamp(min=1)
    return x.masked_fill(~visible, 0).sum(dim, keepdim=True) / count


def max_of_visible(x: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Return the largest x that is visible along a dimension, 0 where nothing is."""
    visible = visible.expand(x.shape)
    one_more = (0, 1) if dim == -1 else (0, 0, 0, 1)  # where there is nothing at all
    x = F.pad(x.masked_fill(~visible, -torch.inf), one_more, value=-torch.inf)
    return x.amax(dim, keepdim=True).masked_fill(~visible.any(dim, keepdim=True), 0)


def of_table(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """Return the products of x [b, h, n, d] and the rows `at` [(b, h,) n, m] of a table [p, d].

    A table of each head is [h, p, d].
    """
    met = x @ table.mT.to(x.dtype)
    lead = torch.broadcast_shapes(met.shape[:-1], at.shape[:-1])
    return met.expand(*lead, -1).gather(-1, at.expand(*lead, at.shape[-1]))


def running_sums(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums of x [b, h, n, m] over queries up to each, and of all of them [b, h, m, 1].

    `before` is the latter, of the queries before these; None for nothing.
    """
    sums, last = sums_of_rows(x), x.sum(-2)[..., None]
    return (sums, last) if before is None else (sums + before.mT, last + before)


def sums_of_rows(x: Tensor, size: int = 32) -> Tensor:
    """Return x.cumsum(-2) of x [b, h, n, m]: products of blocks, which read memory in order."""
    if torch.compiler.is_compiling():  # for every length
        return x.cumsum(-2)
    n = x.shape[-2]
    if n < 2:
        return x
    size = min(n, size)
    blocks = F.pad(x, (0, 0, 0, -n % size)).unflatten(-2, (-1, size))
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.ones(size, size, dtype=x.dtype, device=x.device).tril() @ blocks
    if n > size:
        before = blocks.sum(-2, keepdim=True).cumsum(-3)
        sums = sums + F.pad(before[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    done: Tensor = sums.flatten(-3, -2)
    return done[..., :n, :]


def sum_after(x: Tensor) -> Tensor:
    """Return, for each x [b, h, n, m], the sum of its row over the keys after it."""
    done: Tensor = SumAfter.apply(x)
    return done


class SumAfter(torch.autograd.Function):
    """`sum_after`; its gradient is the sum over the keys before, without turning rows around."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Sum from the last key back."""
        return F.pad(x, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        """Sum from the first key on."""
        return F.pad(grad, (1, 0))[..., :-1].cumsum(-1)


def normal_exp(x: Tensor) -> Tensor:
    """Return exp(x), and 0 where it has no leading digit: a CPU takes long for such numbers."""
    done: Tensor = NormalExp.apply(x)
    return done


class NormalExp(torch.autograd.Function):
    """`normal_exp`; its gradient is a product with itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Take none but powers that have a leading digit."""
        least = torch.finfo(x.dtype).tiny
        return F.threshold(x.clamp(min=math.log(least) + 0.01).exp_(), 1.02 * least, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep what is given."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Multiply."""
        output: Tensor = ctx.saved_tensors[0]
        return grad * output


def rank_keys(x: Tensor) -> Tensor:
    """Return how many of its row are larger than each x, or as large and before it."""
    order = torch.argsort(x, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1).to(torch.promote_types(x.dtype, torch.float32))


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
    if not x.numel():
        return x
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


def row_threshold(
    weight: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor],
    s: Tensor,
    visible: Tensor,
) -> Tensor:
    """Return tau [..., 1] such that the visible weight(s, tau) of each row sum to one.

    The sum falls as tau grows; `slope` is the derivative of `weight` by tau. Bisection over all
    numbers there are finds it, a step a bit: as whole numbers, positive floats are in order.

    What follows moves tau by nothing and gives it the derivatives of the implicit function: each
    step of Newton's, its slope held constant, makes one more of them right. They are two.
    """

    def total(function: Callable[[Tensor, Tensor], Tensor], tau: Tensor) -> Tensor:
        return function(s, tau).masked_fill(~visible, 0).sum(-1, keepdim=True)

    with torch.no_grad():
        wide = s.dtype == torch.float64
        whole, last = (torch.int64, 0x7FEFFFFFFFFFFFFF) if wide else (torch.int32, 0x7F7FFFFF)
        high = torch.full_like(s.sum(-1, keepdim=True), last, dtype=whole)
        low = -high
        for _ in range(64 if wide else 32):
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, which never overflows
            above = ~(total(weight, middle.abs().view(s.dtype) * middle.sign()) <= 1)
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        sees_nothing = ~visible.any(-1, keepdim=True)
        tau = (high.abs().view(s.dtype) * high.sign()).masked_fill(sees_nothing, 0)
        fall = total(slope, tau)
        fall = torch.where(fall == 0, -1, fall)
    for _ in range(2):
        found = total(weight, tau)
        tau = tau - (found - found.detach()) / fall
    return tau
