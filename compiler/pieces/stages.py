"""Stages of pipelines: norms, features, draws, and modules with weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension of x to length one."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * (exact.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def l1_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension of x by the sum of its absolute values."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(exact, p=1.0, dim=-1, eps=eps).to(x.dtype)


def elu(x: Tensor) -> Tensor:
    """Return x where x > 0, else exp(x) - 1.

    A compiler takes the gradient of `F.elu` to be laid out as x is, which it need not be.
    """
    if torch.compiler.is_compiling():
        return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))
    return F.elu(x)


class TanhOfMany(torch.autograd.Function):
    """tanh(x) = (e - 1) / (e + 1) with e = exp(2 x), by `expm1`, which keeps its digits near 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return tanh(x) in float32; from 10 on it is 1."""
        less = (2 * x).clamp_(max=20).expm1_()
        return less.div_(less + 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        """Keep the result."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient, with a derivative of its own."""
        (y,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.tanh_backward(grad, y)
        return found


def tanh(x: Tensor) -> Tensor:
    """Return tanh(x); of many float32 on a CPU in half of PyTorch's time."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.tanh(x)  # a compiler's `expm1` has not its digits
    done: Tensor = TanhOfMany.apply(x) if x.numel() >= 2**16 else torch.tanh(x)
    return done


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


def largest_feature(x: Tensor) -> Tensor:
    """Return the number of the largest of the last dimension, the first of equal ones."""
    at = x.detach().argmax(-1, keepdim=True)
    return at.to(torch.promote_types(x.dtype, torch.float32))


def combine(x: Tensor, weights: Tensor) -> Tensor:
    """Sum the heads of x [b, r, n, d] by weights [b, r, n, e] into e heads."""
    return (weights.transpose(-3, -2).mT @ x.transpose(-3, -2)).transpose(-3, -2)


def sinkhorn(x: Tensor, times: int, eps: float) -> Tensor:
    """Scale rows and columns of positive matrices x [b, r, n, r] until they sum to about one."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact / (exact.sum(-3, keepdim=True) + eps)
    for _ in range(times - 1):
        exact = exact / (exact.sum(-1, keepdim=True) + eps)
        exact = exact / (exact.sum(-3, keepdim=True) + eps)
    return exact.to(x.dtype)


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


class Again:
    """A part that stands elsewhere too: it has the same tensors, and a cache for each place."""

    def __init__(self, part: Any) -> None:
        self.part = part  # no submodule, as this is none

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.part(*given, **named)

    def init_cache(self, batch: int, length: int | None = None) -> Any:
        """Return what the part keeps, still empty."""
        return self.part.init_cache(batch, length)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module, then those of parts in it that stand elsewhere."""
    yield from module.parameters()
    for each in module.modules():
        for part in vars(each).values():
            if isinstance(part, Again):
                yield from weights_of(part.part)


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


class GroupedLinear(nn.Module):
    """A linear map whose weight is zero but for one block for each group of features."""

    def __init__(self, groups: int, into: int, out: int) -> None:
        super().__init__()
        into, out = into // groups, out // groups
        unit = torch.empty(groups, out, into).uniform_(-1, 1)
        self.weight = nn.Parameter(unit * into**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, into] to […, out]."""
        groups = self.weight.shape[0]
        parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).transpose(-3, -2)
        return (parts @ self.weight.mT).transpose(-3, -2).flatten(-2)


class Latents(nn.Module):
    """A learned list of tokens, the same for every sequence."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(count, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, count, features] for the batch of x [b, …]."""
        return self.weight.to(x.dtype).expand(x.shape[0], -1, -1)


def embedded(table: nn.Embedding, tokens: Tensor) -> Tensor:
    """Return the rows [b, n, width] of a table. Raises `ValueError` for what is no token.

    A CPU tells which tokens are outside of the table; they are not read beforehand.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`tokens` must be torch.int64 or torch.int32, they are {tokens.dtype}")
    try:
        rows: Tensor = table(tokens)
    except IndexError:
        size = table.num_embeddings
        row, at = ((tokens < 0) | (tokens >= size)).nonzero()[0].tolist()
        found = f"token [{row}, {at}] is {int(tokens[row, at])}"
        raise ValueError(f"{found}, the vocabulary has 0 to {size - 1}") from None
    return rows


def mean_tokens(x: Tensor, run: Tensor | None) -> Tensor:
    """Return the mean of x [b, (heads,) n, d] over tokens that are no padding: run [b, n] >= 0."""
    if run is None:
        return x.mean(-2, keepdim=True) if x.shape[-2] else x.sum(-2, keepdim=True)
    live = (run >= 0)[:, None, :, None] if x.ndim == 4 else (run >= 0)[..., None]
    count = live.sum(-2, keepdim=True).clamp(min=1)
    return x.masked_fill(~live, 0).sum(-2, keepdim=True) / count


def mean_of_all(x: Tensor, run: Tensor | None) -> Tensor:
    """Return the mean of all of x [b, (heads,) n, d], of tokens that are no padding."""
    if run is None:
        return x.mean() if x.numel() else x.sum()
    live = (run >= 0)[:, None, :, None] if x.ndim == 4 else (run >= 0)[..., None]
    count = live.expand(x.shape).sum().clamp(min=1)
    return x.masked_fill(~live, 0).sum() / count


def mean_of_each(x: Tensor, run: Tensor | None) -> Tensor:
    """Return the mean of each feature of x [b, (heads,) n, d] over tokens that are no padding."""
    if run is None:
        return x.sum((0, -2), keepdim=True) / max(1, x.shape[0] * x.shape[-2])
    live = (run >= 0)[:, None, :, None] if x.ndim == 4 else (run >= 0)[..., None]
    return x.masked_fill(~live, 0).sum((0, -2), keepdim=True) / (run >= 0).sum().clamp(min=1)
