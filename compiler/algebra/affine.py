"""Expressions that are affine in states, as sums of products: the algebra behind `recurrences`.

    a * (S - b * outer(k, k @ S))    →    a · S  -  a b · outer(k, k @ S)

A value is per head: a number, a vector or a matrix. Products are kept apart into a number,
scalars, what scales rows and what scales columns, so that it does not matter how they were
written; sums are multiplied out as far as states stand in them, and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from ...grammar.expr import names, rebuild
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Expr, Index, Name, Number, Unary, children

BEFORE = "before "  # what a token's statements find in a state: `before S`; after them: `S`
READING = "reading "


class RefusedError(Exception):
    """What stands in the way of a form, in words."""


@dataclass(frozen=True, slots=True)
class Factor:
    expr: Expr
    below: bool = False  # it divides

    @property
    def order(self) -> tuple[bool, str]:
        return self.below, show(self.expr)


Factors = tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A state in a term, as it was `after` or before the token's statements."""

    name: str
    after: bool


@dataclass(frozen=True, slots=True)
class Read:
    """The vector `query @ state`, or `state @ query` where `turned`."""

    state: Held
    query: Factors
    turned: bool


@dataclass(frozen=True, slots=True)
class Term:
    """number · scalars · what it is made of, with factors along its rows and its columns.

    A vector has only rows. The core of a matrix may be a read that stands along the columns
    (the rows, where it is turned): outer(rows, columns · (query @ S)).
    """

    number: float = 1
    scalars: Factors = ()
    rows: Factors = ()
    columns: Factors = ()
    core: Held | Read | None = None

    def times(self, other: Term) -> Term:
        """Multiply; at most one of the two has a core."""
        return Term(
            self.number * other.number,
            _sorted(self.scalars + other.scalars),
            _sorted(self.rows + other.rows),
            _sorted(self.columns + other.columns),
            self.core or other.core,
        )

    def turned(self) -> Term:
        """Lay a vector along the columns."""
        return replace(self, rows=(), columns=self.rows)


def _sorted(factors: Factors) -> Factors:
    return tuple(sorted(factors, key=lambda each: each.order))


def product_of(number: float, *factors: Factors) -> Expr:
    """Write a product: numbers first, then what multiplies, then what divides."""
    sign, number = (-1, -number) if number < 0 else (1, number)
    whole = int(number) if float(number).is_integer() and abs(number) < 1e15 else number
    made: Expr | None = None if number == 1 else Number(whole, repr(whole))
    every = [each for group in factors for each in group]
    for each in every:
        if not each.below:
            made = each.expr if made is None else Binary("*", made, each.expr)
    for each in every:
        if each.below:
            made = Binary("/", Number(1, "1") if made is None else made, each.expr)
    made = Number(1, "1") if made is None else made
    return Unary("-", made) if sign < 0 else made


def scale_apart(expr: Expr, rank: Callable[[Expr], int]) -> tuple[Expr | None, Expr]:
    """Return the numbers in a product, None where there are none, and the vector they scale."""
    match expr:
        case Unary("-", operand):
            scale, vector = scale_apart(operand, rank)
            return Number(-1, "-1") if scale is None else Unary("-", scale), vector
        case Binary("*", left, right) if rank(left) == 0 and rank(right):
            scale, vector = scale_apart(right, rank)
            return left if scale is None else Binary("*", left, scale), vector
        case Binary("*" | "/" as op, left, right) if rank(left) and rank(right) == 0:
            scale, vector = scale_apart(left, rank)
            return Binary(op, Number(1, "1") if scale is None else scale, right), vector
    return None, expr


def total_of(parts: Iterable[Expr]) -> Expr:
    """Write a sum, in one order whatever the order of its parts."""
    ordered = sorted(parts, key=lambda each: (isinstance(each, Unary), show(each)))
    made = ordered[0] if ordered else Number(0, "0")
    for each in ordered[1:]:
        if isinstance(each, Unary):
            made = Binary("-", made, each.operand)
        else:
            made = Binary("+", made, each)
    return made


