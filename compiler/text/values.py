"""Expressions over numbers, vectors and matrices as PyTorch text.

    outer(k, v) * beta     →   (k_t[..., :, None] * v_t[..., None, :]) * beta_t[..., None, None]

Every text has leading dimensions, which broadcast, and then those of its value; `rank` says
how many of its own it has: 0 for a number, 1 for a vector, 2 for a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from ...grammar.dialect import write
from ...grammar.expr import rebuild
from ...grammar.syntax import Binary, Call, Expr, Index, Name, Number
from .text import atomic


class Text(NamedTuple):
    """A text, and the number of dimensions its value has of its own."""

    text: str
    rank: int


class Values(ABC):
    """Writes expressions; what names, indices and calls of its own are, a subclass says."""

    @property
    @abstractmethod
    def typed(self) -> str:
        """How a number is written as a tensor of the dtype that values have."""

    @abstractmethod
    def leaf(self, expr: Name | Index) -> Text:
        """Return the text of a name or an index."""

    def special(self, expr: Expr) -> Text | None:  # noqa: ARG002
        """Return the text of what is written in a way of its own."""
        return None

    def prepared(self, pattern: Expr) -> Expr:
        """Return the elementwise part of an expression as it is to be written."""
        return pattern

    def value(self, expr: Expr) -> Text:
        """Return an expression's text, everything elementwise in it in one piece."""
        parts: dict[Expr, Text] = {}
        pattern = self._pattern(expr, parts)
        if pattern in parts:
            return parts[pattern]
        rank = max((each.rank for each in parts.values()), default=0)

        def leaf(each: Name | Index) -> str:
            return lifted(parts[each] if each in parts else self.leaf(each), rank)

        return Text(write(self.prepared(pattern), "torch", leaf, self.typed), rank)

    def _pattern(self, expr: Expr, parts: dict[Expr, Text]) -> Expr:
        """Return the elementwise part of an expression, over `part 0` … for what is below it."""

        def below(part: Text) -> Expr:
            name = Name(f"part {len(parts)}")
            parts[name] = part
            return name

        if (known := self.special(expr)) is not None:
            return below(known)
        match expr:
            case Number() | Name("true" | "false"):
                return expr
            case Name() | Index():
                found = self.leaf(expr)
                return below(found) if found.rank else expr
            case Call("outer", (left, right)):
                a, b = (atomic(self.value(each).text) for each in (left, right))
                rows, columns = (
                    below(Text(f"{a}[..., :, None]", 2)),
                    below(Text(f"{b}[..., None, :]", 2)),
                )
                return Binary("*", rows, columns)
            case Call("diag", (arg,)):
                return below(Text(f"torch.diag_embed({self.value(arg).text})", 2))
            case Call("softmax", (arg,)):
                return below(Text(f"torch.softmax({self.value(arg).text}, dim=-1)", 1))
            case Call("solve", (matrix, vector)):
                a, b = self.value(matrix).text, self.value(vector).text
                return below(Text(f"solved({a}, {b})", 1))
            case Binary("@", left, right) | Call("dot", (left, right)):
                return below(contracted(self.value(left), self.value(right)))
            case Call("sum" | "mean" | "norm" as name, (arg,)):
                return below(reduced(name, self.value(arg)))
            case _:
                return rebuild(expr, lambda each: self._pattern(each, parts))


def contracted(left: Text, right: Text) -> Text:
    """Contract the last dimension of one with the first of the other."""
    a, b = atomic(left.text), atomic(right.text)
    if left.rank == 1 and right.rank == 1:
        return Text(f"({a} * {b}).sum(-1)", 0)
    if left.rank == 1:
        return Text(f"({a}[..., None, :] @ {b}).squeeze(-2)", 1)
    if right.rank == 1:
        return Text(f"({a} @ {b}[..., :, None]).squeeze(-1)", 1)
    return Text(f"{a} @ {b}", 2)


def reduced(name: str, part: Text) -> Text:
    """Return the `sum`, `mean` or `norm` of all that a value holds."""
    axes = "-1" if part.rank == 1 else "(-2, -1)"
    if name == "norm":
        size = f"torch.linalg.vector_norm({part.text}, dim={axes})"
        return Text(size if part.rank else f"({part.text}).abs()", 0)
    return Text(f"{atomic(part.text)}.{name}({axes})" if part.rank else part.text, 0)


def lifted(part: Text, to: int) -> str:
    """Give a text the trailing dimensions to meet one of a higher rank."""
    if part.rank == to:
        return atomic(part.text)
    dims = "..., None, None" if (part.rank, to) == (0, 2) else "..., None"
    return f"{atomic(part.text)}[{dims}]"
