"""A block's attention in the models of Transformers, under a name.

    hl.register_attention("capped", "mine.loom", "local")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="capped")

The model keeps its projections, positions, scale, caches and weights; what a block says of pairs,
`similarity`, `score`, `mask`, `select`, `normalize`, `weights`, takes the place of the model's own
attention and mask. A block is made for the heads that a layer brings, of the text

    block registered : local {
      heads = 8; kv_heads = 2; head_dim = 64; …
      q = x | slice(0, 512) | split(8)
      k = x | slice(512, 640) | split(2)
      v = x | slice(640, 768) | split(2)
      out = o | merge
    }

of whole sequences, and the same with keys and values of a `context` for calls that go on from a
cache of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.algebra.masks import of_distance
from ..compiler.api import What, architecture, build_module
from ..compiler.api import target as target_of
from ..compiler.checking.check import check, find
from ..compiler.facts.parameters import weights
from ..compiler.model import Architecture, Block, Mixing, Pairwise, Read, flow_nodes
from ..grammar.parse import parse

OWN = ("q", "k", "v", "o", "registered_rest")


def register_attention(
    name: str,
    what: What,
    block: str | Mapping[str, str] | None = None,
    *,
    backend: str = "auto",
    optimize: str = "default",
) -> None:
    """Register a block's attention with Transformers, as `attn_implementation=name`.

    `block` names a block of the description `what`, or one for each kind of layer, as the
    configuration calls them: `{"full_attention": "far", "sliding_attention": "near"}`. Without it,
    it is the only one. Both the attention and its mask are registered; prefill, steps with the
    model's caches, padding, packed rows and training work as with `sdpa`. The scale is the
    model's, and so is dropout. Maps are not returned. Raises `LoomError` for a wrong description,
    `ValueError` where a block has what a model of theirs has no place for: weights, streams of its
    own, a recurrence; `ImportError` without Transformers 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    arch = architecture(what)
    named = block if isinstance(block, Mapping) else {"": find(arch, block).name}
    for each in named.values():
        _expect_of_pairs(arch, each)
    attention = _Registered(arch, dict(named), backend, optimize)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, told)


