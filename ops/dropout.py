"""`dropout(p)`: zero a feature with probability p in training, and scale the rest up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Dropout(Op):
    name = "dropout"
    random = True
    options = (Option("p", "number", required=True),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if not 0 <= options["p"] < 1:
            raise Mismatch("a dropout rate lies in 0 <= p < 1", f"p = {options['p']}")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        from torch.nn import functional

        return functional.dropout(inputs[0], options["p"], run.training)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"F.dropout({inputs[0]}, {options['p']!r}, self.training)"
