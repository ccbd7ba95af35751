"""Stages that bring tokens of one sequence together: convolutions, shifts, running sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import by_token


class ShortConv(nn.Module):
    """A convolution along the tokens: of each feature by itself, or of groups of them."""

    def __init__(
        self,
        features: int,
        width: int,
        bias: bool = False,
        causal: bool = True,
        dilation: int = 1,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.dilation = groups or features, dilation
        self.before = dilation * (width - 1 if causal else (width - 1) // 2)
        self.ahead = dilation * (width - 1) - self.before
        size = (features, width) if groups is None else (features, features // groups, width)
        unit = torch.empty(size).uniform_(-1, 1)
        self.weight = nn.Parameter(unit * (width * features // self.groups) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor, run: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Map x [b, (heads,) n, d] to the same.

        Outside of a sequence there are zeros; `before` are tokens before the first. `run`
        numbers the sequences of all these tokens [b, n], None where all are of one.
        """
        if not x.numel():
            return x
        given = x if before is None else torch.cat([before, x], dim=-2)
        rows = given.mT.flatten(1, -2)  # [b, features, n]
        back = self.before if before is None else 0
        rows = F.pad(rows, (back, self.ahead))
        if run is None:
            return self.slid(rows, self.weight, self.bias).reshape(x.mT.shape).mT
        run = F.pad(run, (back, self.ahead), value=-3)
        apart = self.apart_traced if torch.compiler.is_compiling() else self.apart
        return apart(rows, run).reshape(x.mT.shape).mT

    def slid(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Slide a weight over rows [b, features, n]."""
        weight = weight if weight.ndim == 3 else weight[:, None]
        return F.conv1d(rows, weight, bias, dilation=self.dilation, groups=self.groups)

    def apart(self, rows: Tensor, run: Tensor) -> Tensor:
        """Convolve rows [b, features, before + n + ahead] of tokens of sequences run [b, …].

        Where a token reads others' tokens, it is made once more from its own.
        """
        width, span = self.weight.shape[-1], self.before + self.ahead
        y = self.slid(rows, self.weight, self.bias)
        read = run.unfold(-1, span + 1, 1)[..., :: self.dilation]
        own = read == run[:, self.before :][:, : y.shape[-1], None]
        row, token = (~own.all(-1)).nonzero().unbind(1)
        at = token[:, None] + self.dilation * torch.arange(width, device=token.device)
        found = rows.mT[row[:, None], at] * own[row, token, :, None]  # [some, width, features]
        made = self.met(found)
        made = made if self.bias is None else made + self.bias
        return y.mT.index_put((row, token), made.to(y.dtype)).mT

    def met(self, found: Tensor) -> Tensor:
        """Return what tokens found [some, width, features] come to."""
        weight = self.weight.to(found.dtype)
        if weight.ndim == 2:
            return (found * weight.mT).sum(1)
        parts = found.unflatten(-1, (self.groups, -1))
        each = weight.unflatten(0, (self.groups, -1))
        return torch.einsum("swgc,gdcw->sgd", parts, each).flatten(-2)

    def apart_traced(self, rows: Tensor, run: Tensor) -> Tensor:
        """Return what `apart` does, which tokens it may be."""
        width = self.weight.shape[-1]
        n, run = rows.shape[-1] - self.before - self.ahead, run[:, None]
        own = run[..., self.before : self.before + n]
        y = torch.zeros_like(rows[..., :n])
        for tap in range(width):
            at, weight = tap * self.dilation, self.weight[..., tap].to(rows.dtype)
            part = rows[..., at : at + n]
            part = part if at == self.before else part * (run[..., at : at + n] == own)
            if weight.ndim == 1:
                y = y + part * weight[:, None]
            else:
                y = y + F.conv1d(part, weight[..., None], groups=self.groups)
        return y if self.bias is None else y + self.bias[:, None]


def tapped(
    x: Tensor,
    taps: Tensor,
    back: int,
    dilation: int,
    run: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Return Σ_c taps[…, t, c] · x[t - back + c · dilation], x [b, (heads,) n, d].

    taps are [b, (heads or 1,) n, width]; `before` and `run` are as for `ShortConv`.
    """
    n, width = taps.shape[-2:]
    ahead = dilation * (width - 1) - back
    given = x if before is None else torch.cat([before, x], dim=-2)
    given = F.pad(given, (0, 0, back if before is None else 0, ahead))
    if run is not None:
        run = F.pad(run, (back if before is None else 0, ahead), value=-3)
    y = torch.zeros_like(x)
    for tap in range(width):
        at = tap * dilation
        part = taps[..., tap, None] * given[..., at : at + n, :]
        if run is not None and at != back:
            part = part.masked_fill(~by_token(same_run(run, at, back, n), x), 0)
        y = y + part
    return y


def shifted(x: Tensor, count: int, run: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Return the token `count` before each of x [b, (heads,) n, d], 0 where there is none.

    `before` and `run` are as for `ShortConv`.
    """
    n = x.shape[-2]
    given = F.pad(x, (0, 0, count, 0)) if before is None else torch.cat([before, x], dim=-2)
    given = given[..., :n, :]
    if run is None:
        return given
    run = F.pad(run, (count, 0), value=-3) if before is None else run
    return given.masked_fill(~by_token(same_run(run, 0, count, n), x), 0)


def buckets(
    ids: Tensor,
    count: int,
    factors: tuple[int, ...],
    run: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Return which of `count` buckets the last tokens up to each are in, by their ids [b, n, 1].

    There is a factor for each of them, the last one's first; `before` and `run` are as for
    `ShortConv`.
    """
    n, back = ids.shape[-2], len(factors) - 1
    given = F.pad(ids, (0, 0, back, 0)) if before is None else torch.cat([before, ids], dim=-2)
    if run is not None and before is None:
        run = F.pad(run, (back, 0), value=-3)
    mixed = torch.zeros_like(ids)
    for ago, factor in enumerate(factors):
        at = back - ago
        part = given[..., at : at + n, :]
        if run is not None and ago:
            part = part.masked_fill(~by_token(same_run(run, at, back, n), ids), 0)
        mixed = mixed ^ (part * factor)
    return mixed % count


def drop_sequence(
    x: Tensor, rate: float, scaled: bool, training: bool, run: Tensor | None
) -> Tensor:
    """Zero the sequences of x [b, (heads,) n, d] at a rate, in training; `run` numbers them."""
    if not training:
        return x
    if run is None:
        drawn = torch.rand(x.shape[0], 1, dtype=torch.float32, device=x.device)
    else:
        each = torch.rand(run.shape, dtype=torch.float32, device=x.device)
        drawn = each.gather(1, run.clamp(min=0))
    stays = by_token(drawn >= rate, x).to(x.dtype)
    return x * stays / (1 - rate) if scaled else x * stays


def same_run(run: Tensor, one: int, other: int, n: int) -> Tensor:
    """Say which of n tokens [b, n] are of one sequence, those from `one` and from `other` on."""
    return run[:, one : one + n] == run[:, other : other + n]


def running_sum(x: Tensor, run: Tensor | None, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums of x [b, (heads,) n, d] over the tokens up to each one, and in float64.

    `run` [b, n] numbers the sequences, None where all tokens are of one; `past` [b, (heads,) 1, d]
    is the sum of what came before, for those of sequence 0.
    """
    total = x.double().cumsum(-2)
    if run is not None:
        total = total - before_own(total, run)
    if past is not None:
        total = total + (past if run is None else past.where(by_token(run == 0, x), 0))
    return total.to(torch.promote_types(x.dtype, torch.float32)), total


def before_own(total: Tensor, run: Tensor) -> Tensor:
    """Return what sums over whole rows [b, (heads,) n, d] come to before each one's sequence."""
    step = torch.arange(run.shape[1], device=run.device)
    new = run[:, 1:] != run[:, :-1]
    start = torch.where(F.pad(new, (1, 0), value=False), step, 0).cummax(1)[0]
    return F.pad(total, (0, 0, 1, 0)).gather(-2, by_token(start, total).expand(total.shape))


def running_mean(
    x: Tensor, run: Tensor | None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return means where `running_sum` returns sums; of the past, sums and how many there were."""
    _, total = running_sum(F.pad(x.double(), (0, 1), value=1), run, past)
    mean = total[..., :-1] / total[..., -1:]
    return mean.to(torch.promote_types(x.dtype, torch.float32)), total


def running_max(x: Tensor, run: Tensor | None, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return maxima where `running_sum` returns sums; of the past, maxima and a one, if any."""
    most = x
    if x.shape[-2]:
        most = x.cummax(-2)[0] if run is None else max_of_own(x, run)
    most = most.to(torch.promote_types(x.dtype, torch.float32))
    if past is not None:
        there = past[..., -1:] > 0
        there = there if run is None else there & by_token(run == 0, x)
        earlier = past[..., :-1].to(most.dtype)
        most = torch.where(there & (earlier > most), earlier, most)
    return most, F.pad(most.double(), (0, 1), value=1)


def max_of_own(x: Tensor, run: Tensor) -> Tensor:
    """Return the maxima of x [b, (heads,) n, d] over the tokens of each one's sequence up to it.

    Tokens are ranked along the row. The rank that is largest so far of all that have the highest
    number of a sequence is that of the maximum.
    """
    n = x.shape[-2]
    order = x.argsort(dim=-2, stable=True)
    rank = order.argsort(dim=-2)
    top = (by_token(run, x) * n + rank).cummax(-2)[0] % n
    return x.gather(-2, order.gather(-2, top))
