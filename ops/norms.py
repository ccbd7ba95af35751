"""Normalisation over the last dimension: the whole width before `split`, each head after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return half precision as float32: the squares of 300 features overflow float16."""
    return x.float() if x.dtype.itemsize < 4 else x


class _Norm(Op):
    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return inputs[0]

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 4 * inputs[0].features


class RmsNorm(_Norm):
    """`rms_norm(eps = 1e-6, scale = true)`: x / sqrt(mean(x²) + eps) · w.

    Zhang & Sennrich 2019; without `scale` there is no w.
    """

    name = "rms_norm"
    options = (Option("eps", "number", 1e-6), Option("scale", "flag", True))
    suffix = "norm"

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        return (Weight("weight", (inputs[0].dim,), "ones"),) if options["scale"] else ()

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = wide(inputs[0])
        square = x.pow(2).mean(-1, keepdim=True)
        y: Tensor = x * (square + options["eps"]).rsqrt()
        y = y * wide(weights["weight"]) if options["scale"] else y
        return y.to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        if not options["scale"]:
            return f"F.rms_norm({inputs[0]}, ({shapes[0].dim},), eps={options['eps']!r})"
        return f"self.{module}({inputs[0]})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        if not options["scale"]:
            return ""
        return f"nn.RMSNorm({inputs[0].dim}, eps={options['eps']!r})"


class LayerNorm(_Norm):
    """`layer_norm(eps = 1e-5)`: (x − mean) / sqrt(var + eps) · w + b (Ba et al. 2016)."""

    name = "layer_norm"
    options = (Option("eps", "number", 1e-5),)
    suffix = "norm"

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        size = (inputs[0].dim,)
        return (Weight("weight", size, "ones"), Weight("bias", size, "zeros"))

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = wide(inputs[0])
        x = x - x.mean(-1, keepdim=True)
        y: Tensor = x * (x.pow(2).mean(-1, keepdim=True) + options["eps"]).rsqrt()
        return (y * wide(weights["weight"]) + wide(weights["bias"])).to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"self.{module}({inputs[0]})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        return f"nn.LayerNorm({inputs[0].dim}, eps={options['eps']!r})"


class L2Norm(_Norm):
    """`l2_norm(eps = 1e-6)`: x / sqrt(Σx² + eps), finite at zero with its gradient."""

    name = "l2_norm"
    options = (Option("eps", "number", 1e-6),)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = wide(inputs[0])
        y: Tensor = x * (x.pow(2).sum(-1, keepdim=True) + options["eps"]).rsqrt()
        return y.to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"l2_norm({inputs[0]}, {options['eps']!r})"


class L1Norm(_Norm):
    """`l1_norm(eps = 1e-12)`: x / max(Σ|x|, eps); zero stays zero."""

    name = "l1_norm"
    options = (Option("eps", "number", 1e-12),)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x = wide(inputs[0])
        y: Tensor = x / x.abs().sum(-1, keepdim=True).clamp(min=options["eps"])
        return y.to(inputs[0].dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"l1_norm({inputs[0]}, {options['eps']!r})"
