"""`linear(features, bias = false)`: x @ Wᵀ + b over the last dimension, W [out, in].

A stream with heads is projected head by head with one shared weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .op import Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Op):
    name = "linear"
    options = (Option("features", "size"), Option("bias", "flag", False))
    suffix = "proj"

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        if options["features"] is None:
            options["features"] = given.dim if out is None else out.dim
        return options

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], dim=options["features"])

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        out, into = options["features"], inputs[0].dim
        bias = (Weight("bias", (out,), "zeros"),) if options["bias"] else ()
        return (Weight("weight", (out, into), "linear"), *bias)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        y = inputs[0] @ weights["weight"].mT
        return y + weights["bias"] if options["bias"] else y

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        return f"self.{module}({inputs[0]})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        return f"nn.Linear({inputs[0].dim}, {options['features']}, bias={options['bias']})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 2 * inputs[0].features * int(options["features"])
