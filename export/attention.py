"""A block's attention alone, of queries, keys and values that others have made.

    attend = hl.attention("mine.loom", "local")
    o = attend(q, k, v)

    hl.register_attention("capped", "mine.loom", "local")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="capped")

What a block says of pairs is kept: `similarity`, `score`, `mask`, `select`, `normalize`, `weights`.
Projections, positions, scale and caches are the caller's. A block is made for the heads that it is
given, of the text

    block given : local {
      heads = 8; kv_heads = 2; head_dim = 64; …
      q = x | slice(0, 512) | split(8)
      k = x | slice(512, 640) | split(2)
      v = x | slice(640, 768) | split(2)
      out = o | merge
    }

of whole sequences, and the same with keys and values of a `context` for fewer queries than keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.algebra.masks import of_distance
from ..compiler.api import What, architecture, build_module
from ..compiler.api import target as target_of
from ..compiler.checking.check import check, find
from ..compiler.facts.parameters import weights
from ..compiler.model import Architecture, Block, Mixing, Model, Pairwise, Read, flow_nodes
from ..grammar.parse import parse

OWN = ("q", "k", "v", "o", "given_rest")


def attention(
    what: What, block: str | None = None, *, backend: str = "auto", optimize: str = "default"
) -> Attention:
    """Return a block's attention as a function of queries, keys and values.

    Raises `LoomError` for a wrong description, `ValueError` where a block has what no caller
    brings: weights, streams of its own, a recurrence.
    """
    arch = architecture(what)
    found = _of_pairs(find(arch, block))
    made = _derived(arch, found.name, _Sizes(2 * found.heads // found.kv_heads, 2, 8, 8, 1.0, 0.0))
    _expect_nothing_of_its_own(found.name, made)
    return Attention(arch, found, backend, optimize)


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
    model's, and so is dropout. Maps are not returned. Raises what `attention` does, `ImportError`
    without Transformers 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    arch = architecture(what)
    named = block if isinstance(block, Mapping) else {"": block}
    made = {
        kind: attention(arch, each, backend=backend, optimize=optimize)
        for kind, each in named.items()
    }
    AttentionInterface.register(name, _Registered(made))
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
        out = "o | merge" if not rest else "o | merge | concat(given_rest)"
        return f"""
