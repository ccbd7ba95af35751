"""`running(by)`: the sum, mean or maximum over the tokens of the sequence up to each one.

    sum     out[t] = Σ_{l ≤ t} x[l]
    mean    out[t] = Σ_{l ≤ t} x[l] / (t + 1), t counted from 0 in the sequence
    max     out[t] = max_{l ≤ t} x[l]; of equal ones the last gets the gradient

Sums are made in float64 and rounded once. Sums and means stay float32 where the block is in less:
what is read of them is most often a difference, c[i] − c[j].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .norms import wide
from .op import Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Running(Op):
    name = "running"
    options = (Option("by", ("sum", "mean", "max"), required=True),)
    by_sequence = True
    wide = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        if options["by"] == "max":
            return wide(x).cummax(-2).values if x.shape[-2] else wide(x)
        total = x.double().cumsum(-2)
        if options["by"] == "mean":
            total = total / torch.arange(1, x.shape[-2] + 1, device=x.device)[:, None]
        return total.to(wide(x).dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"running_{options['by']}({inputs[0]}, {self.run_of(shapes[0])})[0]"

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"running_{options['by']}({inputs[0]}, {self.run_of(shapes[0])}, past)"

    def carries(self, inputs: Sequence[Shape], options: Options) -> int:
        (x,) = inputs  # and, of each token, a number that says how many there were
        return x.features + (0 if options["by"] == "sum" else x.heads or 1)

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features
