"""Choices of features and tokens, and feed-forwards that each see the tokens sent to them.

weights [tokens, experts]   0.7 0 0.3 / 0 1 0 / 0.5 0 0.5
rows                        of expert 0: tokens 0, 2; of 1: token 1; of 2: tokens 0, 2
ends                        2, 3, 5
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def largest(x: Tensor, count: int, dim: int) -> Tensor:
    """Return 1 for the `count` largest along a dimension, the first of equal ones; else 0."""
    x = x.detach()
    order = x.argsort(dim=dim, descending=True, stable=True)
    return torch.zeros_like(x).scatter(dim, order.narrow(dim, 0, count), 1)


def largest_tokens(x: Tensor, count: int | None, share: float | None, run: Tensor | None) -> Tensor:
    """Return 1 where a feature of x [b, (heads,) n, d] is among the largest of its sequence.

    That is `count` tokens, or a share of them; `run` [b, n] numbers the sequences, -1 is padding.
    """
    x, n = x.detach(), x.shape[-2]
    order = x.argsort(dim=-2, descending=True, stable=True)
    if run is None:
        taken = (n if count is None else count) if share is None else max(1, math.floor(share * n))
        return (order.argsort(dim=-2) < taken).to(x.dtype)
    ordered = run.sort(dim=-1)[0]
    first = torch.searchsorted(ordered, run)  # how many tokens come before those of a sequence
    size = torch.searchsorted(ordered, run, right=True) - first
    limit = size if share is None else (share * size.double()).floor().long().clamp(min=1)
    limit = limit if count is None else torch.full_like(size, count)
    run, first, limit = (
        (each[:, None, :, None] if x.ndim == 4 else each[..., None]).expand(x.shape)
        for each in (run, first, limit)
    )
    by_run = run.gather(-2, order).argsort(dim=-2, stable=True)
    place = order.gather(-2, by_run).argsort(dim=-2) - first
    return ((place < limit) & (run >= 0)).to(x.dtype)


def one_hot(ids: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return 1 at the feature that each of ids [..., 1] names, 0 at the others."""
    return (ids.detach() == torch.arange(count, device=ids.device)).to(dtype)


class Sent:
    """The tokens of x [b, n, d] that are sent to experts, those of one after those of another.

    weights [b, n, experts] are not 0 where a token is sent, of each token to `most` at most;
    None is any number. Then the number of rows depends on the data.
    """

    def __init__(self, weights: Tensor, most: int | None) -> None:
        self.shape = weights.shape
        experts = weights.shape[-1]
        flat = weights.reshape(-1, experts)
        self.most, self.back = most, None
        if most is None:
            owner, self.token = (flat.detach() != 0).mT.nonzero().unbind(1)
            self.weight = flat[self.token, owner]
        else:
            chosen = (flat.detach() != 0).to(torch.uint8).topk(most, sorted=False)[1]
            owner, order = chosen.flatten().sort(stable=True)
            self.token, self.back = order // most, order.argsort()
            self.weight = flat.gather(1, chosen)
        self.owner = owner
        every = torch.arange(experts, device=owner.device)
        self.sizes: list[int] | None = None
        self.ends = torch.searchsorted(owner, every, right=True).to(torch.int32)

    def take(self, x: Tensor) -> Tensor:
        """Return the rows [1, rows, d] of x [b, n, d]."""
        return x.flatten(0, 1).index_select(0, self.token)[None]

    def each(self, tensor: Tensor) -> Tensor:
        """Return what each row [1, rows, …] reads of a tensor [experts, …]."""
        return tensor.index_select(0, self.owner)[None]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map rows x [rows, into] by the weights [experts, out, into] of their experts.

        PyTorch's own product of groups takes rows of a multiple of 16 bytes; a compiler, bfloat16.
        """
        narrow = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
        fits = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
        if narrow and fits and x.dtype != torch.float64 and hasattr(F, "grouped_mm"):
            return F.grouped_mm(x, weight.mT, offs=self.ends)
        if self.sizes is None:  # once, however many products there are
            self.sizes = torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                torch._check(sum(self.sizes) == len(self.token))  # a compiler has to be told
        parts = zip(x.split(self.sizes), weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, each) for rows, each in parts])

    def put(self, y: Tensor) -> Tensor:
        """Return the sum [b, n, e] of rows y [1, rows, e] at their tokens, each times its weight.

        What weighs 0 is no more than filling.
        """
        b, n, _ = self.shape
        if self.back is None:
            sums = y.new_zeros(b * n, y.shape[-1])
            sums = sums.index_add(0, self.token, self.weight[:, None].to(y.dtype) * y[0])
            return sums.view(b, n, sums.shape[-1])
        rows = y[0].index_select(0, self.back).view(*self.weight.shape, y.shape[-1])
        weight = self.weight[..., None].to(y.dtype)
        return torch.where(weight != 0, weight * rows, 0).sum(1).view(b, n, rows.shape[-1])


class Experts(nn.Module):
    """A linear map of each expert, of the rows that are sent to it."""

    def __init__(self, experts: int, into: int, out: int, bias: bool = False) -> None:
        super().__init__()
        unit = torch.empty(experts, out, into).uniform_(-1, 1)
        self.weight = nn.Parameter(unit * into**-0.5)
        self.bias = nn.Parameter(torch.zeros(experts, out)) if bias else None

    def forward(self, x: Tensor, sent: Sent) -> Tensor:
        """Map rows x [1, rows, into] to [1, rows, out]."""
        y = sent.product(x[0], self.weight.to(x.dtype))[None]
        return y if self.bias is None else y + sent.each(self.bias)
