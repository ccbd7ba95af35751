"""`rope(theta, dims, style, scaling, inverse)`: rotary position embedding (Su et al. 2021).

Pairs of features are turned by the angle position / scaling · theta^(−2c / r), r the number
of turned features. `style = half` pairs feature c with c + r/2 (Llama); `interleaved` pairs
2c with 2c + 1 (the paper). `dims` turns the first so many features, a negative one the last.
`inverse` turns back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Op, Option, Options, Run
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
        Option("scaling", "number", 1),
        Option("inverse", "flag", False),
    )

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        options["dims"] = given.dim if options["dims"] is None else options["dims"]
        return options

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        dims, dim = options["dims"], inputs[0].dim
        if not isinstance(dims, int) or abs(dims) > dim or dims % 2 or dims == 0:
            raise Mismatch("`rope` turns an even number of the features there are",
                           f"dims = {dims}, features = {dim}")  # fmt: skip
        if options["theta"] <= 0 or options["scaling"] <= 0:
            label = f"theta = {options['theta']}, scaling = {options['scaling']}"
            raise Mismatch("`rope` needs a positive base and scaling", label)
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        (x,), dims = inputs, options["dims"]
        turned = abs(dims)
        still = x.shape[-1] - turned
        part = x[..., still:] if dims < 0 else x[..., :turned]
        position = run.places(x).to(torch.float64) / options["scaling"]
        position = -position if options["inverse"] else position
        power = torch.arange(0, turned, 2, dtype=torch.float64, device=x.device) / turned
        angle = position[..., None] * options["theta"] ** -power  # [b, n, r/2]
        angle = angle[:, None] if run.has_heads(0, x) else angle
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        if options["style"] == "half":
            a, b = part[..., : turned // 2], part[..., turned // 2 :]
            done = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = part[..., 0::2], part[..., 1::2]
            done = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        rest = x[..., :still] if dims < 0 else x[..., turned:]
        return torch.cat([rest, done] if dims < 0 else [done, rest], dim=-1)

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        tokens = shapes[0].tokens
        where = "positions" if tokens == "n" else "context_positions"
        if tokens.isdecimal():
            where = f"torch.arange({tokens}, device=x.device)"
        where = f"-{where}" if options["inverse"] else where
        extra = [f"theta={options['theta']!r}"]
        if options["dims"] != shapes[0].dim:
            extra.append(f"dims={options['dims']}")
        if options["scaling"] != 1:
            extra.append(f"scaling={options['scaling']!r}")
        return f"{self.helpers(options)[0]}({inputs[0]}, {where}, {', '.join(extra)})"

    def helpers(self, options: Options) -> tuple[str, ...]:
        return ("rope",) if options["style"] == "half" else ("rope_interleaved",)

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        return 3 * abs(int(options["dims"])) * (inputs[0].heads or 1)
