"""The visible pairs of an attention, and what looks from one pair at others.

Pairs are a list: four index tensors (batch, head, query, key). What a row may not see is not
in it, so nothing is ever computed of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Pairs(NamedTuple):
    """Pairs of tokens, as four index tensors that broadcast together."""

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor


class Groups:
    """A partition of the pairs, for sums and maxima within each part."""

    def __init__(self, label: Tensor) -> None:
        _, self.of, self.sizes = torch.unique(label, return_inverse=True, return_counts=True)
        self.count = len(self.sizes)

    def sum(self, x: Tensor) -> Tensor:
        """Return, for every pair, the sum of x over its group."""
        x = x.expand(self.of.shape)
        total: Tensor = x.new_zeros(self.count).index_add(0, self.of, x)[self.of]
        return total

    def mean(self, x: Tensor) -> Tensor:
        """Return, for every pair, the mean of x over its group."""
        sizes: Tensor = self.sizes[self.of].to(x)
        return self.sum(x) / sizes

    def max(self, x: Tensor) -> Tensor:
        """Return, for every pair, the largest x of its group; equal ones share the gradient."""
        x = x.expand(self.of.shape)
        top = x.new_full((self.count,), -torch.inf)
        largest: Tensor = top.scatter_reduce(0, self.of, x, "amax")[self.of]
        return largest

    @property
    def first(self) -> Tensor:
        """One pair of every group."""
        at = torch.arange(len(self.of), device=self.of.device)
        last = self.of.new_full((self.count,), len(self.of))
        first: Tensor = last.scatter_reduce(0, self.of, at, "amin")
        return first


class Map:
    """The map of one attention: its rows, its columns, and functions of all of it."""

    def __init__(self, pairs: Pairs, shape: torch.Size) -> None:
        _, heads, queries, keys = shape
        self.pairs, self.shape = pairs, shape
        head = pairs.batch * heads + pairs.head
        self.rows = Groups(head * queries + pairs.query)
        self.columns = Groups(head * keys + pairs.key)

    def of(self, name: str, x: Tensor, tensor: Tensor | None, training: bool) -> Tensor:
        """Return a function of the map of x, at every pair. Invisible pairs count as zero."""
        x = x.expand(self.pairs.key.shape)
        match name:
            case "sum_keys":
                return self.rows.sum(x)
            case "mean_keys":
                return self.rows.mean(x)
            case "max_keys":
                return self.rows.max(x)
            case "sum_queries":
                return self.columns.sum(x)
            case "mean_queries":
                return self.columns.mean(x)
            case "max_queries":
                return self.columns.max(x)
            case "running_keys":  # over the visible keys up to this one
                return self._dense(x).cumsum(-1)[self.pairs]
            case "running_queries":  # over the queries up to this one that see the key
                return self._dense(x).cumsum(-2)[self.pairs]
            case "sum_group" | "max_group" if tensor is not None:  # of the visible keys
                at = tensor.long().expand(x.shape)
                count = int(at.max()) + 1 if at.numel() else 1
                groups = Groups(self.rows.of * count + at)
                return groups.sum(x) if name == "sum_group" else groups.max(x)
            case "rank_keys":  # how many of the row are larger, or as large and before it
                dense = self._dense(x, -torch.inf)
                order = torch.argsort(dense, dim=-1, descending=True, stable=True)
                return torch.argsort(order, dim=-1)[self.pairs].to(x)
            case "coin":
                drawn = torch.rand(self.shape, dtype=torch.float32, device=x.device)
                heads = drawn[self.pairs] < x if training else torch.ones_like(x)
                return heads.to(x)
            case "mix_heads" if tensor is not None:
                return torch.einsum("gh,bhnm->bgnm", tensor, self._dense(x))[self.pairs]
            case "convolve" if tensor is not None:
                return self._convolved(self._dense(x), tensor)[self.pairs]
        raise ValueError(f"`{name}` is not a function of maps")

    def _dense(self, x: Tensor, elsewhere: float = 0.0) -> Tensor:
        dense: Tensor = x.new_full(self.shape, elsewhere).index_put(tuple(self.pairs), x)
        return dense

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Slide kernel [(heads,) a, b] over x: a − 1 queries back, keys to both sides alike."""
        heads = self.shape[1]
        if not x.numel():
            return x
        back, across = kernel.shape[-2] - 1, kernel.shape[-1] - 1
        padded = functional.pad(x, (across // 2, across - across // 2, back, 0))
        weights = kernel.expand(heads, *kernel.shape[-2:])[:, None]
        return functional.conv2d(padded, weights.to(x), groups=heads)
