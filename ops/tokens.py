"""Stages over all tokens at once: `mean_tokens`, and the averages of a whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .op import Op, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class MeanTokens(Op):
    """`mean_tokens`: the mean over the tokens of each sequence; it meets streams along any."""

    name = "mean_tokens"
    by_sequence = True
    whole_rows = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return out

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], tokens="1")

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        (x,) = inputs
        return x.mean(-2, keepdim=True) if x.shape[-2] else x.sum(-2, keepdim=True)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"mean_tokens({inputs[0]}, {self.run_of(shapes[0])})"

    def looks_ahead(self, options: Options) -> bool:
        return True

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


class Average(Op):
    """`mean(stream)` in `regularize`: one number, of all tokens there are in the batch."""

    name = "average"
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return Shape("1", 1)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        return inputs[0].mean() if inputs[0].numel() else inputs[0].sum()

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        run = self.run_of(shapes[0])
        return f"mean_of_all({inputs[0]}, {run})"


class AverageEach(Op):
    """`mean_each(stream)` in `regularize`: of each feature, over all tokens of the batch."""

    name = "average_each"
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], tokens="1")

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = inputs[0].sum((0, -2), keepdim=True)
        return x / max(1, inputs[0].shape[0] * inputs[0].shape[-2])

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"mean_of_each({inputs[0]}, {self.run_of(shapes[0])})"
