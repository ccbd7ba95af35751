"""`conv(width, bias, causal, dilation, groups, taps)`: a short convolution along the tokens.

    out[t] = Σ_c w[c] · x[t − before + c · dilation]

Every feature of every head has `width` weights of its own, w [features, width]. With `groups`, a
feature reads all of its group: w [features, features/groups, width]. With `taps`, a stream of
`width` numbers a token, w is w[t], the same for all features, or for those of a head.

`before` is (width − 1) · dilation, so that a token reads none after it; with `causal = false` it
is (width − 1) // 2 · dilation. Before the first token of a sequence and after its last, x is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Conv(Op):
    name = "conv"
    options = (
        Option("width", "size", required=True),
        Option("bias", "flag", False),
        Option("causal", "flag", True),
        Option("dilation", "size", 1),
        Option("groups", "size"),
        Option("taps", "stream"),
    )
    suffix = "conv"
    by_sequence = True

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x, *taps = inputs
        groups = options["groups"]
        if taps:
            self._expect_taps(x, taps[0], options)
        if groups is not None and x.features % groups:
            raise Mismatch(
                "`groups` of `conv` divide the features",
                f"groups = {groups}, features = {x.features}",
                at="groups",
            )
        return x

    @staticmethod
    def _expect_taps(x: Shape, taps: Shape, options: Options) -> None:
        width = options["width"]
        if options["groups"] is not None or options["bias"]:
            raise Mismatch("`taps` of `conv` go with neither `groups` nor `bias`", at="taps")
        if taps.dim != width or taps.tokens != x.tokens or taps.heads not in (None, x.heads):
            raise Mismatch(
                "`taps` of `conv` are so many numbers for each token, for all heads or each",
                f"width = {width}, `taps` are {taps}, what comes in is {x}",
                at="taps",
            )

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        if len(inputs) > 1:
            return ()
        features, width = inputs[0].features, options["width"]
        bias = (Weight("bias", (features,), "zeros"),) if options["bias"] else ()
        if options["groups"] is None:
            return (Weight("weight", (features, width), "linear"), *bias)
        into = features // options["groups"]
        return (Weight("weight", (features, into, width), "conv"), *bias)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        from torch.nn import functional

        x, width, dilation = inputs[0], options["width"], options["dilation"]
        before = self.lookback(options)
        n, d = x.shape[-2:]
        padded = functional.pad(x, (0, 0, before, (width - 1) * dilation - before))

        def by_feature(y: Tensor) -> Tensor:
            """Lay numbers [features] along x: [1, d], or [heads, 1, d]."""
            return y.reshape(-1, 1, d) if run.has_heads(0, x) else y.reshape(1, d)

        def tap(c: int, there: Tensor) -> Tensor:
            """Return the share of the tokens that tap c reads."""
            if len(inputs) > 1:
                w = inputs[1][..., c : c + 1]
                return (w if w.ndim == x.ndim else w.unsqueeze(-3)) * there
            w = weights["weight"]
            return by_feature(w[:, c]) * there if w.ndim == 2 else grouped(w[..., c], there)

        def grouped(w: Tensor, there: Tensor) -> Tensor:
            """Map the features of each group: w [features, features/groups]."""
            split, groups = run.has_heads(0, x), options["groups"]
            whole = there.movedim(-2, 1).flatten(2) if split else there
            parts = whole.reshape(*whole.shape[:-1], groups, 1, w.shape[-1])
            made: Tensor = (parts * w.reshape(groups, -1, w.shape[-1])).sum(-1).flatten(-2)
            apart = (*made.shape[:-1], made.shape[-1] // d, d)
            return made.reshape(apart).movedim(1, -2) if split else made

        y = sum(tap(c, padded[..., c * dilation : c * dilation + n, :]) for c in range(width))
        assert not isinstance(y, int)
        return y + by_feature(weights["bias"]) if options["bias"] else y

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        run = self.run_of(shapes[0])
        return self._text(inputs, shapes, options, module, [run] if run != "None" else [])

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return self._text(inputs, shapes, options, module, ["known", "before"])

    def _text(
        self,
        inputs: Sequence[str],
        shapes: Sequence[Shape],
        options: Options,
        module: str,
        more: Sequence[str],
    ) -> str:
        if len(inputs) == 1:
            return f"self.{module}({', '.join([inputs[0], *more])})"
        taps = inputs[1] if shapes[1].heads == shapes[0].heads else f"{inputs[1]}.unsqueeze(1)"
        places = str(self.lookback(options)), str(options["dilation"])
        return f"tapped({', '.join([inputs[0], taps, *places, *more])})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        if len(inputs) > 1:
            return ""
        usual = {"bias": False, "causal": True, "dilation": 1, "groups": None}
        said = [name for name, value in usual.items() if options[name] != value]
        more = "".join(f", {name}={options[name]}" for name in said)
        return f"ShortConv({inputs[0].features}, {options['width']}{more})"

    def lookback(self, options: Options) -> int:
        before: int = options["width"] - 1
        before = before if options["causal"] else before // 2
        return before * int(options["dilation"])

    def looks_ahead(self, options: Options) -> bool:
        return bool((options["width"] - 1) * options["dilation"] > self.lookback(options))

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        each = 2 * inputs[0].features * int(options["width"])
        if options["groups"] is None:
            return each
        return each * inputs[0].features // int(options["groups"])
