"""`shift(count)`: the token so many before, 0 before the first of the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Shift(Op):
    name = "shift"
    options = (Option("count", "size", required=True),)
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        from torch.nn import functional

        (x,) = inputs
        n = x.shape[-2]
        return functional.pad(x, (0, 0, options["count"], 0))[..., :n, :]

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"shifted({inputs[0]}, {options['count']}, {self.run_of(shapes[0])})"

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"shifted({inputs[0]}, {options['count']}, known, before)"

    def lookback(self, options: Options) -> int:
        return int(options["count"])
