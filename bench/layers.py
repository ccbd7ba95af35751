"""Layers as people write them by hand, with the parameters of ours: what peers are made of.

    Attention(block)         projections around scaled_dot_product_attention, with a cache
    Entmax(block)            projections around the package entmax
    Recurrent(block, call)   projections around a chunked recurrence that others wrote

Each takes a checked block and says with `ValueError` what of it the layer does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.model import Block, Mixing, Model, Pairwise, Recurrence, applies
from ..grammar.show import show

_PLAIN = {"linear", "split", "merge"}


def mixing_of(what: Block | Model, others: frozenset[str] = frozenset()) -> Mixing:
    """Return the one mixing of a block of bare projections; `others` are streams it may have."""
    if isinstance(what, Model):
        raise ValueError("it is a layer, not a model")
    if list(what.mixings) != ["o"] or what.tensors or what.context_width is not None:
        raise ValueError("it is one self-attention without tensors of its own")
    for stream in what.streams:
        if stream.name not in others | {"q", "k", "v", "o"}:
            raise ValueError(f"it has no stream `{stream.name}`")
    allowed = _PLAIN | ({"l2_norm", "pointwise"} if others else set())
    for flow in what.flows:
        for each in applies(flow):
            if each.op not in allowed:
                raise ValueError(f"it has no `{each.op}`")
    return what.mixings["o"]


class Projections(nn.Module):
    """What surrounds the mixing: q, k, v and the output."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads, self.kv_heads = block.heads, block.kv_heads
        self.dim, self.value_dim = block.head_dim, block.value_dim
        linear = _linear(block.width)
        self.q_proj = linear(block.heads * block.head_dim)
        self.k_proj = linear(block.kv_heads * block.head_dim)
        self.v_proj = linear(block.value_heads * block.value_dim)
        self.o_proj = nn.Linear(block.heads * block.value_dim, block.width, bias=False)

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, [b, n, heads, features] each."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (
            q.unflatten(-1, (-1, self.dim)),
            k.unflatten(-1, (-1, self.dim)),
            v.unflatten(-1, (-1, self.value_dim)),
        )

    def out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o_proj(o.flatten(2))
        return y


def _linear(width: int) -> Callable[[int], nn.Linear]:
    return lambda features: nn.Linear(width, features, bias=False)


