"""`rope(theta, dims, style, scaling, inverse)`: rotary position embedding (Su et al. 2021).

Pairs of features are turned by the angle position · frequency, which is theta^(−2c / r) for pair
c of r turned features; `scaling` changes the frequencies (`rope_scaling.py`). `style = half` pairs
feature c with c + r/2 (Llama); `interleaved` pairs 2c with 2c + 1 (the paper). `dims` turns the
first so many features, a negative one the last. `inverse` turns back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Op, Option, Options, Run
from .rope_scaling import SCALINGS, Plain, scaling_of
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Rope(Op):
    name = "rope"
    positional = True
    options = (
        Option("theta", "number", 10_000),
        Option("dims", "number"),
        Option("style", ("half", "interleaved"), "half"),
        Option("scaling", {name: row.arguments for name, row in SCALINGS.items()}, 1),
        Option("inverse", "flag", False),
    )

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        options["dims"] = given.dim if options["dims"] is None else options["dims"]
        return options

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        dims, dim, theta = options["dims"], inputs[0].dim, options["theta"]
        if not isinstance(dims, int) or abs(dims) > dim or dims % 2 or dims == 0:
            raise Mismatch(
                "`rope` turns an even number of the features there are",
                f"dims = {dims}, features = {dim}",
                at="dims",
            )
        if theta <= 0:
            raise Mismatch("`rope` needs a positive base", f"theta = {theta}", at="theta")
        row, values = scaling_of(options)
        if row.name == "linear" and values["factor"] <= 0:
            label = f"scaling = {values['factor']}"
            raise Mismatch("`rope` needs a positive scaling", label, at="scaling")
        row.refuse({**values, "turned": abs(dims), "theta": theta})
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,), dims = inputs, options["dims"]
        turned = abs(dims)
        still = x.shape[-1] - turned
        part = x[..., still:] if dims < 0 else x[..., :turned]
        position = run.places(x).to(torch.float64)  # [b, n]
        last = position.amax(-1) if position.shape[-1] else position.sum(-1) - 1
        tokens = last[:, None, None] + 1
        row, values = scaling_of(options)
        angle = position[..., None] * row.frequencies(
            Plain(turned, options["theta"], tokens), values
        )
        angle = -angle if options["inverse"] else angle
        angle = angle[:, None] if run.has_heads(0, x) else angle  # [b, (1,) n, r/2]
        gain = 1 / row.gain(values) if options["inverse"] else row.gain(values)
        cos, sin = (gain * angle.cos()).to(x.dtype), (gain * angle.sin()).to(x.dtype)
        if options["style"] == "half":
            a, b = part[..., : turned // 2], part[..., turned // 2 :]
            done = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = part[..., 0::2], part[..., 1::2]
            done = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        rest = x[..., :still] if dims < 0 else x[..., turned:]
        return torch.cat([rest, done] if dims < 0 else [done, rest], dim=-1)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        where = self.positions_of(shapes[0])
        row, values = scaling_of(options)
        said = [
            f"{each.name}={values[each.name]!r}"
            for each in row.options
            if values[each.name] != each.default
        ]
        arguments = [where, str(abs(options["dims"])), f"theta={options['theta']!r}", *said]
        sign = "-" if options["inverse"] else ""
        extra = ["last=True"] if options["dims"] < 0 and -options["dims"] != shapes[0].dim else []
        gain = row.gain(values)
        if gain != 1:
            extra.append(f"gain={1 / gain if options['inverse'] else gain!r}")
        frequencies = f"{sign}{row.helper}({', '.join(arguments)})"
        turn = "rope" if options["style"] == "half" else "rope_interleaved"
        return f"{turn}({', '.join([inputs[0], where, frequencies, *extra])})"

    def counts_tokens(self, options: Options) -> str:
        row, values = scaling_of(options)
        return f"beyond {values['length']} of them, by `{row.name}`" if row.counts else ""

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 3 * abs(int(options["dims"])) * (inputs[0].heads or 1)
