"""Stages that make one token of each group of tokens: `pool(kind, size)`, `windows(size)`.

    pool(mean, size = 64)                 out[g] = mean of x[64 g … 64 g + 63]
    pool(max, size = 32, stride = 16)     out[g] = max of x[16 g … 16 g + 31], groups overlap
    windows(64)                           out[t, g] = x[64 g + t]: the group's tokens as heads

There is a group for each `stride` tokens that are begun; group g holds the tokens of its sequence
from start + stride · g on. What lies outside is left out, or `fill` in windows. A pooled token
stands where its group begins.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .op import Mismatch, Op, Option, Options, Run, Weight
from .shape import Shape, pooled

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("mean", "max", "min", "sum", "first", "last", "linear", "attention")


class _Groups(Op):
    """What both say of their groups."""

    by_sequence = True
    whole_rows = True
    groups = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def complete(self, options: dict[str, Any], given: Shape, out: Shape | None) -> dict[str, Any]:
        if options["stride"] is None:
            options["stride"] = options["size"]
        return options

    def reaches(self, options: Options) -> tuple[int, int]:
        return int(options["start"]) + int(options["size"]) - 1, int(options["stride"])

    def looks_ahead(self, options: Options) -> bool:
        """A group for every token is no axis of its own, and none reads the tokens before."""
        return bool(options["stride"] == 1 and (options["size"] > 1 or options["start"] != 0))

    def _windows(self, x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Return the tokens of every group [..., groups, size, d], and which of them there are."""
        import torch

        size, stride, start = options["size"], options["stride"], int(options["start"])
        n = x.shape[-2]
        group = torch.arange(-(-n // stride), device=x.device)
        at = start + stride * group[:, None] + torch.arange(size, device=x.device)
        inside = (at >= 0) & (at < n)
        if not n:
            return x.new_zeros(*x.shape[:-2], 0, size, x.shape[-1]), inside
        return x[..., at.clamp(0, n - 1), :], inside

    def _arguments(self, x: str, run: str, options: Options, more: str = "") -> str:
        size, stride, start = options["size"], options["stride"], int(options["start"])
        made = "new_groups" if more else "groups_in"
        return f"*{made}({x}, {size}, {stride}, {start}, {run}{more})"

    @abstractmethod
    def made(self, groups: str, options: Options, module: str) -> str:
        """Return the text of what is made of groups, of their tokens and which there are."""

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        groups = self._arguments(inputs[0], self.run_of(shapes[0]), options)
        return self.made(groups, options, module)

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        groups = self._arguments(
            inputs[0], self.run_of(shapes[0]), options, ", before, groups, batch"
        )
        return self.made(groups, options, module)


class Pool(_Groups):
    name = "pool"
    options = (
        Option("kind", KINDS, required=True),
        Option("size", "size", required=True),
        Option("stride", "size"),
        Option("start", "number", 0),
    )
    suffix = "pool"

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x = inputs[0]
        _require(x, options)
        return Shape(pooled(x.tokens, options["stride"]), x.dim, x.heads)

    def weights(self, inputs: Sequence[Shape], options: Options) -> tuple[Weight, ...]:
        d, size = inputs[0].dim, options["size"]
        match options["kind"]:
            case "linear":
                return (Weight("weight", (d, size * d), "linear"),)
            case "attention":
                return (Weight("weight", (1, d), "linear"),)
        return ()

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch

        x, inside = self._windows(inputs[0], options)
        there = inside[..., None]
        zero, count = x.masked_fill(~there, 0), there.sum(-2)
        match options["kind"]:
            case "mean":
                return zero.sum(-2) / count.clamp(min=1)
            case "sum":
                return zero.sum(-2)
            case "max" | "min" as kind:
                far = -torch.inf if kind == "max" else torch.inf
                some = x.masked_fill(~there, far)
                most = some.amax(-2) if kind == "max" else some.amin(-2)
                return most.masked_fill(count == 0, 0)
            case "first" | "last" as kind:
                step = torch.arange(inside.shape[-1], device=x.device)
                ranked = torch.where(inside, step, -1 if kind == "last" else len(step))
                at = ranked.amax(-1) if kind == "last" else ranked.amin(-1)
                at = at.clamp(0, len(step) - 1)
                group = torch.arange(len(at), device=x.device)
                return zero[..., group, at, :]
            case "linear":
                return zero.flatten(-2) @ weights["weight"].to(x.dtype).mT
        logit = (x @ weights["weight"][0].to(x.dtype)).masked_fill(~inside, -torch.inf)
        logit = logit.masked_fill((count == 0).squeeze(-1)[..., None], 0)
        return (logit.softmax(-1)[..., None] * zero).sum(-2)

    def made(self, groups: str, options: Options, module: str) -> str:
        learned = f", self.{module}.weight" if options["kind"] in ("linear", "attention") else ""
        return f"pooled_{options['kind']}({groups}{learned})"

    def constructor(self, inputs: Sequence[Shape], options: Options) -> str:
        d, size = inputs[0].dim, options["size"]
        if options["kind"] == "linear":
            return f"nn.Linear({size * d}, {d}, bias=False)"
        return f"nn.Linear({d}, 1, bias=False)" if options["kind"] == "attention" else ""

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        x = inputs[0]
        each = 2 * x.dim if options["kind"] == "linear" else 1
        return int(options["size"]) * each * x.features


class Windows(_Groups):
    name = "windows"
    options = (
        Option("size", "size", required=True),
        Option("stride", "size"),
        Option("start", "number", 0),
        Option("fill", "number", 0),
        Option("over", ("heads", "features"), "heads"),
    )

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        x, size = inputs[0], options["size"]
        _require(x, options)
        tokens = pooled(x.tokens, options["stride"])
        if options["over"] == "features":
            return Shape(tokens, size * x.dim, x.heads)
        if x.heads is not None:
            raise Mismatch(
                "the tokens of a group become heads", f"it has {x.heads} heads already",
                "write `over = features`, or take windows before `split`",
            )  # fmt: skip
        return Shape(tokens, x.dim, size)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        x, inside = self._windows(inputs[0], options)
        x = x.masked_fill(~inside[..., None], options["fill"])
        return x.flatten(-2) if options["over"] == "features" else x.transpose(-2, -3)

    def made(self, groups: str, options: Options, module: str) -> str:
        fill = f", {options['fill']!r}" if options["fill"] else ""
        text = f"windows_of({groups}{fill})"
        end = ".flatten(-2)" if options["over"] == "features" else ".transpose(-2, -3)"
        return f"{text}{end}"


def _require(x: Shape, options: Options) -> None:
    """Raise `Mismatch` where a stream has no tokens to group, or groups lie outside of it."""
    if x.tokens == "1":
        raise Mismatch("this stream has no tokens to pool", "it is the same for all of them")
    start = options["start"]
    if start != int(start) or not -options["size"] < start <= 0:
        raise Mismatch(
            "a group begins at its first token or before it",
            f"start = {start}, size = {options['size']}",
            f"use a whole number from {1 - options['size']} to 0",
            "start",
        )
