"""What a node of the graph does: one frozen type for each kind of operation.

    s = similarity(q, k)     Similarity(scale=0.125)
    o = attend(q, k, v)      Attend(mix)                  # after fusion
    y = linear(y.1)          Stage("linear", (("dim", 64),))

`roles` are what the first inputs of a node are to it; what its expressions read follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from ...grammar.expr import rebuild, substitute
from ...grammar.source import Span
from ...grammar.syntax import Expr, Index, Name
from ...ops import OPS
from ...ops.op import Op
from ..model import Block, Keep, Normalizer, Pairwise, Recurrence, Select, Taken

Change = Callable[[Expr], Expr]


class _Operation:
    __slots__ = ()
    roles: ClassVar[tuple[str, ...]] = ()

    def mapped(self, change: Change) -> Self:  # noqa: ARG002  most have no expressions
        """Return the operation with every expression changed."""
        return self

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the operation with the streams that it indexes, `t[j]`, under other names."""
        return self.mapped(lambda expr: _reindexed(expr, names))


def _reindexed(expr: Expr, names: Mapping[str, str]) -> Expr:
    expr = rebuild(expr, lambda each: _reindexed(each, names))
    if isinstance(expr, Index) and isinstance(expr.base, Name) and expr.base.id in names:
        return replace(expr, base=Name(names[expr.base.id], expr.base.span))
    return expr


def _recarried(carry: Expr | None, names: Mapping[str, str]) -> Expr | None:
    """Return a `carry` with the streams that it reads under other names; `k` is the key in it."""
    if carry is None:
        return None
    new = {old: Name(to) for old, to in names.items() if old != "k"}
    return substitute(_reindexed(carry, names), new)


@dataclass(frozen=True, slots=True)
class Input(_Operation):
    """An argument of the module."""

    name: ClassVar[str] = "input"


@dataclass(frozen=True, slots=True)
class TensorRead(_Operation):
    """A param or const."""

    name: ClassVar[str] = "tensor"


@dataclass(frozen=True, slots=True)
class Whole(_Operation):
    """A part of a layer, or a stage with tensors: a module of its own, or that of `once`."""

    what: Block
    once: Span | None = None
    taken: Taken | None = None
    name: ClassVar[str] = "part"
    roles: ClassVar[tuple[str, ...]] = ("x",)


