"""`embed`: a vector for each token by its id, `tokens | embed(64)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Embed(Op):
    """`embed(features, count)`: row `id` of a learned table; `count` is the model's `vocab`."""

    name = "embed"
    options = (Option("features", "size", required=True), Option("count", "size"))
    suffix = "embed"

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if options["count"] is None:
            raise Mismatch(
                "`embed` needs to know how many ids there are",
                "no `vocab` is around",
                "write `tokens | embed(features)` in a layer of a model with a `vocab`",
            )
        return Shape(inputs[0].tokens, options["features"])

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        return (Weight("weight", (options["count"], options["features"]), "embedding"),)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        return weights["weight"][inputs[0][..., 0]]

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"embedded(self.{module}, {inputs[0]}[..., 0])"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        # Its values are drawn once: nn.Embedding by itself would draw others first.
        drawn = f"torch.empty({options['count']}, {options['features']}).normal_(std=0.02)"
        return f"nn.Embedding.from_pretrained({drawn}, freeze=False)"