def told(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Return where queries and keys stand [b, 1 to 4, 1, keys], for the `mask` of a block.

    Of rows: the place of each query in its sequence, of which padding is no part; which keys there
    are; the segment of each token. Those after the first are left out where they say nothing. A
    fourth says that the first keys have left the cache. The model's own mask is asked for
    segments alone.
    """
    slot = torch.arange(kv_length, device=device) + kv_offset
    real = (slot < q_offset + q_length)[None].expand(batch_size, -1)
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        seen = F.pad(attention_mask.bool(), (0, missing), value=False)
        real = real & seen[:, kv_offset : kv_offset + kv_length]
    count = real.cumsum(1)
    at = torch.arange(q_length, device=device) + (q_offset - kv_offset)
    queries = F.pad(count[:, at] - 1, (0, kv_length - q_length))
    whole = kv_length == q_length
    segment = torch.zeros_like(count)
    if whole and attention_mask is None and mask_function is not None and q_length > 1:
        row = torch.arange(batch_size, device=device)[:, None]
        after = torch.arange(1, q_length, device=device)
        near = mask_function(row, torch.zeros_like(row), after, after - 1)
        segment = F.pad((~near.expand(batch_size, -1)).cumsum(1), (1, 0))
    rows = [queries, real.long(), segment, torch.full_like(count, kv_offset)]
    if not torch.compiler.is_compiling():
        said = (True, not bool(real.all()), bool(segment.any()), bool(kv_offset))
        rows = rows[: 1 + max(at for at, each in enumerate(said) if each)]
    return torch.stack(rows, 1)[:, :, None]


@dataclass(frozen=True)
class _Sizes:
    """What a layer of theirs brings."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dropout: float

    def text(self, base: str, whole: bool) -> str:
        """Return the block whose features are these queries, keys and values."""
        at, side = 0, {}
        sizes = (self.heads * self.head_dim, self.kv_heads * self.head_dim,
                 self.kv_heads * self.value_dim)  # fmt: skip
        for name, size, heads in zip(
            "qkv", sizes, (self.heads, *2 * (self.kv_heads,)), strict=True
        ):
            at = at if whole or name != "k" else 0
            source = "x" if whole or name == "q" else "context"
            side[name] = f"{name} = {source} | slice({at}, {at + size}) | split({heads})"
            at += size
        width, far = (at, "") if whole else (self.width, f"context_width = {sum(sizes[1:])}")
        source = "x" if whole else "context"
        rest = width - self.heads * self.value_dim
        out = "o | merge" if not rest else "o | merge | concat(registered_rest)"
        return f"""
block registered : {base} {{
  width = {width}; {far}
  heads = {self.heads}; kv_heads = {self.kv_heads}
  head_dim = {self.head_dim}; value_dim = {self.value_dim}
  scale = {self.scale!r}; dropout = {self.dropout!r}
  position = none; source = {source}
  {side["q"]}
  {side["k"]}
  {side["v"]}
  {f"let registered_rest = x | slice(0, {rest})" if rest else ""}
  out = {out}
}}
"""

    @property
    def width(self) -> int:
        """The features of a token where keys are of a context: a query, and what is mixed."""
        return self.heads * max(self.head_dim, self.value_dim)


def _derived(arch: Architecture, base: str, sizes: _Sizes, whole: bool) -> Block:
    made = find(check(parse(f"{arch.text}\n{sizes.text(base, whole)}")), "registered")
    assert isinstance(made, Block)
    return made


def _expect_of_pairs(arch: Architecture, name: str) -> None:
    """Raise `ValueError` where a block is more than an attention to given keys."""
    found = find(arch, name)
    if not isinstance(found, Block) or found.kind != "block":
        raise ValueError(f"`{name}` is no block; an attention is registered by its block")
    mixing = found.mixings.get("o")
    if mixing is None or not isinstance(mixing.mix, Pairwise):
        raise ValueError(f"`{name}` is a recurrence; only attention to keys can be registered")
    groups = found.heads // found.kv_heads
    made = _derived(arch, name, _Sizes(2 * groups, 2, 8, 8, 1.0, 0.0), True)
    learned = ", ".join(f"`{each.name}`" for each in weights(made))
    if learned:
        raise ValueError(f"`{name}` has weights of its own, {learned}; a model of Transformers has "
                         "no place for them: make them `const`")  # fmt: skip
    for stream in made.streams:
        nodes = flow_nodes(stream.flow)
        if stream.name not in OWN and any(
            isinstance(node, Mixing) or (isinstance(node, Read) and node.name in ("x", "context"))
            for node in nodes
        ):
            raise ValueError(f"`{name}` reads `{stream.name}`, a stream of its own; a registered "
                             "attention has queries, keys and values alone")  # fmt: skip


class _Registered:
    """What a layer of Transformers calls."""

    def __init__(
        self, arch: Architecture, named: dict[str, str], backend: str, optimize: str
    ) -> None:
        self.arch, self.named = arch, named
        self.backend, self.optimize = backend, optimize
        self.made = cache(self._made)

    def _made(
        self, name: str, sizes: _Sizes, whole: bool, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        block = _derived(self.arch, name, sizes, whole)
        target = target_of(self.backend, device, self.optimize)
        return build_module(block, target, device=device, dtype=dtype)

    def _name(self, layer: nn.Module) -> str:
        """Return the block for a layer."""
        if "" in self.named:
            return self.named[""]
        kinds = getattr(getattr(layer, "config", None), "layer_types", None)
        kind = getattr(layer, "layer_type", None) or (kinds and kinds[cast(int, layer.layer_idx)])
        if kind not in self.named:
            known = ", ".join(self.named)
            raise ValueError(f"there is a block for layers of {known}, none for {kind!r}")
        return self.named[cast(str, kind)]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return what queries [b, h, n, d] get of keys and values [b, g, m, ·]: [b, n, h, e]."""
        (heads, n, d), (groups, m) = query.shape[1:], key.shape[1:3]
        if attention_mask is not None and attention_mask.dtype != torch.int64:
            raise ValueError("a registered attention makes its own mask: give `attention_mask` as "
                             "[batch, tokens], 1 a token and 0 padding")  # fmt: skip
        scale = d**-0.5 if scaling is None else float(scaling)
        sizes = _Sizes(heads, groups, d, value.shape[-1], scale, float(dropout))
        name = self._name(module)
        rows: tuple[Tensor, ...] = ()
        if attention_mask is not None:
            rows = attention_mask[:, :, 0].unbind(1)
        made = self.made(name, sizes, n == m, query.device, query.dtype).train(module.training)
        if len(rows) > 3:
            self._expect_distances(name)
        x = _features(query)
        if n == m:
            more: dict[str, Any] = {}
            if len(rows) > 1:
                more["attention_mask"] = rows[1].bool()
            if len(rows) > 2:
                more["segments"] = rows[2]
            found = made(torch.cat([x, _features(key), _features(value)], -1), **more)
        else:
            places = torch.arange(m - n, m, device=x.device) if not rows else rows[0][:, :n]
            there = rows[1].bool() if len(rows) > 1 else None
            x = F.pad(x, (0, sizes.width - x.shape[-1]))
            context = torch.cat([_features(key), _features(value)], -1)
            found = made(x, context=context, context_mask=there, positions=places)
        return found[..., : heads * sizes.value_dim].unflatten(-1, (heads, -1)), None

    def _expect_distances(self, name: str) -> None:
        mixing = cast(Block, find(self.arch, name)).mixings["o"]
        if not all(map(of_distance, cast(Pairwise, mixing.mix).exprs)):
            raise ValueError(f"`{name}` reads places, `i` or `j`, and the model's cache has "
                             "dropped the first keys: use a cache that keeps all")  # fmt: skip


def _features(x: Tensor) -> Tensor:
    """Return heads [b, h, n, d] as features [b, n, h · d]."""
    return x.transpose(1, 2).flatten(2)