# ── sums ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Affine:
    """Finds the sums; what is read of matrices gets a name and a place in `readings`.

    `ranks` says how many dimensions names have, `matrices` which states are matrices.
    """

    ranks: dict[str, int]
    matrices: frozenset[str]
    readings: dict[tuple[Held, Expr, bool], str] = field(default_factory=dict)

    # shapes

    def rank(self, expr: Expr) -> int:
        """Return how many dimensions a value has per head."""
        match expr:
            case Name(id):
                return self.ranks.get(id, 0)
            case Index(Name(id), items):
                return self.ranks[id] - len(items)
            case Call("outer" | "diag"):
                return 2
            case Call("solve"):
                return 1
            case Call("dot" | "sum" | "mean" | "norm"):
                return 0
            case Binary("@", left, right):
                return self.rank(left) + self.rank(right) - 2
            case _:
                return max((self.rank(each) for each in children(expr)), default=0)

    def _matrices(self, expr: Expr) -> set[Held]:
        """Return the matrix states that an expression reads."""
        found = set()
        for name in names(expr):
            state = name.removeprefix(BEFORE)
            if state in self.matrices:
                found.add(Held(state, after=name == state))
        return found

    # reading matrices

    def extracted(self, expr: Expr, own: str = "") -> Expr:
        """Return an expression with every product with a matrix under a name of its own."""
        touched = {each for each in self._matrices(expr) if each.name != own}
        if not touched:
            return expr
        if isinstance(expr, Binary) and expr.op == "@" and self.rank(expr) == 1:
            vector, matrix = (expr.left, expr.right)
            if self.rank(vector) == 2:
                vector, matrix = matrix, vector
            if all(each.name != own for each in self._matrices(expr)) and self._matrices(matrix):
                plain = self.extracted(vector)
                inner = (
                    replace(expr, left=plain)
                    if vector is expr.left
                    else (replace(expr, right=plain))
                )
                return total_of(self._readable(term) for term in self.terms(inner, ""))
        if isinstance(expr, Name):
            raise RefusedError(
                f"`{self.plain(expr)}` is read other than by a product with a vector"
            )
        return rebuild(expr, lambda each: self.extracted(each, own))

    def _readable(self, term: Term) -> Expr:
        """Write a vector term, its read of a matrix under a name."""
        factors: list[Factors] = [term.scalars, term.rows]
        if isinstance(term.core, Read):
            factors.append((Factor(Name(self._reading(term.core))),))
        return product_of(term.number, *factors)

    def _reading(self, read: Read) -> str:
        query = product_of(1, read.query)
        key = (read.state, query, read.turned)
        if key not in self.readings:
            name = f"{READING}{len(self.readings) + 1}"
            self.readings[key] = name
            self.ranks[name] = 1
        return self.readings[key]

    # what is affine in states

    def terms(self, expr: Expr, own: str) -> list[Term]:
        """Return an expression as a sum; `own` is the vector or number that is looked for."""
        if not self._states(expr, own):
            return self._free(expr)
        match expr:
            case Name(id):
                return [Term(core=Held(id.removeprefix(BEFORE), not id.startswith(BEFORE)))]
            case Unary("-", operand):
                return [replace(each, number=-each.number) for each in self.terms(operand, own)]
            case Binary("+" | "-" as op, left, right):
                self._same_shape(expr, left, right)
                below = self.terms(Unary("-", right) if op == "-" else right, own)
                return merged([*self.terms(left, own), *below])
            case Binary("*", left, right):
                return self._distributed(expr, self.terms(left, own), self.terms(right, own))
            case Binary("/", left, right) if not self._states(right, own):
                return self._distributed(expr, self.terms(left, own), self._divided(right))
            case Call("outer", (left, right)):
                rows = [self._upright(each, expr) for each in self.terms(left, own)]
                columns = [self._turned(each) for each in self.terms(right, own)]
                return self._distributed(expr, rows, columns)
            case Binary("@", left, right) if self.rank(expr) == 1:
                turned = self.rank(left) == 2
                vector, matrix = (right, left) if turned else (left, right)
                return merged(
                    self._contracted(one, two, turned, expr)
                    for one, two in product(self.terms(vector, own), self.terms(matrix, own))
                )
        raise RefusedError(f"`{self.plain(expr)}` is not affine in the state")

    def _same_shape(self, expr: Expr, left: Expr, right: Expr) -> None:
        ranks = {self.rank(left), self.rank(right)}
        if 2 in ranks and len(ranks) > 1:
            raise RefusedError(
                f"`{self.plain(expr)}` adds what is not a matrix to every row or column"
            )

    def _states(self, expr: Expr, own: str) -> bool:
        """Say whether an expression reads a matrix, or the state looked for."""
        return bool(self._matrices(expr)) or f"{BEFORE}{own}" in names(expr)

    def _distributed(self, expr: Expr, left: list[Term], right: list[Term]) -> list[Term]:
        """Multiply two sums; what is read of a matrix is a vector that scales no rows."""
        if isinstance(expr, Binary) and self.rank(expr) == 2:
            for side, terms in ((expr.left, left), (expr.right, right)):
                if self.rank(side) == 1 and any(each.core is not None for each in terms):
                    raise RefusedError(
                        f"`{self.plain(expr)}` scales rows by what is read of states"
                    )
        if any(one.core and two.core for one, two in product(left, right)):
            raise RefusedError(f"`{self.plain(expr)}` multiplies what is read of states")
        return merged(one.times(two) for one, two in product(left, right))

    def _turned(self, term: Term) -> Term:
        """Lay the second vector of an outer product along the columns."""
        if isinstance(term.core, Read) and term.core.turned:
            raise RefusedError("a state is read from both sides")
        return term.turned()

    def _upright(self, term: Term, expr: Expr) -> Term:
        if isinstance(term.core, Read) and not term.core.turned:
            raise RefusedError(f"`{self.plain(expr)}` writes what it reads as a key")
        return term

    def _contracted(self, vector: Term, matrix: Term, turned: bool, expr: Expr) -> Term:
        if vector.core is not None:
            raise RefusedError(f"`{self.plain(expr)}` multiplies what is read of states")
        inner, outer = (matrix.columns, matrix.rows) if turned else (matrix.rows, matrix.columns)
        met = _sorted(vector.rows + inner)
        base = Term(vector.number * matrix.number, vector.scalars + matrix.scalars, outer)
        match matrix.core:
            case Held() as state:
                return replace(base, scalars=_sorted(base.scalars), core=Read(state, met, turned))
            case Read() as read if read.turned != turned:
                raise RefusedError(f"`{self.plain(expr)}` reads what was read of states")
            case core:
                if not (vector.rows and inner):
                    raise RefusedError(f"`{self.plain(expr)}` is not a product of two vectors")
                one, two = sorted((product_of(1, vector.rows), product_of(1, inner)), key=show)
                dot = Factor(Call("dot", (one, two)))
                return replace(base, scalars=_sorted((*base.scalars, dot)), core=core)

    def _free(self, expr: Expr) -> list[Term]:
        """Return an expression without states as products; a sum of vectors is one factor."""
        match expr:
            case Number(value):
                return [Term(float(value))]
            case Unary("-", operand):
                return [replace(each, number=-each.number) for each in self._free(operand)]
            case Binary("+" | "-" as op, left, right) if self.rank(expr) == 2:
                self._same_shape(expr, left, right)
                below = self._free(Unary("-", right) if op == "-" else right)
                return merged([*self._free(left), *below])
            case Binary("*", left, right):
                return self._distributed(expr, self._free(left), self._free(right))
            case Binary("/", left, right) if self.rank(right) < 2:
                return self._distributed(expr, self._free(left), self._divided(right))
            case Call("outer", (left, right)):
                turned = [each.turned() for each in self._free(right)]
                return self._distributed(expr, self._free(left), turned)
        rank = self.rank(expr)
        if rank == 2:
            raise RefusedError(f"`{self.plain(expr)}` is a matrix, and no outer product")
        factor = (Factor(canonical(expr)),)
        return [Term(rows=factor) if rank else Term(scalars=factor)]

    def _divided(self, expr: Expr) -> list[Term]:
        """Return the one product that 1 / expr is, of a number or vector without states."""
        found = self._free(expr)
        if not found:
            raise RefusedError("it divides by 0")
        return [inverse(each) for each in found]

    def plain(self, expr: Expr) -> str:
        """Write an expression as it stood in the statement."""
        marked: dict[str, Expr] = {name: Name(name.removeprefix(BEFORE)) for name in names(expr)}
        for (state, query, turned), name in self.readings.items():
            matrix = Name(state.name)
            marked[name] = Binary("@", matrix, query) if turned else Binary("@", query, matrix)
        return show(inlined(expr, marked))