block given : {base} {{
  width = {width}; {far}
  heads = {self.heads}; kv_heads = {self.kv_heads}
  head_dim = {self.head_dim}; value_dim = {self.value_dim}
  scale = {self.scale!r}; dropout = {self.dropout!r}
  position = none; source = {source}
  {side["q"]}
  {side["k"]}
  {side["v"]}
  {f"let given_rest = x | slice(0, {rest})" if rest else ""}
  out = {out}
}}
"""

    @property
    def width(self) -> int:
        """The features of a token where keys are of a context: a query, and what is mixed."""
        return self.heads * max(self.head_dim, self.value_dim)


def _derived(arch: Architecture, base: str, sizes: _Sizes, whole: bool = True) -> Block:
    made = find(check(parse(f"{arch.text}\n{sizes.text(base, whole)}")), "given")
    assert isinstance(made, Block)
    return made


def _of_pairs(found: Block | Model) -> Block:
    """Return what was found, a block whose queries meet keys, or raise `ValueError`."""
    if not isinstance(found, Block) or found.kind != "block":
        raise ValueError(f"`{found.name}` is no block; name the block whose attention it is")
    mixing = found.mixings.get("o")
    if mixing is None or not isinstance(mixing.mix, Pairwise):
        raise ValueError(f"`{found.name}` is a recurrence; it has no attention to keys")
    return found


def _expect_nothing_of_its_own(name: str, made: Block) -> None:
    """Raise `ValueError` where a block is more than an attention to keys that are given."""
    learned = ", ".join(f"`{each.name}`" for each in weights(made))
    if learned:
        raise ValueError(f"`{name}` has weights of its own, {learned}, for which its caller has no "
                         "place: make them `const`")  # fmt: skip
    for stream in made.streams:
        nodes = flow_nodes(stream.flow)
        if stream.name not in OWN and any(
            isinstance(node, Mixing) or (isinstance(node, Read) and node.name in ("x", "context"))
            for node in nodes
        ):
            raise ValueError(f"`{name}` reads `{stream.name}`, a stream of its own, where only "
                             "queries, keys and values are given")  # fmt: skip


class Attention:
    """A block's attention, made anew for heads of other sizes."""

    def __init__(self, arch: Architecture, block: Block, backend: str, optimize: str) -> None:
        self.arch, self.block = arch, block
        self.backend, self.optimize = backend, optimize
        self.made = cache(self._made)

    @cached_property
    def by_distance(self) -> bool:
        """Whether `i` and `j` matter through i - j alone: keys may then be counted from any."""
        return all(map(of_distance, cast(Pairwise, self.block.mixings["o"].mix).exprs))

    def _made(
        self, sizes: _Sizes, whole: bool, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        block = _derived(self.arch, self.block.name, sizes, whole)
        target = target_of(self.backend, device, self.optimize)
        return build_module(block, target, device=device, dtype=dtype)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        places: Tensor | None = None,
        there: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return what queries [b, h, n, d] get of keys [b, g, m, d] and values [b, g, m, e].

        That is [b, h, n, e]. Queries are the last n of m tokens, or stand at `places` [b, n] among
        those keys that are `there` [b, m]; where n is m, `segments` [b, n] are sequences of their
        own. `scale` is 1 / √d where it is not given; `dropout` is of the weights.
        """
        (heads, n, d), (groups, m) = query.shape[1:], key.shape[1:3]
        scale = d**-0.5 if scale is None else float(scale)
        sizes = _Sizes(heads, groups, d, value.shape[-1], scale, float(dropout))
        made = self.made(sizes, n == m, query.device, query.dtype).train(dropout > 0)
        x = _features(query)
        if n == m:
            given = {"attention_mask": there, "segments": segments}
            x = torch.cat([x, _features(key), _features(value)], -1)
            found = made(x, **{name: each for name, each in given.items() if each is not None})
        else:
            places = torch.arange(m - n, m, device=x.device) if places is None else places
            x = F.pad(x, (0, sizes.width - x.shape[-1]))
            context = torch.cat([_features(key), _features(value)], -1)
            found = made(x, context=context, context_mask=there, positions=places)
        mixed: Tensor = found[..., : heads * sizes.value_dim]
        return mixed.reshape(*mixed.shape[:2], heads, -1).transpose(1, 2)


class _Registered:
    """What a layer of Transformers calls: the attention for its kind of layer."""

    def __init__(self, made: dict[str, Attention]) -> None:
        self.made = made

    def _of(self, layer: nn.Module) -> Attention:
        if "" in self.made:
            return self.made[""]
        kinds = getattr(getattr(layer, "config", None), "layer_types", None)
        kind = getattr(layer, "layer_type", None) or (kinds and kinds[cast(int, layer.layer_idx)])
        if kind not in self.made:
            known = ", ".join(self.made)
            raise ValueError(f"there is a block for layers of {known}, none for {kind!r}")
        return self.made[cast(str, kind)]

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
        attend = self._of(module)
        rows: tuple[Tensor, ...] = ()
        if attention_mask is not None:
            if attention_mask.dtype != torch.int64:
                raise ValueError("a registered attention makes its own mask: give `attention_mask` "
                                 "as [batch, tokens], 1 a token and 0 padding")  # fmt: skip
            rows = attention_mask[:, :, 0].unbind(1)
        if len(rows) > 3 and not attend.by_distance:
            raise ValueError(f"`{attend.block.name}` reads places, `i` or `j`, and the model's "
                             "cache has dropped the first keys; keep them")  # fmt: skip
        done = attend(
            query,
            key,
            value,
            scale=scaling,
            dropout=dropout if module.training else 0.0,
            places=rows[0][:, : query.shape[2]] if rows else None,
            there=rows[1].bool() if len(rows) > 1 else None,
            segments=rows[2] if len(rows) > 2 and query.shape[2] == key.shape[2] else None,
        )
        return done.transpose(1, 2), None


def _features(x: Tensor) -> Tensor:
    """Return heads [b, h, n, d] as features [b, n, h · d]."""
    return x.transpose(1, 2).flatten(2)