@dataclass(frozen=True, slots=True)
class Stage(_Operation):
    """An operation of `ops.OPS`, and the options it was given.

    Expressions among these call its inputs a0, a1 …, whatever the names of the nodes.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def definition(self) -> Op:
        return OPS[self.name]

    @property
    def given(self) -> dict[str, Any]:
        """The options by name, as definitions take them."""
        return dict(self.options)


@dataclass(frozen=True, slots=True)
class Similarity(_Operation):
    """`scale` times an expression in q[h, i] and k[…, j], None for their product.

    `carry` is what further tokens do to the keys before them.
    """

    scale: float
    expr: Expr | None = None
    carry: Expr | None = None
    name: ClassVar[str] = "similarity"
    roles: ClassVar[tuple[str, ...]] = ("q", "k")

    def mapped(self, change: Change) -> Self:
        return self if self.expr is None else replace(self, expr=change(self.expr))

    def renamed(self, names: Mapping[str, str]) -> Self:
        done = self.mapped(lambda expr: _reindexed(expr, names))
        return replace(done, carry=_recarried(done.carry, names))


@dataclass(frozen=True, slots=True)
class _Formula(_Operation):
    expr: Expr

    def mapped(self, change: Change) -> Self:
        return replace(self, expr=change(self.expr))


@dataclass(frozen=True, slots=True)
class Score(_Formula):
    """An expression in s."""

    name: ClassVar[str] = "score"
    roles: ClassVar[tuple[str, ...]] = ("s",)


@dataclass(frozen=True, slots=True)
class Mask(_Formula):
    """Who sees whom, which of those it reads, and which stay held."""

    select: Select | None = None
    keep: Keep | None = None
    name: ClassVar[str] = "mask"

    def mapped(self, change: Change) -> Self:
        select = None if self.select is None else self.select.mapped(change)
        keep = None if self.keep is None else self.keep.mapped(change)
        return replace(self, expr=change(self.expr), select=select, keep=keep)


@dataclass(frozen=True, slots=True)
class Normalize(_Operation):
    """Scores and visibility to weights."""

    normalizer: Normalizer
    name: ClassVar[str] = "normalize"
    roles: ClassVar[tuple[str, ...]] = ("s", "visible")

    def mapped(self, change: Change) -> Self:
        return replace(self, normalizer=self.normalizer.mapped(change))


@dataclass(frozen=True, slots=True)
class Weights(_Formula):
    """An expression in p, where visible."""

    name: ClassVar[str] = "weights"
    roles: ClassVar[tuple[str, ...]] = ("p", "visible")


@dataclass(frozen=True, slots=True)
class Drop(_Operation):
    """Dropout on the weights."""

    rate: float
    name: ClassVar[str] = "drop"
    roles: ClassVar[tuple[str, ...]] = ("p",)


@dataclass(frozen=True, slots=True)
class Combine(_Operation):
    """Σ_j p v; with `again`, Σ_j p (v + again · itself)."""

    again: Expr | None = None
    name: ClassVar[str] = "combine"
    roles: ClassVar[tuple[str, ...]] = ("p", "v")

    def mapped(self, change: Change) -> Self:
        return self if self.again is None else replace(self, again=change(self.again))


@dataclass(frozen=True, slots=True)
class StatisticOf(_Operation):
    """A number of every row or column of a map; the kinds are those of `model.Statistic`."""

    kind: str
    expr: Expr | None = None
    name: ClassVar[str] = "statistic"
    roles: ClassVar[tuple[str, ...]] = ("map",)

    def mapped(self, change: Change) -> Self:
        return self if self.expr is None else replace(self, expr=change(self.expr))


class Statistic(NamedTuple):
    """What an attention gives besides the mixed heads, under the name of the node it was."""

    name: str
    kind: str
    expr: Expr | None


def asked_again(name: str, turn: int) -> str:
    """Return what an attention is called where its map is asked once more, from 1."""
    return f"{name}.{turn + 1}"


def attention_of(name: str) -> str:
    """Return the attention that is asked, once more or not."""
    return name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Attend(_Operation):
    """All of an attention in one: from similarity to combine, and what is asked of its map."""

    mix: Pairwise
    statistics: tuple[Statistic, ...] = ()
    name: ClassVar[str] = "attend"
    roles: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """Every expression of it."""
        asked = (each.expr for each in self.statistics)
        return (*self.mix.exprs, *(expr for expr in asked if expr is not None))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its statistics, each once."""
        return tuple(dict.fromkeys(each.kind for each in self.statistics))

    def mapped(self, change: Change) -> Self:
        asked = (
            each if each.expr is None else each._replace(expr=change(each.expr))
            for each in self.statistics
        )
        return replace(self, mix=self.mix.mapped(change), statistics=tuple(asked))

    def renamed(self, names: Mapping[str, str]) -> Self:
        done = self.mapped(lambda expr: _reindexed(expr, names))
        carry = _recarried(done.mix.carry, names)
        return replace(done, mix=replace(done.mix, carry=carry))


@dataclass(frozen=True, slots=True)
class Scan(_Operation):
    """A recurrence along the tokens."""

    mix: Recurrence
    name: ClassVar[str] = "scan"

    def mapped(self, change: Change) -> Self:
        return replace(self, mix=self.mix.mapped(change))

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the recurrence with the streams that it reads, by their names, under others."""
        new = {old: Name(to) for old, to in names.items() if old not in self.mix.written}
        return self.mapped(lambda expr: substitute(expr, new))


Operation = (
    Input | TensorRead | Stage | Similarity | Score | Mask | Normalize | Weights | Drop | Combine
    | StatisticOf | Attend | Scan | Whole
)  # fmt: skip
