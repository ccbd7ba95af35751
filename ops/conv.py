"""`conv(width, bias = false, causal = true)`: a short convolution along the tokens.

Every feature of every head has `width` weights of its own:

    out[t] = Σ_c w[c] · x[t − before + c]

`before` is width − 1, so that a token reads none after it; with `causal = false` it is
(width − 1) // 2. Before the first token of a sequence and after its last, x is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Conv(Op):
    name = "conv"
    options = (
        Option("width", "size", required=True),
        Option("bias", "flag", False),
        Option("causal", "flag", True),
    )
    suffix = "conv"
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return inputs[0]

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        features = inputs[0].features
        bias = (Weight("bias", (features,), "zeros"),) if options["bias"] else ()
        return (Weight("weight", (features, options["width"]), "linear"), *bias)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        from torch.nn import functional

        (x,), width, before = inputs, options["width"], self.lookback(options)
        n, d = x.shape[-2:]
        padded = functional.pad(x, (0, 0, before, width - 1 - before))

        def by_feature(y: Tensor) -> Tensor:
            """Lay numbers [features] along x: [1, d], or [heads, 1, d]."""
            return y.reshape(-1, 1, d) if run.has_heads(0, x) else y.reshape(1, d)

        w = weights["weight"]
        y = sum(by_feature(w[:, c]) * padded[..., c : c + n, :] for c in range(width))
        assert not isinstance(y, int)
        return y + by_feature(weights["bias"]) if options["bias"] else y

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        run = self.run_of(shapes[0])
        return f"self.{module}({inputs[0]}{f', {run}' if run != 'None' else ''})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        more = "".join(
            f", {name}={options[name]}"
            for name, usual in (("bias", False), ("causal", True))
            if options[name] != usual
        )
        return f"ShortConv({inputs[0].features}, {options['width']}{more})"

    def lookback(self, options: Options) -> int:
        before: int = options["width"] - 1
        return before if options["causal"] else before // 2

    def looks_ahead(self, options: Options) -> bool:
        return bool(options["width"] - 1 > self.lookback(options))

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 2 * inputs[0].features * int(options["width"])
