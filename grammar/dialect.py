"""Printing scalar expressions as PyTorch or Triton text.

`leaf` says how a name or an indexed tensor is written; everything else is the same in both
dialects but for the functions' texts (in `functions`) and whole-number division, which C
and therefore Triton rounds towards zero where the language rounds down.

    >>> write(parse_expression("0 <= i - j < 8"), "torch", lambda leaf: leaf.id)
    '(0 <= i - j) & (i - j < 8)'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from .functions import FUNCTIONS
from .syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary

Dialect = Literal["torch", "triton"]
Leaf = Callable[[Name | Index], str]

_OPS = {"or": ("|", 1), "and": ("&", 3), "+": ("+", 5), "-": ("-", 5), "*": ("*", 6),
        "/": ("/", 6), "//": ("//", 6), "%": ("%", 6), "@": ("@", 6), "**": ("**", 8)}  # fmt: skip
_COMPARE, _UNARY, _ATOM = 0.5, 7, 9  # Python compares last, after `|` and `&`
_BOUND = {"min": "max", "max": "min"}  # min(a, 3) is a.clamp(max=3)


def write(expr: Expr, dialect: Dialect, leaf: Leaf) -> str:
    """Return the expression as text. Raises `ValueError` for what is not scalar."""
    return _write(expr, dialect, leaf)[0]


def _write(expr: Expr, dialect: Dialect, leaf: Leaf) -> tuple[str, float]:
    match expr:
        case Number(value):
            return repr(value), _ATOM if value >= 0 else _UNARY
        case Name("true" | "false" as id):
            return id.capitalize(), _ATOM
        case Name() | Index():
            return leaf(expr), _ATOM
        case Unary("not", operand):
            return "~" + _within(operand, _ATOM, dialect, leaf), _UNARY
        case Unary(_, operand):
            return "-" + _within(operand, _UNARY, dialect, leaf), _UNARY
        case Compare(operands, ops):
            pairs = [
                f"{_within(a, 5, dialect, leaf)} {op} {_within(b, 5, dialect, leaf)}"
                for op, a, b in zip(ops, operands, operands[1:], strict=False)
            ]
            if len(pairs) == 1:
                return pairs[0], _COMPARE
            return " & ".join(f"({pair})" for pair in pairs), 3
        case Binary("//" | "%" as op, left, right) if dialect == "triton":
            a = _within(left, _ATOM, dialect, leaf)
            b = _within(right, _ATOM, dialect, leaf)
            rest = f"(({a} % {b}) + {b}) % {b}"
            return (rest, 6) if op == "%" else (f"({a} - {rest}) // {b}", 6)
        case Binary("**", base, Number(value)) if dialect == "triton":
            return _triton_power(_within(base, _ATOM, dialect, leaf), value)
        case Binary("**", base, exponent) if dialect == "triton":
            if isinstance(base, Number) and base.value > 0:
                log = repr(math.log(base.value))
            else:
                log = f"tl.log({_write(base, dialect, leaf)[0]})"
            return f"tl.exp({_within(exponent, 6, dialect, leaf)} * {log})", _ATOM
        case Binary(op, left, right):
            sign, level = _OPS[op]
            tighter = level + (0.5 if op != "**" else -1)
            a = _within(left, level if op != "**" else _ATOM, dialect, leaf)
            return f"{a} {sign} {_within(right, tighter, dialect, leaf)}", level
        case Call("min" | "max" as name, (Number(bound), a) | (a, Number(bound)), ()) if (
            dialect == "torch"
        ):
            return f"{_within(a, _ATOM, dialect, leaf)}.clamp({_BOUND[name]}={bound!r})", _ATOM
        case Call(name, args, ()) if name in FUNCTIONS:
            template = getattr(FUNCTIONS[name], dialect)
            inner = [_write(arg, dialect, leaf)[0] for arg in args]
            text = template.format(*inner)
            whole = text.startswith(("torch.", "F.", "tl.", "hard_step(", f"({inner[0]})"))
            return text, _ATOM if whole and template.count("{0}") == 1 else 0
        case _:
            raise ValueError(f"{type(expr).__name__} is not a scalar expression")


def _within(expr: Expr, level: float, dialect: Dialect, leaf: Leaf) -> str:
    text, own = _write(expr, dialect, leaf)
    return text if own >= level else f"({text})"


def _triton_power(base: str, value: float) -> tuple[str, float]:
    if isinstance(value, int) and 0 < value <= 8:
        return " * ".join([base] * value), 6
    if isinstance(value, int) and -8 <= value < 0:
        return f"1.0 / ({' * '.join([base] * -value)})", 6
    if value == 0.5:
        return f"tl.sqrt({base})", _ATOM
    if isinstance(value, int) and value % 2 == 0:  # a logarithm would lose a negative base
        return f"tl.exp({value} * tl.log(tl.abs({base})))", _ATOM
    if isinstance(value, int):
        return f"{base} * tl.exp({value - 1} * tl.log(tl.abs({base})))", 6
    return f"tl.exp({value!r} * tl.log({base}))", _ATOM
