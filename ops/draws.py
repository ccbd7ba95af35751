"""Stages that draw anew at every call in training: `bernoulli`, `drop_heads`, `noise`.

Outside of training they draw nothing. They draw in float32 and in the order of the tokens,
whatever the stream's dtype and strides: one seed gives the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Bernoulli(Op):
    """`bernoulli(rate)`: for each token one number, 1 at this rate, else 0; 1 out of training."""

    name = "bernoulli"
    options = (Option("rate", "number", required=True),)
    random = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if not 0 <= options["rate"] <= 1:
            raise Mismatch("a rate lies in 0 <= rate <= 1", f"rate = {options['rate']}")
        return replace(inputs[0], dim=1)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        size = (*x.shape[:-1], 1)
        if not run.training:
            return x.new_ones(size)
        drawn = torch.rand(size, dtype=torch.float32, device=x.device)
        return torch.lt(drawn, options["rate"]).to(x.dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"bernoulli({inputs[0]}, {options['rate']!r}, self.training)"


class DropHeads(Op):
    """`drop_heads(count)`: zero so many heads of each sequence, in training; the rest as it is."""

    name = "drop_heads"
    options = (Option("count", "number", required=True),)
    random = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), count = inputs, options["count"]
        if x.heads is None:
            raise Mismatch("`drop_heads` needs a stream with heads", f"it is {x}", "split it first")
        if not (isinstance(count, int) and 0 <= count < x.heads):
            raise Mismatch(
                "`drop_heads` leaves at least one head", f"count = {count}, heads = {x.heads}"
            )
        return x

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        if not run.training:
            return x
        order = torch.rand(x.shape[:-2], dtype=torch.float32, device=x.device).argsort(dim=-1)
        return torch.where((order < options["count"])[..., None, None], 0, x)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"drop_heads({inputs[0]}, {options['count']}, self.training)"


class DropSequence(Op):
    """`drop_sequence(rate, scaled)`: in training, zero all of a sequence at this rate.

    Where it is `scaled`, what stays is divided by how often that is.
    """

    name = "drop_sequence"
    options = (Option("rate", "number", required=True), Option("scaled", "flag", False))
    random = True
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if not 0 <= options["rate"] < 1:
            raise Mismatch("a rate to drop at lies in 0 <= rate < 1", f"rate = {options['rate']}")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        rate: float = options["rate"]
        if not run.training:
            return x
        drawn = torch.rand(len(x), dtype=torch.float32, device=x.device)
        stays = (drawn >= rate).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x * stays / (1 - rate) if options["scaled"] else x * stays

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        rest = f"{options['rate']!r}, {options['scaled']}, self.training"
        return f"drop_sequence({inputs[0]}, {rest}, {self.run_of(shapes[0])})"


class Noise(Op):
    """`noise(std)`: plus a normal number of this deviation for each element, in training."""

    name = "noise"
    options = (Option("std", "number", required=True),)
    random = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if options["std"] < 0:
            raise Mismatch("a standard deviation is not negative", f"std = {options['std']}")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        if not run.training:
            return x
        drawn = torch.randn(x.shape, dtype=torch.float32, device=x.device)
        return x.add(drawn.to(x.dtype), alpha=options["std"])

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"add_noise({inputs[0]}, {options['std']!r}, self.training)"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 2 * inputs[0].features
