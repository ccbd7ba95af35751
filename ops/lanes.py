"""Between heads, or the lanes of a residual stream: `combine`, `sinkhorn`, `pick`, means and sums.

combine(a)      out[e] = Σ_r a[r, e] · x[r]      [r, n, d] with [r, n, e] → [e, n, d]
sinkhorn(20)    [r, n, r], positive → rows and columns that sum to one (Sinkhorn & Knopp 1967)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .norms import wide
from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


def _with_heads(name: str, x: Shape) -> int:
    """Return how many heads a stream has (raises `Mismatch` where it has none)."""
    if x.heads is None:
        raise Mismatch(f"`{name}` needs a stream with heads", f"it is {x}", "split it first")
    return x.heads


class Combine(Op):
    """`combine(weights)`: heads as weighted sums of heads, by weights of each token."""

    name = "combine"
    options = (Option("weights", "stream", required=True),)

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return replace(out, heads=inputs[1].heads)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x, weights = inputs
        if _with_heads(self.name, x) != weights.heads:
            label = f"{x} and weights {weights}"
            raise Mismatch("`combine` needs weights of as many heads", label)
        if weights.tokens not in ("1", x.tokens):
            raise Mismatch("these streams run along different tokens", f"{x} and {weights}")
        return replace(x, heads=weights.dim)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x, mixed = inputs
        parts = (x[..., r, None, :, :] * mixed[..., r, :, :].mT[..., None]
                 for r in range(x.shape[-3]))  # fmt: skip
        return sum(parts)  # type: ignore[return-value]

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"combine({inputs[0]}, {inputs[1]})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 2 * inputs[0].features * inputs[1].dim


class Sinkhorn(Op):
    """`sinkhorn(times, eps = 1e-6)`: over heads, then `times - 1` times over features and heads.

    What is given must be positive; `eps` is added to each sum.
    """

    name = "sinkhorn"
    options = (Option("times", "size", required=True), Option("eps", "number", 1e-6))

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,) = inputs
        if _with_heads(self.name, x) != x.dim:
            raise Mismatch("`sinkhorn` needs as many features as heads", f"it is {x}")
        return x

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = wide(inputs[0])
        for at in range(int(options["times"])):
            if at:
                x = x / (x.sum(-1, keepdim=True) + options["eps"])
            x = x / (x.sum(-3, keepdim=True) + options["eps"])
        return x.to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"sinkhorn({inputs[0]}, {options['times']}, {options['eps']!r})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 4 * int(options["times"]) * inputs[0].features


class Pick(Op):
    """`pick(head)`: one of the heads, counted from 0, or from the last as -1."""

    name = "pick"
    options = (Option("head", "number", required=True),)

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        heads, head = _with_heads(self.name, inputs[0]), options["head"]
        if head != int(head) or not -heads <= head < heads:
            raise Mismatch(
                "there is no such head", f"{head} of {heads}", "heads are counted from 0", "head"
            )
        return replace(inputs[0], heads=None)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        return inputs[0][..., int(options["head"]), :, :]

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"{inputs[0]}[..., {int(options['head'])}, :, :]"


class _OverHeads(Op):
    """One number of all heads for each feature."""

    by: str

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        _with_heads(self.name, inputs[0])
        return replace(inputs[0], heads=None)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        reduced: Tensor = getattr(inputs[0], self.by)(-3)
        return reduced

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"{inputs[0]}.{self.by}(-3)"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return inputs[0].features


class SumHeads(_OverHeads):
    """`sum_heads`: the sum of all heads."""

    name, by = "sum_heads", "sum"


class MeanHeads(_OverHeads):
    """`mean_heads`: the mean of all heads."""

    name, by = "mean_heads", "mean"
