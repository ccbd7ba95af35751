"""`latents(count, features)`: a learned list of tokens, the same for every sequence.

The stage's input says the batch and the dtype alone, and the width where nothing else does.
What comes out runs along its own tokens, so many as there are latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .op import Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Latents(Op):
    name = "latents"
    options = (Option("count", "size", required=True), Option("features", "size"))
    suffix = "latents"
    starts = True

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        if options["features"] is None:
            options["features"] = given.features if out is None else out.features
        return options

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return Shape(str(options["count"]), options["features"])

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        return (Weight("weight", (options["count"], options["features"]), "embedding"),)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        (x,) = inputs
        return weights["weight"].to(x.dtype)[None].expand(x.shape[0], -1, -1)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"self.{module}({inputs[0]})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        return f"Latents({options['count']}, {options['features']})"
