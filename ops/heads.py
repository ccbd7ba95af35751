"""Stages that move between tokens and heads: `split`, `merge`, `repeat`, `concat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Split(Op):
    """`split(heads)`: [n, heads · d] → [heads, n, d]."""

    name = "split"
    options = (Option("heads", "size"),)

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        if options["heads"] is None and out is not None:
            options["heads"] = out.heads
        return options

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return Shape(out.tokens, out.dim * options["heads"])

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), heads = inputs, options["heads"]
        if x.heads is not None:
            raise Mismatch("this stream is split into heads already", f"it is {x}")
        if x.dim % heads:
            label = f"width = {x.dim}, heads = {heads}, remainder {x.dim % heads}"
            raise Mismatch("`split` needs a width that the heads divide", label)
        return Shape(x.tokens, x.dim // heads, heads)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        b, n, width = inputs[0].shape
        heads = options["heads"]
        return inputs[0].reshape(b, n, heads, width // heads).transpose(1, 2)

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        return f"{inputs[0]}.unflatten(-1, ({options['heads']}, -1)).transpose(1, 2)"


class Merge(Op):
    """`merge`: [heads, n, d] → [n, heads · d]."""

    name = "merge"

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,) = inputs
        if x.heads is None:
            raise Mismatch("`merge` needs a stream with heads", f"it is {x}", "split it first")
        return Shape(x.tokens, x.dim * x.heads)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        b, heads, n, d = inputs[0].shape
        return inputs[0].transpose(1, 2).reshape(b, n, heads * d)

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        return f"{inputs[0]}.transpose(1, 2).flatten(-2)"


class Repeat(Op):
    """`repeat(times)`: one stream for several heads; heads that exist are repeated in place."""

    name = "repeat"
    options = (Option("times", "size", required=True),)

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return Shape(out.tokens, out.dim)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,) = inputs
        return replace(x, heads=(x.heads or 1) * options["times"])

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        (x,) = inputs
        x = x[:, None] if x.ndim == 3 else x
        return x.repeat_interleave(options["times"], dim=1)

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        if shapes[0].heads is None:
            return f"{inputs[0]}[:, None].expand(-1, {options['times']}, -1, -1)"
        return f"{inputs[0]}.repeat_interleave({options['times']}, dim=1)"


class Concat(Op):
    """`concat(stream)`: side by side along the last dimension."""

    name = "concat"
    options = (Option("stream", "stream", required=True),)

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        rest = out.dim - inputs[1].dim
        return replace(out, dim=rest) if rest > 0 else None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x, y = inputs
        if (x.heads, x.tokens) != (y.heads, y.tokens):
            help = "bring them together with `split` or `repeat`"
            raise Mismatch("`concat` needs streams of the same heads and tokens",
                           f"{x} and {y}", help)  # fmt: skip
        return replace(x, dim=x.dim + y.dim)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        return torch.cat(list(inputs), dim=-1)

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        return f"torch.cat([{', '.join(inputs)}], dim=-1)"
