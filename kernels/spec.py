"""What a pairwise kernel computes, as data: the contract between compiler and kernels.

    ALiBi in a causal window of 256, eight heads of 64:

    Attend(
        score=parse_expression("s - slope[h] * abs(i - j)"),
        mask=parse_expression("0 <= i - j < 256"),
        exponential=True,
        scale=0.125,
        tensors=(Tensor("slope", (8,), batched=False, differentiable=False),),
        reach=Reach(back=255, ahead=0, prefix=0),
    )

Expressions read `s i j h n m seen` (and `sum` in a denominator) and the tensors, indexed in
the order of their axes; the batch axis is implied. An index is any expression: it is rounded
down, and what lies outside takes the nearest end (`places`). Any read of a learned tensor has
a gradient, whatever its index (`shares`). `obstacle` says, in words fit for `headloom
explain`, why a kernel cannot carry a spec.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, walk

TRUE = Name("true")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that hooks read. An axis of size 'n' or 'm' runs along the queries or keys."""

    name: str
    shape: tuple[int | str, ...]
    batched: bool = False
    differentiable: bool = False


@dataclass(frozen=True, slots=True)
class Reach:
    """Visible implies `j < prefix or -ahead <= i - j <= back`; None is unbounded."""

    back: int | None = None
    ahead: int | None = None
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Attend:
    """One attention: o[i] = Σ_j p[i, j] v[j] over the visible keys.

    Exponential: p = exp(s) / (Σ exp(s) + exp(extra)), where `extra` None is plain softmax.
    Otherwise the ratio p = numerator(s) / denominator(sum), where a denominator of None is 1.

    `lse` asks for the logarithm of the exponential form's denominator beside o, `entropy` for
    -Σ_j p log p; both are [b, heads, n] in float32. `heads` is how many there are, where that
    is known: without it an axis that is read by `h` alone is taken to have one place for each.
    """

    score: Expr
    mask: Expr = TRUE
    exponential: bool = True
    extra: Expr | None = None
    numerator: Expr | None = None
    denominator: Expr | None = None
    scale: float = 1.0
    tensors: tuple[Tensor, ...] = ()
    reach: Reach = Reach()
    heads: int | None = None
    lse: bool = False
    entropy: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """The row statistics that are returned beside o, in their order."""
        return ("lse",) * self.lse + ("entropy",) * self.entropy

    def parts(self) -> Iterator[tuple[str, Expr, frozenset[str]]]:
        """Yield each expression with what it is called and the names it may read."""
        yield "score", self.score, _PAIR
        yield "mask", self.mask, _PAIR - {"s", "seen"}
        if self.extra is not None:
            yield "added term", self.extra, _ROW
        if self.numerator is not None:
            yield "numerator", self.numerator, _PAIR
        if self.denominator is not None:
            yield "denominator", self.denominator, _ROW | {"sum"}


_PAIR = frozenset({"s", "h", "i", "j", "n", "m", "seen", "true", "false"})
_ROW = _PAIR - {"s", "j"}
_WHOLE_NAMES = frozenset({"h", "i", "j", "n", "m", "true", "false"})
_KEEP_WHOLE = frozenset({"min", "max", "abs", "clip", "relu", "detach"})


def reads(expr: Expr, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, Index | Name]]:
    """Return each different read of a tensor; one without axes is read by its bare name."""
    known = {tensor.name: tensor for tensor in tensors}
    found: list[tuple[Tensor, Index | Name]] = []
    for node in walk(expr):
        match node:
            case Index(Name(name)) if name in known:
                found.append((known[name], node))
            case Name(name) if name in known and not known[name].shape:
                found.append((known[name], node))
    return list(dict.fromkeys(found))


def index_names(read: Index | Name) -> tuple[str, ...]:
    """Return the names that index a tensor: ('i', 'h') for `t[i, h]`."""
    items = read.items if isinstance(read, Index) else ()
    return tuple(item.id if isinstance(item, Name) else "" for item in items)


def counts_seen(spec: Attend) -> bool:
    """Say whether any expression reads the number of visible keys."""
    return any(Name("seen") in list(walk(expr)) for _, expr, _ in spec.parts())


def is_whole(expr: Expr, spec: Attend) -> bool:
    """Say whether an expression may be a whole number on the device."""
    match expr:
        case Number(value):
            return isinstance(value, int)
        case Name(id):
            return id in _WHOLE_NAMES
        case Index(Name(id)):
            return not any(t.name == id and t.differentiable for t in spec.tensors)
        case Unary(_, operand):
            return is_whole(operand, spec)
        case Compare() | Call("ispow2") | Binary("and" | "or"):
            return True
        case Binary("/"):
            return False
        case Binary("**", base, exponent):
            positive = isinstance(exponent, Number) and exponent.value >= 0
            return positive and is_whole(base, spec) and is_whole(exponent, spec)
        case Binary(_, left, right):
            return is_whole(left, spec) and is_whole(right, spec)
        case Call("where", (_, *branches)):
            return all(is_whole(branch, spec) for branch in branches)
        case Call(function, args) if function in _KEEP_WHOLE:
            return all(is_whole(arg, spec) for arg in args)
        case _:
            return False


def obstacle(spec: Attend) -> str | None:
    """Return why no pairwise kernel can carry the spec, or None."""
    if spec.exponential and (spec.numerator is not None or spec.denominator is not None):
        return "an exponential normaliser has no numerator or denominator of its own"
    if not spec.exponential and (spec.numerator is None or spec.extra is not None):
        return "a ratio needs a numerator and takes no added term"
    if not spec.exponential and spec.lse:
        return "a log-sum-exp is returned by an exponential normaliser only"
    if not spec.exponential and spec.entropy:
        return "an entropy is returned by an exponential normaliser only"
    if not math.isfinite(spec.scale):
        return "the scale is not a finite number"
    for part, expr, allowed in spec.parts():
        for problem in _problems(expr, allowed, spec):
            return f"the {part} {problem}"
    return None


def _problems(expr: Expr, allowed: frozenset[str], spec: Attend) -> Iterator[str]:
    known = {tensor.name: tensor for tensor in spec.tensors}
    bases = {id(node.base) for node in walk(expr) if isinstance(node, Index)}
    for node in walk(expr):
        match node:
            case Name(id=name) if name in known:
                if id(node) not in bases and known[name].shape:
                    yield f"reads `{name}` without an index"
            case Name(id=name):
                if name not in allowed:
                    yield f"reads `{name}`, which no kernel has there"
            case Index(Name(name), items) if name in known:
                if len(items) != (axes := len(known[name].shape)):
                    yield f"indexes `{name}` {len(items)} times; it has {axes} axes"
            case Call(function, args, ()) if function in FUNCTIONS:
                if len(args) != FUNCTIONS[function].arity:
                    yield f"calls `{function}` with {len(args)} arguments"
            case Binary("//" | "%" as op, left, right):
                if not (is_whole(left, spec) and is_whole(right, spec)):
                    yield f"uses `{op}` on numbers that are not whole"
            case Binary("**", Number(value) | Unary("-", Number(value)) as base, exponent):
                negative = isinstance(base, Unary) or value <= 0
                if negative and not isinstance(exponent, Number):
                    yield "raises a number that is not positive to a varying power"
            case Binary("@"):
                yield "uses `@`, which is no scalar operation"
            case Number() | Unary() | Binary() | Compare():
                pass
            case _:
                yield f"holds a {type(node).__name__.lower()}, which is no scalar expression"
