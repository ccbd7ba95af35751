"""Printing scalar expressions as PyTorch or Triton text.

`leaf` says how a name or an indexed tensor is written; everything else is the same in both
dialects but for the functions' texts (in `functions`) and whole-number division, which C
and therefore Triton rounds towards zero where the language rounds down.

    >>> write(parse_expression("0 <= i - j < 8"), "torch", lambda leaf: leaf.id)
    '(0 <= i - j) & (i - j < 8)'

`torch.where` of two plain numbers has PyTorch's default dtype, whatever meets it afterwards;
`typed` says how a number is written as a tensor of the dtype that is meant.

    >>> typed = "s.new_full((), {})"
    >>> write(parse_expression("where(s > 0, 0.7, 0.3)"), "torch", lambda leaf: leaf.id, typed)
    'torch.where(s > 0, s.new_full((), 0.7), 0.3)'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .expr import PLACES, names
from .functions import FUNCTIONS
from .syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary

Dialect = Literal["torch", "triton"]
Leaf = Callable[[Name | Index], str]

_OPS = {"or": ("|", 1), "and": ("&", 3), "+": ("+", 5), "-": ("-", 5), "*": ("*", 6),
        "/": ("/", 6), "//": ("//", 6), "%": ("%", 6), "@": ("@", 6), "**": ("**", 8)}  # fmt: skip
_COMPARE, _UNARY, _ATOM = 0.5, 7, 9  # Python compares last, after `|` and `&`
_BOUND = {"min": "max", "max": "min"}  # min(a, 3) is a.clamp(max=3)


def write(expr: Expr, dialect: Dialect, leaf: Leaf, typed: str = "{}") -> str:
    """Return the expression as text. Raises `ValueError` for what is not scalar."""
    return _Writer(dialect, leaf, typed).write(expr)[0]


@dataclass(frozen=True, slots=True)
class _Writer:
    dialect: Dialect
    leaf: Leaf
    typed: str

    def write(self, expr: Expr) -> tuple[str, float]:
        """Return an expression's text, and how tightly it holds together."""
        match expr:
            case Number(value):
                return self._literal(value)
            case Name("true" | "false" as id):
                return id.capitalize(), _ATOM
            case Name() | Index():
                return self.leaf(expr), _ATOM
            case Unary("not", operand):
                return "~" + self.within(operand, _ATOM), _UNARY
            case Unary(_, operand):
                return "-" + self.within(operand, _UNARY), _UNARY
            case Compare(operands, ops):
                pairs = [
                    f"{self.within(a, 5)} {op} {self.within(b, 5)}"
                    for op, a, b in zip(ops, operands, operands[1:], strict=False)
                ]
                if len(pairs) == 1:
                    return pairs[0], _COMPARE
                return " & ".join(f"({pair})" for pair in pairs), 3
            case Binary("//" | "%" | "**") if self.dialect == "triton":
                return self._triton_binary(expr)
            case Binary("//", left, right) if not _is_place(left) or not _is_place(right):
                a, b = self._constant(left), self._constant(right)
                return f"{a} // {b}", _OPS["//"][1]
            case Binary(op, left, right):
                sign, level = _OPS[op]
                tighter = level + (0.5 if op != "**" else -1)
                a = self.within(left, level if op != "**" else _ATOM)
                return f"{a} {sign} {self.within(right, tighter)}", level
            case Call(name, args, ()) if name in FUNCTIONS:
                return self._call(name, args)
            case _:
                raise ValueError(f"{type(expr).__name__} is not a scalar expression")

    def _literal(self, value: float) -> tuple[str, float]:
        if value == -math.inf:
            triton = self.dialect == "triton"
            return ('float("-inf")', _ATOM) if triton else ("-torch.inf", _UNARY)
        return repr(value), _ATOM if value >= 0 else _UNARY

    def within(self, expr: Expr, level: float) -> str:
        text, own = self.write(expr)
        return text if own >= level else f"({text})"

    def _constant(self, expr: Expr) -> str:
        """Write an operand of `//`, whose gradient is zero: PyTorch has none."""
        text = self.within(expr, _ATOM)
        return text if _is_place(expr) else f"{text}.detach()"

    def _triton_binary(self, expr: Binary) -> tuple[str, float]:
        match expr:
            case Binary("**", base, Number(value)):
                return _triton_power(self.within(base, _ATOM), value)
            case Binary("**", base, exponent):
                if isinstance(base, Number) and base.value > 0:
                    log = repr(math.log(base.value))
                else:
                    log = f"tl.log({self.write(base)[0]})"
                return f"tl.exp({self.within(exponent, 6)} * {log})", _ATOM
        a, b = self.within(expr.left, _ATOM), self.within(expr.right, _ATOM)
        rest = f"(({a} % {b}) + {b}) % {b}"
        return (rest, 6) if expr.op == "%" else (f"({a} - {rest}) // {b}", 6)

    def _call(self, name: str, args: tuple[Expr, ...]) -> tuple[str, float]:
        match name, args:
            case _ if self.dialect == "triton":
                pass
            case "min" | "max", (Number(bound), a) | (a, Number(bound)):
                limit = self._literal(bound)[0]
                return f"{self.within(a, _ATOM)}.clamp({_BOUND[name]}={limit})", _ATOM
            case "clip", (Number(a), Number(low), high):
                return self._call("min", (Number(max(a, low)), high))
            case "clip", (a, low, high) if _mixed(a, low, high):
                return self._call("min", (Call("max", (a, low)), high))
            case "where", (condition, Number(a), Number(b)):
                truth = self.write(condition)[0]
                first, second = (self._literal(each)[0] for each in (a, b))
                return f"torch.where({truth}, {self.typed.replace('{}', first)}, {second})", _ATOM
        template = getattr(FUNCTIONS[name], self.dialect)
        inner = [self.write(arg)[0] for arg in args]
        text = template.format(*inner)
        called = ("torch.", "F.", "tl.", "hard_step(", "elu(", "tanh(")
        whole = text.startswith((*called, f"({inner[0]})"))
        return text, _ATOM if whole and template.count("{0}") == 1 else 0


def _is_place(expr: Expr) -> bool:
    """Say whether an expression reads nothing but places, `i` or `i.double()`."""
    return all(each.partition(".")[0] in PLACES for each in names(expr))


def _mixed(a: Expr, low: Expr, high: Expr) -> bool:
    """Say whether torch.clamp refuses a clip: it takes a tensor, and two bounds of one kind."""
    return isinstance(a, Number) or isinstance(low, Number) != isinstance(high, Number)


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
