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
the order of their axes; the batch axis is implied. `obstacle` says, in words fit for
`headloom explain`, why a kernel cannot carry a spec.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..grammar.expr import calls
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


def learned_reads(spec: Attend) -> dict[str, Index | Name]:
    """Return where each differentiable tensor is read outside the mask (the last read)."""
    return {
        tensor.name: read
        for part, expr, _ in spec.parts()
        if part != "mask"
        for tensor, read in reads(expr, spec.tensors)
        if tensor.differentiable
    }


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
    if not math.isfinite(spec.scale):
        return "the scale is not a finite number"
    for part, expr, allowed in spec.parts():
        for problem in _problems(expr, allowed, spec):
            return f"the {part} {problem}"
    return next(_untraceable(spec), None)


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
                yield from _bad_index(known[name], items, spec)
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


def _bad_index(tensor: Tensor, items: tuple[Expr, ...], spec: Attend) -> Iterator[str]:
    if len(items) != len(tensor.shape):
        yield f"indexes `{tensor.name}` {len(items)} times; it has {len(tensor.shape)} axes"
    for item, size in zip(items, tensor.shape, strict=False):
        if not is_whole(item, spec) or calls(item, "floor"):
            yield f"indexes `{tensor.name}` by what is not a whole number"
        if isinstance(item, Number) and isinstance(size, int) and not 0 <= item.value < size:
            yield f"indexes `{tensor.name}` by {item.value}; its size there is {size}"


def _untraceable(spec: Attend) -> Iterator[str]:
    """Yield the learned tensors whose gradients are not row or column sums."""
    first = learned_reads(spec)
    for part, expr, _ in spec.parts():
        for tensor, read in reads(expr, spec.tensors):
            if not tensor.differentiable or part == "mask":
                continue
            indices = index_names(read)
            if read != first[tensor.name]:
                yield f"the learned tensor `{tensor.name}` is read with different indices"
            if not set(indices) <= {"h", "i", "j"} or {"i", "j"} <= set(indices):
                yield (
                    f"the gradient of `{tensor.name}` is no sum over rows or columns: "
                    "a learned tensor may be indexed by h and i, or by h and j, only"
                )
            if len(set(indices)) < len(indices):
                yield f"the learned tensor `{tensor.name}` is indexed twice by one name"
