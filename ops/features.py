"""Over the features of each token: `softmax`, `top`, `argmax`, `slice`, and `sum(…)`, `norm(…)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .norms import wide
from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


OVER = {"features": -1, "heads": -3}


class Softmax(Op):
    """`softmax(over = features)`: exp(x) / Σ exp(x) over the last dimension, or over the heads."""

    name = "softmax"
    options = (Option("over", tuple(OVER), "features"),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        if options["over"] == "heads" and inputs[0].heads is None:
            raise Mismatch("there are no heads", f"it is {inputs[0]}", "split it first", "over")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x, dim = wide(inputs[0]), OVER[options["over"]]
        x = (x - x.amax(dim, keepdim=True).detach()).exp()
        return (x / x.sum(dim, keepdim=True)).to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"torch.softmax({inputs[0]}, dim={OVER[options['over']]})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 4 * inputs[0].features


class Top(Op):
    """`top(count)`: the `count` largest of the last dimension, zero for the rest.

    Of equal ones the first are kept. Only what is kept gets a gradient.
    """

    name = "top"
    options = (Option("count", "size", required=True),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), count = inputs, options["count"]
        if count > x.dim:
            raise Mismatch(
                "`top` keeps at most the features there are", f"count = {count}, features = {x.dim}"
            )
        return x

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        order = x.detach().sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(x, dtype=torch.bool)
        kept.scatter_(-1, order[..., : options["count"]], True)
        return torch.where(kept, x, 0)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"top_features({inputs[0]}, {options['count']})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


class Argmax(Op):
    """`argmax`: the number, from 0, of the largest of the last dimension; of equal ones the first.

    It gives no gradient. It stays float32 where the block is in less, which holds whole numbers.
    """

    name = "argmax"
    wide = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], dim=1)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = inputs[0].detach()
        largest = x == x.amax(-1, keepdim=True)
        earlier = largest.cumsum(-1) == 0
        return earlier.sum(-1, keepdim=True).to(wide(x).dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"largest_feature({inputs[0]})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


class Slice(Op):
    """`slice(start, stop)`: features start … stop − 1 of the last dimension."""

    name = "slice"
    options = (Option("start", "number", required=True), Option("stop", "number"))

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        options["stop"] = given.dim if options["stop"] is None else options["stop"]
        return options

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), start, stop = inputs, options["start"], options["stop"]
        whole = all(isinstance(each, int) for each in (start, stop))
        if not (whole and 0 <= start < stop <= x.dim):
            raise Mismatch(
                "`slice` takes features that are there, at least one",
                f"start = {start}, stop = {stop}, features = {x.dim}",
            )
        return replace(x, dim=stop - start)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        return inputs[0].narrow(-1, options["start"], options["stop"] - options["start"])

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        start, stop = options["start"] or "", options["stop"]
        return f"{inputs[0]}[..., {start}:{'' if stop == shapes[0].dim else stop}]"


class Reduce(Op):
    """`sum`, `mean` and `norm`, functions over the last dimension: one feature is left."""

    name = "reduce"
    options = (Option("by", ("sum", "mean", "norm"), required=True),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], dim=1)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        match options["by"]:
            case "sum":
                return x.sum(-1, keepdim=True)
            case "mean":
                return x.mean(-1, keepdim=True)
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        if options["by"] == "norm":
            return f"torch.linalg.vector_norm({inputs[0]}, dim=-1, keepdim=True)"
        return f"{inputs[0]}.{options['by']}(-1, keepdim=True)"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features * (2 if options["by"] == "norm" else 1)