@dataclass
class KeysAndValues:
    """A cache of a fixed size: [b, heads, length, features]."""

    k: Tensor
    v: Tensor
    filled: int = 0

    def added(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write further tokens and return all there are."""
        end = self.filled + k.shape[2]
        self.k[:, :, self.filled : end] = k
        self.v[:, :, self.filled : end] = v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(Projections):
    """Softmax attention, causal or of all tokens, through scaled_dot_product_attention.

    `backend` forces one of its kernels.
    """

    def __init__(self, what: Block | Model, backend: Any = None) -> None:
        mix = _pairwise(mixing_of(what))
        assert isinstance(what, Block)
        super().__init__(what)
        for found, plain in (
            (show(mix.score), "s"),
            (mix.normalize.name, "softmax"),
            (show(mix.weights), "p"),
        ):
            if found != plain:
                raise ValueError(f"it computes plain attention, not `{found}`")
        if show(mix.mask) not in ("j <= i", "true"):
            raise ValueError(f"it is causal or sees everything, not `{show(mix.mask)}`")
        self.causal = show(mix.mask) == "j <= i"
        self.scale, self.backend = mix.scale, backend

    def forward(self, x: Tensor, cache: KeysAndValues | None = None) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.streams(x))
        if cache is not None:
            first = cache.filled == 0
            k, v = cache.added(k, v)
            return self.out(self.mixed(q, k, v, first).transpose(1, 2))
        return self.out(self.mixed(q, k, v, True).transpose(1, 2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, first: bool) -> Tensor:
        """Return the heads; where tokens are appended, the last query sees every key."""
        mask = None
        if self.causal and not first and q.shape[2] > 1:
            n, m = q.shape[2], k.shape[2]
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if self.backend is None:
            return self._sdpa(q, k, v, mask, first)
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self.backend):
            return self._sdpa(q, k, v, mask, first)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=self.causal and first,
            scale=self.scale,
            enable_gqa=self.kv_heads != self.heads,
        )

    def init_cache(self, batch: int, length: int) -> KeysAndValues:
        weight = self.q_proj.weight
        size = (batch, self.kv_heads, length)
        return KeysAndValues(
            weight.new_empty(*size, self.dim), weight.new_empty(*size, self.value_dim)
        )


class Entmax(Projections):
    """Causal attention over `entmax15` of the package entmax, which keeps the whole map."""

    def __init__(self, what: Block | Model) -> None:
        mix = _pairwise(mixing_of(what))
        assert isinstance(what, Block)
        super().__init__(what)
        if mix.normalize.name != "entmax" or show(mix.mask) != "j <= i" or show(mix.score) != "s":
            raise ValueError("it computes causal entmax(1.5)")
        from importlib import import_module

        self.weights = import_module("entmax").entmax15
        self.scale = mix.scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in self.streams(x))
        k, v = (each.repeat_interleave(self.heads // each.shape[1], 1) for each in (k, v))
        n = x.shape[1]
        hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        logits = (self.scale * (q @ k.mT)).masked_fill(hidden, -1e4)  # -inf would make NaN
        return self.out((self.weights(logits, -1) @ v).transpose(1, 2))


def _pairwise(mixing: Mixing) -> Pairwise:
    if not isinstance(mixing.mix, Pairwise):
        raise ValueError(f"it is no recurrence like `{mixing.mix.name}`")
    return mixing.mix


@dataclass(frozen=True, slots=True)
class Rule:
    """What a recurrence reads beside q, k and v: `alpha` a number or rows, `beta` or none."""

    alpha: str = ""  # "", "number", "rows"
    beta: bool = False
    function: str = ""  # in flash-linear-attention


# By the name of the mixer; each must read alpha and beta as sigmoids of projections of x.
RULES = {
    "simple_gla": Rule("number", False, "simple_gla:chunk_simple_gla"),
    "gla": Rule("rows", False, "gla:chunk_gla"),
    "delta": Rule("", True, "delta_rule:chunk_delta_rule"),
    "gated_delta": Rule("number", True, "gated_delta_rule:chunk_gated_delta_rule"),
    "kda": Rule("rows", True, "kda:chunk_kda"),
}


class Recurrent(Projections):
    """A recurrence that others wrote: o = head_dim^-1/2 · q S, as they scale it.

    `call` takes q, k, v [b, n, heads, features], the logarithm of alpha (or None) and beta (or
    None), and gives o alike.
    """

    def __init__(self, what: Block | Model, call: Callable[..., Tensor]) -> None:
        mix = mixing_of(what, frozenset({"alpha", "beta"})).mix
        assert isinstance(what, Block)
        super().__init__(what)
        if not isinstance(mix, Recurrence) or mix.name not in RULES:
            raise ValueError(f"it knows the recurrences {', '.join(RULES)}")
        rule, linear = RULES[mix.name], _linear(what.width)
        features = {"number": self.heads, "rows": self.heads * self.dim}
        if rule.alpha:
            self.alpha_proj = linear(features[rule.alpha])
        if rule.beta:
            self.beta_proj = linear(self.heads)
        self.rule, self.call = rule, call
        self.unit = {name for name in "qk" if _is_unit(what, name)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.streams(x)
        q = F.normalize(q, dim=-1) if "q" in self.unit else q
        k = F.normalize(k, dim=-1) if "k" in self.unit else k
        alpha = F.logsigmoid(self.alpha_proj(x)) if self.rule.alpha else None
        if alpha is not None and self.rule.alpha == "rows":
            alpha = alpha.view(*alpha.shape[:2], self.heads, self.dim)
        beta = self.beta_proj(x).sigmoid() if self.rule.beta else None
        return self.out(self.call(q, k, v, alpha, beta))


def _is_unit(block: Block, name: str) -> bool:
    stream = block.stream(name)
    return stream is not None and any(each.op == "l2_norm" for each in applies(stream.flow))
