"""Stages that move between tokens and heads: `split`, `merge`, `repeat`, `concat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


def by_head(x: Tensor, heads: int) -> Tensor:
    """Return [.., n, heads · d] as [.., heads, n, d]; one feature is the same for all heads."""
    if x.shape[-1:] in ((), (1,)):
        return x.unsqueeze(-3) if x.ndim > 1 else x
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def by_head_text(text: str, heads: int, shape: Shape) -> str:
    """Return the text of `by_head` for a stream of this shape."""
    if shape.dim == 1:  # along "1" it may be a tensor [] or [1]
        return f"{text}.reshape(-1, 1, 1, 1)" if shape.tokens == "1" else f"{text}.unsqueeze(-3)"
    return f"{text}.unflatten(-1, ({heads}, -1)).transpose{_swapped(shape)}"


def _swapped(shape: Shape) -> str:
    """Return the dimensions of heads and tokens, counted from where they certainly are."""
    return "(-3, -2)" if shape.tokens == "1" else "(1, 2)"


def _one_head(x: Tensor) -> Tensor:
    """Return [.., n, d] as [.., 1, n, d]; a tensor is [d] or []."""
    whole = x if x.ndim > 1 else x.reshape(1, -1)
    return whole.unsqueeze(-3)


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
        return by_head(inputs[0], options["heads"])

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return by_head_text(inputs[0], options["heads"], shapes[0])


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
        return inputs[0].transpose(-3, -2).flatten(-2)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"{inputs[0]}.transpose{_swapped(shapes[0])}.flatten(-2)"


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
        x = x if run.has_heads(0, x) else _one_head(x)
        return x.repeat_interleave(options["times"], dim=-3)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        if shapes[0].tokens == "1":
            one = f"torch.atleast_2d({inputs[0]}).unsqueeze(-3)"  # a tensor is [dim]
            x = inputs[0] if shapes[0].heads is not None else one
            return f"{x}.repeat_interleave({options['times']}, dim=-3)"
        if shapes[0].heads is None:
            return f"{inputs[0]}[:, None].expand(-1, {options['times']}, -1, -1)"
        return f"{inputs[0]}.repeat_interleave({options['times']}, dim=1)"


class Concat(Op):
    """`concat(stream, over = features)`: side by side along the last dimension, or as more heads.

    A stream without heads is one head more.
    """

    name = "concat"
    options = (
        Option("stream", "stream", required=True),
        Option("over", ("features", "heads"), "features"),
    )

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        if options["over"] == "heads":
            return None
        rest = out.dim - inputs[1].dim
        return replace(out, dim=rest) if rest > 0 else None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x, y = inputs
        if options["over"] == "heads":
            if (x.dim, x.tokens) != (y.dim, y.tokens):
                raise Mismatch(
                    "`concat` over heads needs streams of the same features and tokens",
                    f"{x} and {y}",
                    "bring them together with `linear`",
                )
            return replace(x, heads=(x.heads or 1) + (y.heads or 1))
        if (x.heads, x.tokens) != (y.heads, y.tokens):
            help = "bring them together with `split` or `repeat`"
            raise Mismatch(
                "`concat` needs streams of the same heads and tokens", f"{x} and {y}", help
            )
        return replace(x, dim=x.dim + y.dim)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        if options["over"] == "features":
            return torch.cat(list(inputs), dim=-1)
        parts = [x if run.has_heads(at, x) else _one_head(x) for at, x in enumerate(inputs)]
        return torch.cat(parts, dim=-3)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        if options["over"] == "features":
            return f"torch.cat([{', '.join(inputs)}], dim=-1)"
        pairs = zip(inputs, shapes, strict=True)
        parts = (
            x if shape.heads is not None else f"torch.atleast_2d({x}).unsqueeze(-3)"
            for x, shape in pairs
        )
        return f"torch.cat([{', '.join(parts)}], dim=-3)"
