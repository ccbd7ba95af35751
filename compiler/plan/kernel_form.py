"""An attention as the pairwise kernels take it: one product of queries and keys, and numbers.

    dot(q, k) / (norm(q) * norm(k))   →   s / (side_0[h, i] * side_1[h, j]),   s = q · k

What reads one side alone and brings vectors to a number is made before the kernel, one number
a head and token; so are the two vectors whose product the kernel computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ...grammar.expr import fold, names, number, rebuild, substitute
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Expr, Index, Name, walk
from ..graph.graph import Graph, Node
from ..graph.operations import Attend
from ..graph.sides import KEY, QUERY, product, rank, reduces, sides
from ..model import Normalizer


class Side(NamedTuple):
    """A number for every head and token of one side, made before the kernel."""

    name: str
    expr: Expr
    at: str  # i or j


@dataclass(frozen=True, slots=True)
class KernelForm:
    """The expressions of an attention over `s`, `scale` times the product of query and key.

    `query` and `key` are the vectors, None where they are q and k themselves.
    """

    score: Expr
    mask: Expr
    normalizer: Normalizer
    scale: float
    query: Expr | None
    key: Expr | None
    sides: tuple[Side, ...]


def kernel_form(graph: Graph, node: Node[Attend]) -> KernelForm | str:
    """Return the form of an attention, or why there is none."""
    mix = node.op.mix
    score, similarity = mix.score, mix.similarity
    builder = _Builder(graph)
    try:
        if similarity is not None:
            scale = number(mix.scale, similarity)
            score = substitute(score, {"s": fold(Binary("*", scale, similarity))})
            score = builder.visit(score, meets=True)
        else:
            score = builder.visit(score, meets=False)
        form = KernelForm(
            score=score,
            mask=builder.visit(mix.mask, meets=False),
            normalizer=mix.normalize.mapped(lambda expr: builder.visit(expr, meets=False)),
            scale=1.0 if similarity is not None else mix.scale,
            query=builder.met[0] if builder.met else None,
            key=builder.met[1] if builder.met else None,
            sides=tuple(builder.sides),
        )
    except _NoForm as why:
        return str(why)
    if similarity is not None and not builder.met:
        return "queries and keys do not meet in a product"
    return form


class _NoForm(Exception):
    pass


@dataclass
class _Builder:
    graph: Graph
    met: tuple[Expr, Expr] | None = None
    sides: list[Side] = field(default_factory=list)

    def visit(self, expr: Expr, *, meets: bool) -> Expr:
        """Return an expression without vectors; `meets`: a product of both sides becomes s."""
        match expr:
            case Call(name) if name in MAP_FUNCTIONS:
                raise _NoForm(f"`{name}` looks at other pairs")
        if reduces(expr) and rank(self.graph, expr) == 0:
            along = sides(expr)
            if along <= {QUERY} or along == {KEY}:
                return self._side(expr, KEY if along == {KEY} else QUERY)
            pair = product(self.graph, expr)
            if pair is None:
                raise _NoForm(f"`{show(expr)}` is no product of a query and a key")
            if not meets or self.met not in (None, pair):
                raise _NoForm("queries and keys meet in a second product")
            self.met = pair
            return Name("s")
        return rebuild(expr, lambda each: self.visit(each, meets=meets))

    def _side(self, expr: Expr, at: str) -> Expr:
        places = {"i", "j", "n", "m"}
        if any(names(part) & places for part in _outside_of_streams(expr)):
            raise _NoForm(f"`{show(expr)}` reads positions")
        known = next((each for each in self.sides if each.expr == expr), None)
        if known is None:
            known = Side(f"side_{len(self.sides)}", expr, at)
            self.sides.append(known)
        return Index(Name(known.name), (Name("h"), Name(at)))


def _outside_of_streams(expr: Expr) -> list[Expr]:
    """Return the names of an expression that are no tokens of streams."""
    tokens = {
        id(item)
        for node in walk(expr)
        if isinstance(node, Index)
        for item in node.items
        if item in (Name("i"), Name("j"))
    }
    return [node for node in walk(expr) if isinstance(node, Name) and id(node) not in tokens]
