"""Learned linear maps: one weight for all heads, one for each, one for each group of features.

    linear(features, bias = false, reparam = none)      x @ Wᵀ + b, W [out, in]
    head_linear(features)                               x[head] @ W[head]ᵀ, W [heads, out, in]
    grouped_linear(groups, features)                    block diagonal, W [groups, out/groups,
                                                        in/groups]

`reparam` learns how large W is apart from where it points: `spectral` is gain · W / σ(W), σ
the largest singular value, taken exactly (Zhai et al. 2023 approximate it by power
iteration); `weight_norm` is gain[out] · W / |row of W| (Salimans & Kingma 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .norms import wide
from .op import Mismatch, Op, Option, Options, Run, Weight
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class _Linear(Op):
    suffix = "proj"

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        if options["features"] is None:
            options["features"] = given.dim if out is None else out.dim
        return options

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"self.{module}({inputs[0]})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 2 * inputs[0].features * int(options["features"])


class Linear(_Linear):
    name = "linear"
    options = (
        Option("features", "size"),
        Option("bias", "flag", False),
        Option("reparam", ("none", "spectral", "weight_norm"), "none"),
    )

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return replace(inputs[0], dim=options["features"])

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        out, into = options["features"], inputs[0].dim
        found = [Weight("weight", (out, into), "linear")]
        if options["reparam"] != "none":
            size = () if options["reparam"] == "spectral" else (out,)
            found.append(Weight("gain", size, "ones"))
        if options["bias"]:
            found.append(Weight("bias", (out,), "zeros"))
        return tuple(found)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        weight = _reparametrised(weights, options["reparam"])
        y = inputs[0] @ weight.mT
        return y + weights["bias"] if options["bias"] else y

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        sizes = f"{inputs[0].dim}, {options['features']}"
        if options["reparam"] != "none":
            return f'ReparamLinear({sizes}, "{options["reparam"]}", bias={options["bias"]})'
        return f"nn.Linear({sizes}, bias={options['bias']})"


class Tied(Linear):
    """A linear map with the weights of the embedding that its module is."""

    name = "tied"

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"F.linear({inputs[0]}, self.{module}.weight)"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        return ""


def _reparametrised(weights: Mapping[str, Tensor], how: str) -> Tensor:
    import torch

    weight = weights["weight"]
    exact: Tensor = wide(weight)
    match how:
        case "spectral":
            exact = wide(weights["gain"]) * exact / torch.linalg.matrix_norm(exact, ord=2)
        case "weight_norm":
            exact = wide(weights["gain"])[:, None] * exact / exact.norm(dim=1, keepdim=True)
        case _:
            return weight
    return exact.to(weight.dtype)


class HeadLinear(_Linear):
    name = "head_linear"
    options = (Option("features", "size"),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,) = inputs
        if x.heads is None:
            raise Mismatch(
                "`head_linear` needs a stream with heads", f"it is {x}", "split it first"
            )
        return replace(x, dim=options["features"])

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        (x,) = inputs
        return (Weight("weight", (x.heads or 1, options["features"], x.dim), "linear"),)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        return torch.einsum("...htc,hdc->...htd", inputs[0], weights["weight"])

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        (x,) = inputs
        return f"HeadLinear({x.heads}, {x.dim}, {options['features']})"


class GroupedLinear(_Linear):
    name = "grouped_linear"
    options = (Option("groups", "size", required=True), Option("features", "size"))

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        (x,), groups, features = inputs, options["groups"], options["features"]
        if x.dim % groups or features % groups:
            raise Mismatch(
                "`groups` divide what comes in and what goes out",
                f"groups = {groups}, features = {x.dim} → {features}",
                at="groups",
            )
        return replace(x, dim=features)

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        (x,), groups = inputs, options["groups"]
        return (
            Weight("weight", (groups, options["features"] // groups, x.dim // groups), "linear"),
        )

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,) = inputs
        x = x.reshape(*x.shape[:-1], options["groups"], x.shape[-1] // options["groups"])
        return torch.einsum("...gc,gdc->...gd", x, weights["weight"]).flatten(-2)

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        return f"GroupedLinear({options['groups']}, {inputs[0].dim}, {options['features']})"

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return super().flops(inputs, options) // int(options["groups"])
