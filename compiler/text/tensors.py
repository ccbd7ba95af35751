"""The lines that make a block's own tensors: `param` in the constructor, `const` in a method.

    const slope[heads] = 2 ** (-8 * (h + 1) / heads)

becomes  h = torch.arange(8, dtype=torch.float64)  and  slope = 2 ** (-8 * (h + 1) / 8).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...grammar.dialect import write
from ...grammar.expr import calls, evaluate, names, rebuild
from ...grammar.syntax import Call, Expr, Index, Name
from ...ops import Weight
from ..model import Block
from .text import atomic, braced, call, comment, ident, indent


def stored(block: Block, name: str) -> str:
    """Return the text that reads a tensor of a block in its methods."""
    return f'self.held("{name}")' if is_moved(block, name) else f"self.{name}"


def is_moved(block: Block, name: str) -> bool:
    """Say whether training moves a tensor."""
    return any(each.name == name for each in block.moves)


def held(block: Block, lines: Sequence[str], exact: bool = False) -> list[str]:
    """Return the lines that bring what training moves into the variables that others read.

    `t_held` is in the module's precision, `t_exact` as it is stored.
    """
    kind, more = ("exact", ", exact=True") if exact else ("held", "")
    texts = {f"{ident(each.name)}_{kind}": each.name for each in block.moves}
    read = re.findall(rf"\w+_{kind}\b", "\n".join(lines))
    return [f'{name} = self.held("{of}"{more})' for name, of in texts.items() if name in read]


def parameter(weight: Weight) -> list[str]:
    """Return the lines of a constructor that make a `param`."""
    before: list[str] = []
    if (value := _filled(weight)) is None:
        before, drawn = _computed(weight, "dtype=torch.float64")
        value = f"{atomic(drawn)}.to(torch.get_default_dtype())"
    if weight.moved:
        made = call("self.add_moved", [f'"{weight.name}"', value])
    else:
        made = call(f"self.{weight.name} = nn.Parameter", [value])
    return [*before, *made[:-1], f"{made[-1]}  # {_shape(weight)}"]


def constants(weights: Sequence[Weight]) -> list[str]:
    """Return the method that makes the `const`s of a block."""
    lines = [
        "def constants(self, device: torch.device) -> dict[str, Tensor]:",
        '    """Return what is not learned, in float64."""',
    ]
    for weight in weights:
        typed = "dtype=torch.float64, device=device"
        before: list[str] = []
        if (value := _filled(weight, typed)) is None:
            before, value = _computed(weight, typed)
        lines += indent([*before, *comment(f"{ident(weight.name)} = {value}", _shape(weight))])
    made = {f'"{each.name}"': ident(each.name) for each in weights}
    return [*lines, *indent(braced("return ", [f"{key}: {value}" for key, value in made.items()]))]


def _shape(weight: Weight) -> str:
    return f"[{', '.join(map(str, weight.shape))}]"


def _filled(weight: Weight, *typed: str) -> str | None:
    """Return the text of a tensor that is one number everywhere; None of others."""
    init = weight.init
    assert not isinstance(init, str)
    if names(init) or calls(init, "normal"):
        return None
    args = [str(weight.shape), repr(float(evaluate(init, {}))), *typed]
    return f"torch.full({', '.join(args)})"


def _computed(weight: Weight, typed: str) -> tuple[list[str], str]:
    """Return the lines before a tensor's first value, and the value; `typed` is how it is made."""
    lines, init, size = [], weight.init, str(weight.shape)
    assert not isinstance(init, str)
    if "h" in names(init):
        rest = f".view(-1{', 1' * (len(weight.shape) - 1)})" if len(weight.shape) > 1 else ""
        lines.append(f"h = torch.arange({weight.shape[0]}, {typed}){rest}")
    text = _initial(init, size, typed)
    if len(weight.shape) < 2 or calls(init, "normal"):
        return lines, text
    return lines, f"{atomic(text)}.expand{size}.clone()"


def _initial(init: Expr, size: str, typed: str) -> str:
    """Write a first value over h, with a draw for every `normal(std)`."""
    draws: dict[str, str] = {}

    def drawn(expr: Expr) -> Expr:
        if not (isinstance(expr, Call) and expr.function == "normal"):
            return rebuild(expr, drawn)
        std = atomic(_initial(expr.args[0], size, typed))
        text = f"torch.randn({size}, {typed}) * {std}"
        draws[f"draw {len(draws)}"] = text
        return Name(f"draw {len(draws) - 1}")

    def leaf(each: Name | Index) -> str:
        assert isinstance(each, Name)
        return f"({draws[each.id]})" if each.id in draws else each.id

    pattern = drawn(init)
    if pattern == Name("draw 0"):
        return draws["draw 0"]
    return write(pattern, "torch", leaf, f"torch.full((), {{}}, {typed})")
