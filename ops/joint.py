"""`joint(a, b, …)`: one softmax over the keys of several attentions.

Each gives what it mixed and the logarithm of its denominator; together they are what one
attention to all of their keys would give, the mean of the parts by their denominators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Joint(Op):
    """Inputs: the parts [heads, t, d], then the logarithms of their denominators [heads, t, 1]."""

    name = "joint"

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        first, *others = inputs[: len(inputs) // 2]
        for each in others:
            if each != first:
                raise Mismatch("what is joined must have the same shape", f"{first} and {each}")
        return first

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        count = len(inputs) // 2
        logs = torch.stack(list(inputs[count:]))
        least = torch.finfo(logs.dtype).min  # where nothing is seen, the parts are zero
        shares = torch.maximum(logs, logs.new_tensor(least)).softmax(0)
        return (torch.stack(list(inputs[:count])) * shares).sum(0)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        count = len(inputs) // 2
        return f"joint([{', '.join(inputs[:count])}], [{', '.join(inputs[count:])}])"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 3 * sum(each.features for each in inputs)