def flipped(term: Term) -> Term:
    """Return a term of the transposed matrix."""
    return replace(term, rows=term.columns, columns=term.rows)


def inverse(term: Term) -> Term:
    """Return 1 / term."""

    def below(factors: Factors) -> Factors:
        return tuple(Factor(each.expr, not each.below) for each in factors)

    return Term(1 / term.number, below(term.scalars), below(term.rows), below(term.columns))


def merged(terms: Iterable[Term]) -> list[Term]:
    """Add up the terms that differ by a number alone, and drop what is nothing."""
    found: dict[Term, float] = {}
    for each in terms:
        key = replace(each, number=1)
        found[key] = found.get(key, 0) + each.number
    return [replace(key, number=number) for key, number in found.items() if number != 0]


def canonical(expr: Expr) -> Expr:
    """Write what commutes in one order."""
    expr = rebuild(expr, canonical)
    match expr:
        case Binary("+" | "*" as op, left, right) if show(right) < show(left):
            return Binary(op, right, left)
    return expr


def inlined(expr: Expr, scope: Mapping[str, Expr]) -> Expr:
    """Put expressions in place of names; an index reads a tensor, not a name of the mixer."""
    match expr:
        case Name(id):
            return scope.get(id, expr)
        case Index():
            return expr
    return rebuild(expr, lambda each: inlined(each, scope))
