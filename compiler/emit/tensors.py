"""The lines of a constructor that make a block's own tensors: `param` and `const`.

    const slope[heads] = 2 ** (-8 * (h + 1) / heads)

becomes  h = torch.arange(8, dtype=torch.float64)  and a buffer of  2 ** (-8 * (h + 1) / 8).
"""

from __future__ import annotations

from ...grammar.dialect import write
from ...grammar.expr import calls, evaluate, names, rebuild
from ...grammar.syntax import Call, Expr, Index, Name
from ...ops import Weight
from .text import atomic, call


def tensor(weight: Weight) -> list[str]:
    """Return the lines that make a `param` or `const`."""
    lines = []
    size = "()" if not weight.shape else f"({', '.join(map(str, weight.shape))},)"
    size = size if len(weight.shape) < 2 else size.replace(",)", ")")
    init = weight.init
    assert not isinstance(init, str)
    if not names(init) and not calls(init, "normal"):
        text = f"torch.full({size}, {float(evaluate(init, {}))!r})"
    else:
        if "h" in names(init):
            rest = f".view(-1{', 1' * (len(weight.shape) - 1)})" if len(weight.shape) > 1 else ""
            lines.append(f"h = torch.arange({weight.shape[0]}, dtype=torch.float64){rest}")
        text = f"({_initial(init, size)}).expand{size}.clone().to(torch.get_default_dtype())"
        if len(weight.shape) < 2 or calls(init, "normal"):
            text = text.replace(f".expand{size}.clone()", "")
    if weight.learned:
        made = call(f"self.{weight.name} = nn.Parameter", [text])
    else:
        made = call("self.register_buffer", [f'"{weight.name}"', text, "persistent=False"])
    return [*lines, *made[:-1], f"{made[-1]}  # [{', '.join(map(str, weight.shape))}]"]


def _initial(init: Expr, size: str) -> str:
    """Write a first value over h, with a draw for every `normal(std)`."""
    draws: dict[str, str] = {}

    def drawn(expr: Expr) -> Expr:
        if not (isinstance(expr, Call) and expr.function == "normal"):
            return rebuild(expr, drawn)
        text = f"torch.randn({size}, dtype=torch.float64) * {atomic(_initial(expr.args[0], size))}"
        draws[f"draw {len(draws)}"] = text
        return Name(f"draw {len(draws) - 1}")

    def leaf(each: Name | Index) -> str:
        assert isinstance(each, Name)
        return f"({draws[each.id]})" if each.id in draws else each.id

    pattern = drawn(init)
    if pattern == Name("draw 0"):
        return draws["draw 0"]
    return write(pattern, "torch", leaf, "torch.full((), {}, dtype=torch.float64)")
