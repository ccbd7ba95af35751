"""Which side of a pair an expression looks at, and products of the two sides.

norm(q) * norm(k)       norm(q) reads the query alone, norm(k) the key alone
dot(q * w, k)           a product: (q * w, k)
sum(q * w * k)          the same product
sum(abs(q - k))         both sides at once, and no product
"""

from __future__ import annotations

from ...grammar.expr import names
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.syntax import POOLED, Binary, Call, Expr, Index, Name, Number, children, walk
from .graph import Graph, Node
from .operations import Attend, TensorRead

QUERY, KEY, PAIR = "i", "j", "pair"
_OF_PAIRS = frozenset(("s", "p", "seen", "sum", "tau"))  # what stands for pairs or rows as it is


def sides(expr: Expr) -> frozenset[str]:
    """Return what an expression depends on: `i`, `j`, and `pair` where it is of pairs as such."""
    found: set[str] = set()
    streams = {id(node.base) for node in walk(expr) if isinstance(node, Index)}
    for node in walk(expr):
        if isinstance(node, Name):
            found |= {node.id} & {QUERY, KEY}
            found |= {QUERY} if node.id == "o" and id(node) not in streams else set()
            found |= {PAIR} if node.id in _OF_PAIRS else set()
        if isinstance(node, Call) and node.function in MAP_FUNCTIONS:
            found.add(PAIR)
    return frozenset(found)


def is_pooled(read: Index) -> bool:
    """Say whether an index reads a pooled stream, at a token that the pair's place makes."""
    at = next((item for item in read.items if names(item) & {QUERY, KEY}), None)
    return isinstance(at, Call) and at.function == POOLED


def at_token(read: Index) -> Expr:
    """Return where the tokens of a stream are read: `i`, `j`, or an expression of `j`."""
    return next(item for item in read.items if names(item) & {QUERY, KEY})


def token(read: Index) -> str:
    """Return on which side a stream is read, i or j."""
    return QUERY if QUERY in names(at_token(read)) else KEY


def read_along(graph: Graph, node: Node[Attend], side: str) -> tuple[str, ...]:
    """Return the streams that an attention's expressions read on one side, i or j."""
    read = {
        each.base.id
        for expr in node.op.exprs
        for each in walk(expr)
        if isinstance(each, Index) and isinstance(each.base, Name)
        if not graph.is_tensor(each.base.id) and not is_pooled(each) and token(each) == side
    }
    return tuple(name for name in node.inputs if name in read)


def reduces(expr: Expr) -> bool:
    """Say whether an expression itself brings vectors to less."""
    match expr:
        case Call("sum" | "mean" | "norm" | "dot") | Binary("@"):
            return True
    return False


def rank(graph: Graph, expr: Expr) -> int:
    """Return how many dimensions an expression's value has: 0 for a number, 1 for a vector."""
    match expr:
        case Name("o"):  # what a query has mixed
            return 1
        case Number() | Name() | Call("sum" | "mean" | "norm" | "dot"):
            return 0
        case Index(Name(name), items):
            made = graph.node(name)
            axes = len(made.dims) - (0 if isinstance(made.op, TensorRead) else 1)
            return 0 if name == "doc" else axes - len(items)
        case Call("outer"):
            return 2
        case Binary("@", left, right):
            return rank(graph, left) + rank(graph, right) - 2
        case _:
            return max((rank(graph, each) for each in children(expr)), default=0)


def product(graph: Graph, expr: Expr) -> tuple[Expr, Expr] | None:
    """Return the vectors of query and key whose product an expression is, if it is one."""
    match expr:
        case Call("dot", (left, right)) | Binary("@", left, right):
            parts = [left, right]
        case Call("sum", (arg,)):
            parts = _factors(arg)
        case _:
            return None
    queries = [each for each in parts if sides(each) <= {QUERY}]
    keys = [each for each in parts if sides(each) == {KEY}]
    if len(queries) + len(keys) < len(parts) or not queries or not keys:
        return None
    query, key = _times(queries), _times(keys)
    if rank(graph, query) != 1 or rank(graph, key) != 1 or sides(query) != {QUERY}:
        return None
    return query, key


def of_table(graph: Graph, expr: Expr) -> tuple[Expr, Index] | None:
    """Return the query's vector and the row of a tensor whose product an expression is, if any.

    Which row, the pair says: `dot(q[h, i], table[clip(i - j, 0, 8)])`, also `table[h, …]`.
    """
    match expr:
        case Call("dot", (left, right)):
            pass
        case _:
            return None
    for query, row in ((left, right), (right, left)):
        if not isinstance(row, Index) or not isinstance(row.base, Name) or not row.items:
            continue
        if not graph.is_tensor(row.base.id) or sides(query) != {QUERY} or rank(graph, query) != 1:
            continue
        *first, at = row.items
        of_pairs = PAIR in sides(at) or {QUERY, KEY} <= sides(at)
        if of_pairs and first in ([], [Name("h")]) and rank(graph, row) == 1:
            return query, row
    return None


def makes_vectors(graph: Graph, expr: Expr) -> bool:
    """Say whether a vector is made for every pair on the way to an expression's value."""
    if product(graph, expr) is not None:
        return False
    if (met := of_table(graph, expr)) is not None:
        return makes_vectors(graph, met[1].items[-1])
    if rank(graph, expr) > 0 and {QUERY, KEY} <= sides(expr):
        return True
    return any(makes_vectors(graph, each) for each in children(expr))


def _factors(expr: Expr) -> list[Expr]:
    match expr:
        case Binary("*", left, right):
            return [*_factors(left), *_factors(right)]
        case _:
            return [expr]


def _times(factors: list[Expr]) -> Expr:
    done, *rest = factors
    for each in rest:
        done = Binary("*", done, each)
    return done
