"""What expressions of a pair can read of a block: streams and tensors whose shape its text shows.

let t = x | linear(heads) | sigmoid        t[i, h] and t[j, h], numbers of a pair
let keep = (x | linear(1)) > 0             keep[j], a mask
param table[heads, 9] = 0                  table[h, clip(abs(i - j), 0, 9 - 1)]
"""

from __future__ import annotations

from ..grammar import syntax
from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Pipe, Unary
from .productions import Production

Body = tuple[syntax.Statement, ...]
_HEADS = Name("heads")


def reads(bodies: tuple[Body, ...]) -> tuple[tuple[str, Production], ...]:
    """Return what statements offer, as productions with their kinds; later bodies go before."""
    named: dict[str, syntax.Statement] = {
        each.name: each
        for body in bodies
        for each in body
        if hasattr(each, "name") and not isinstance(each, syntax.Update)
    }
    sides = tuple(at for at, name in (("i", "q"), ("j", "k")) if _of_x(named, name))
    found = []
    for name, each in named.items():
        match each:
            case syntax.Let(_, value):
                features = _features(value)
                kind = "keys" if isinstance(value, Compare) else "bias"
                places = tuple(at for at in sides if kind == "bias" or at == "j")
                if features is not None and places:
                    found.append((kind, Production(name, _either(name, places, features))))
            case syntax.Param(_, dims):
                found.append(("bias", Production(name, _tensor(name, dims))))
    return tuple(found)


def _of_x(named: dict[str, syntax.Statement], name: str) -> bool:
    """Say whether queries or keys run along the tokens of `x`, as far as the text shows it."""
    source = named.get("source")
    if name == "k" and isinstance(source, syntax.Setting) and source.value != Name("x"):
        return False
    made = named.get(name)
    return not isinstance(made, syntax.Setting) or _head(made.value) == Name("x")


def _head(expr: Expr) -> Expr | None:
    return expr.head if isinstance(expr, Pipe) else expr


def _features(expr: Expr) -> Expr | None:
    """Return the features of a stream of `x` without heads: `heads`, or 1; None for others."""
    match expr:
        case Pipe(Name("x"), stages):
            found: Expr | None = None
            for stage in stages:
                match stage:
                    case Call("linear", (features, *_)):
                        found = features
                    case Name(id) if id in FUNCTIONS and FUNCTIONS[id].arity == 1:
                        pass
                    case Call("shift" | "conv" | "running" | "scale"):
                        pass
                    case _:
                        return None
            return found if found in (_HEADS, Number(1)) else None
        case Compare((left, Number())):
            return _features(left)
        case Binary("+" | "-" | "*", left, Number()) | Binary("+" | "-" | "*", Number(), left):
            return _features(left)
        case Unary("-", operand):
            return _features(operand)
        case _:
            return None


def _either(name: str, places: tuple[str, ...], features: Expr) -> Expr:
    """Return `t[i, h]`, `t[j, h]`, or a choice of both."""
    head = (Name("h"),) if features == _HEADS else ()
    read = tuple(Index(Name(name), (Name(at), *head)) for at in places)
    return read[0] if len(read) == 1 else Call("choose", read)


def _tensor(name: str, dims: tuple[Expr, ...]) -> Expr:
    """Return what a tensor says of a pair: its head's number, by the distance in other places."""
    apart = Call("abs", (Binary("-", Name("i"), Name("j")),))
    items = [
        Name("h")
        if each == _HEADS
        else Call("clip", (apart, Number(0), Binary("-", each, Number(1))))
        for each in dims
    ]
    return Index(Name(name), tuple(items)) if items else Name(name)
