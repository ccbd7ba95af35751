"""Mechanisms of the zoo for tests: built from their files, or from changed texts of them.

plain = Mechanism("mha")
flat = Mechanism("alibi", ("position = alibi", "score = s + 0 * abs(i - j)"), like=plain)
assert_close(flat(x), plain(x))
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from headloom.compiler import zoo
from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.attend import Given, Places, attend
from headloom.compiler.meaning.reference import ReferenceBlock, ReferenceModel, reference
from headloom.compiler.meaning.scan import scan
from headloom.compiler.model import Block, Mixing, Model, Pairwise, Recurrence
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

N = 11
MHA = "block mha { width = 32; heads = 4; mask = causal }"


def text_of(name: str, *changes: tuple[str, str]) -> str:
    """Return a file of the zoo with parts replaced, each of which must be there."""
    text = zoo.entry(name).text
    for old, new in changes:
        assert old in text, f"`{old}` is not in {name}.loom"
        text = text.replace(old, new)
    return text


@cache
def checked(text: str, part: str | None = None) -> Block | Model:
    """Return what a text describes, or one of its blocks, as wide as it stands in the model."""
    found = check(parse(text))
    width = None if part is None else next(iter(found.models.values())).width
    return find(found, part, width)


@lru_cache(maxsize=512)
def _made(text: str, part: str | None) -> tuple[Block | Model, nn.Module]:
    what = checked(text, part)
    return what, build_module(what, Target("torch"), dtype=torch.float64, seed=0).eval()


class Mechanism:
    """A block by its name in the zoo or by its text, with random weights or those of another.

    Of a model there is only what goes in and comes out; `part` is one of its blocks.
    """

    meaning: ReferenceBlock | ReferenceModel

    def __init__(
        self,
        what: str,
        *changes: tuple[str, str],
        like: Mechanism | None = None,
        part: str | None = None,
    ) -> None:
        text = what if "{" in what else text_of(what, *changes)
        self.what, self.module = _made(text, part)
        self.meaning = reference(self.what, dtype=torch.float64).eval()
        generator = torch.Generator().manual_seed(1)
        theirs = dict(like.meaning.named_parameters()) if like else {}
        with torch.no_grad():
            for name, each in self.meaning.named_parameters():
                if name in theirs and theirs[name].shape == each.shape:
                    each.copy_(theirs[name])
                else:
                    noise = torch.randn(each.shape, generator=generator, dtype=torch.float64)
                    each += 0.3 * noise

    @property
    def block(self) -> Block:
        assert isinstance(self.what, Block)
        return self.what

    def set(self, **values: Any) -> Self:
        """Give tensors values; `q_proj_weight` is `q_proj.weight`."""
        mine = {name.replace(".", "_"): each for name, each in self._tensors().items()}
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(torch.as_tensor(value, dtype=torch.float64).expand_as(mine[name]))
        return self

    def parameter(self, name: str) -> Tensor:
        return self._tensors()[name].detach()

    def _tensors(self) -> dict[str, Tensor]:
        """Return what is learned, and what training moves."""
        return {**dict(self.meaning.named_parameters()), **dict(self.meaning.named_buffers())}

    def trained(self, *batches: Tensor) -> dict[str, Tensor]:
        """Return the tensors of what is compiled, after a forward pass in training for each x."""
        module = copy.deepcopy(self.module).train()
        module.load_state_dict(self.meaning.state_dict())
        with torch.no_grad():
            for x in batches:
                module(x)
        return module.state_dict()

    def __call__(self, x: Tensor, **given: Tensor) -> Tensor:
        """Return what the compiled block or model makes of x."""
        self.module.load_state_dict(self.meaning.state_dict())
        with torch.no_grad():
            y: Tensor = self.module(x, **given)
        return y

    @torch.no_grad()
    def streams(
        self, x: Tensor, positions: Tensor | None = None, **given: Tensor
    ) -> dict[str, Any]:
        """Return q, k, v and the further streams, each with its batch."""
        found = {"x": x, **given}
        call = self._call(found)
        if positions is not None:
            call.positions["n"] = positions.expand(x.shape[:2])
        for stream in self.block.streams:
            flow = stream.flow
            if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
                call.mixed[stream.name] = attend(flow, call)
                found[stream.name] = call.mixed[stream.name].o
            else:
                found[stream.name] = self.meaning._flow(flow, call)
        return found

    def _call(self, streams: dict[str, Tensor]) -> Given:
        assert isinstance(self.meaning, ReferenceBlock)
        tensors = {each.name: self.meaning._tensor(each.name) for each in self.block.tensors}
        places = {
            axis: torch.arange(streams[name].shape[1]).expand(streams[name].shape[:2])
            for axis, name in (("n", "x"), ("m", "context"))
            if name in streams
        }
        return Given(streams, tensors, Places(places), None, False, {})

    @torch.no_grad()
    def mixed(self, x: Tensor, **changed: Tensor) -> Tensor:
        """Return the mixed heads [b, heads, n, value_dim], of changed streams where given."""
        given = {key: changed.pop(key) for key in ("context",) if key in changed}
        streams = {**self.streams(x, **given), **changed}
        mixing = self.block.mixings["o"]
        call = self._call(streams)
        return scan(mixing, call) if isinstance(mixing.mix, Recurrence) else attend(mixing, call).o

    def weights(self, x: Tensor, **changed: Tensor) -> Tensor:
        """Return the map [b, heads, n, m]: what comes out where the values are one-hot."""
        k = self.streams(x, **{key: each for key, each in changed.items() if key == "context"})["k"]
        return self.mixed(
            x, v=torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1), **changed
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return the scaled products of queries and keys [b, heads, n, m]."""
        q, k = (self.streams(x)[name] for name in "qk")
        return (
            self.block.mixings["o"].mix.scale
            * q
            @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        )


def tokens(n: int = N, width: int = 32, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=generator, dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


def visible(name: str, n: int, *changes: tuple[str, str]) -> Tensor:
    """Return who sees whom in a pairwise block, [heads, n, n]."""
    mechanism = Mechanism(name, *changes)
    x = tokens(n, mechanism.block.width, batch=1)
    return mechanism.weights(x)[0] != 0


def causal(n: int = N) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def softmax(s: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax over the visible, by default over all up to the query."""
    seen = causal(s.shape[-1]) if seen is None else seen
    return s.masked_fill(~seen, -torch.inf).softmax(-1)


def mapped(mechanism: Mechanism, name: str, x: Tensor) -> Tensor:
    """Return what a linear map of the block makes of x."""
    weights = dict(mechanism.meaning.named_parameters())
    bias = weights.get(f"{name}.bias")
    return linear(x, weights[f"{name}.weight"].detach(), None if bias is None else bias.detach())


def normed(mechanism: Mechanism, name: str, x: Tensor) -> Tensor:
    """Return what a layer norm of the block makes of x."""
    weight, bias = (mechanism.parameter(f"{name}.{each}") for each in ("weight", "bias"))
    return layer_norm(x, weight.shape, weight, bias)


def split(x: Tensor, heads: int = 4) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int = 4, **options: Any) -> Tensor:
    """Return plain attention of streams [b, n, d]."""
    return merge(
        scaled_dot_product_attention(*(split(each, heads) for each in (q, k, v)), **options)
    )
