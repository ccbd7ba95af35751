"""Choices: `largest`, `largest_tokens`, `one_hot`. They are 1 where chosen, else 0.

    largest(2)                          of each token, the two largest features
    largest(4, over = heads)            of each feature, the four heads where it is largest
    largest_tokens(share = 1 / 8)       of each feature, the tokens of the sequence where it is
    tokens | bucket(8, last = 1) | one_hot(8)   by a hash of the id

Of equal numbers the first is taken. A choice gives no gradient; a number times a choice does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor
from typing import TYPE_CHECKING

from .features import OVER
from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Largest(Op):
    """`largest(count, over = features)`: 1 for the `count` largest of a token, 0 for the rest."""

    name = "largest"
    options = (Option("count", "size", required=True), Option("over", tuple(OVER), "features"))

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), count, over = inputs, options["count"], options["over"]
        if over == "heads" and x.heads is None:
            raise Mismatch("there are no heads", f"it is {x}", "split it first", "over")
        there = x.dim if over == "features" else x.heads or 1
        if count > there:
            label = f"count = {count}, {over} = {there}"
            raise Mismatch(f"`largest` takes at most the {over} there are", label)
        return x

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x, dim = inputs[0].detach(), OVER[options["over"]]
        return _first(x, dim, options["count"])

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"largest({inputs[0]}, {options['count']}, dim={OVER[options['over']]})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


class LargestTokens(Op):
    """`largest_tokens(count, share)`: of each feature, the tokens where it is largest.

    It takes `count` of a sequence, or its `share`, rounded down, but one at least.
    """

    name = "largest_tokens"
    options = (Option("count", "size"), Option("share", "positive"))
    by_sequence = True
    instead = "a comparison, `score > 0.5`, chooses without them"

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        count, share = options["count"], options["share"]
        if (count is None) == (share is None):
            raise Mismatch("`largest_tokens` takes a `count` or a `share`", "", "write one of them")
        if share is not None and share > 1:
            raise Mismatch("a share is at most 1", f"share = {share}", at="share")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x, count = inputs[0].detach(), options["count"]
        tokens = x.shape[-2]
        taken = max(1, floor(options["share"] * tokens)) if count is None else count
        return _first(x, -2, min(taken, tokens))

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        how = f"{options['count']}, {options['share']!r}"
        return f"largest_tokens({inputs[0]}, {how}, {self.run_of(shapes[0])})"

    def looks_ahead(self, options: Options) -> bool:
        return True

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


def _first(x: Tensor, dim: int, count: int) -> Tensor:
    """Return 1 for the `count` largest along a dimension, the first of equal ones, else 0."""
    import torch

    order = x.sort(dim=dim, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(dim, order.narrow(dim, 0, count), 1)


class OneHot(Op):
    """`one_hot(count)`: 1 at the feature that a whole number names, 0 at the others."""

    name = "one_hot"
    options = (Option("count", "size", required=True),)

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return replace(out, dim=1)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,) = inputs
        if x.dim != 1:
            raise Mismatch("`one_hot` takes one number a token", f"it is {x}")
        return replace(x, dim=options["count"])

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        x = inputs[0].detach()
        made = torch.eq(x, torch.arange(options["count"], device=x.device))
        return made.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"one_hot({inputs[0]}, {options['count']}, x.dtype)"
