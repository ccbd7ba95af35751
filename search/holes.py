"""What a hole is, and which holes are wrong.

A hole is a call that stands where an expression would: it says what may be there. Nothing
here draws; `problems` says in one pass what no draw could ever repair.

    heads  = choose(4, 8, 16, weights = [1, 2, 1])
    mask   = causal and window(pow2(16..256))
    q      = x | linear | split | maybe(rms_norm)
    layers = each(4, choose(local, delta))
    mask   = causal and any(mask, depth = 2, weights = [window(4)])

`maybe(e)` may stand where leaving something out means something: as a setting, a list's item,
a stage, a named argument, or beside `and`, `or`, `+` and `*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..grammar import syntax
from ..grammar.diagnostics import Diagnostic, did_you_mean
from ..grammar.expr import NotConstant, Value, evaluate
from ..grammar.functions import HOLES
from ..grammar.show import show
from ..grammar.syntax import Binary, Call, Expr, Keyword, ListOf, Name, Number, Pipe, Range
from .productions import TEXTS

MAX_EACH = 4096
DEPTH, MAX_DEPTH = 2, 8  # of a hole of a kind: where it does not say, and at most
_BOTH_SIDES = ("and", "or", "+", "*")  # what stays is the other side
_RIGHT_SIDE = ("-", "/", "//", "**", "%")


def is_hole(expr: Expr) -> bool:
    """Say whether the expression itself is a hole; `each` repeats holes and is none."""
    return isinstance(expr, Call) and expr.function in HOLES


def contains_hole(expr: Expr) -> bool:
    return any(is_hole(node) for node in syntax.walk(expr))


def constant(expr: Expr) -> Value | None:
    """Return the number of an expression that reads nothing, else None."""
    try:
        return evaluate(expr, {})
    except NotConstant:
        return None


def powers(low: float, high: float) -> tuple[int, ...]:
    """Return the powers of two in a range, ends included."""
    return tuple(2**k for k in range(63) if low <= 2**k <= high)


def weights_of(call: Call) -> tuple[float, ...]:
    """Return the weights of a `choose` that `problems` has passed; empty where it has none."""
    for keyword in call.keywords:
        if keyword.name == "weights" and isinstance(keyword.value, ListOf):
            return tuple(float(constant(each) or 0) for each in keyword.value.items)
    return ()


# ── holes of a kind ──────────────────────────────────────────────────────────────────────


def open_kinds(expr: Expr) -> Iterator[Call]:
    """Yield the holes of a grammatical kind in an expression."""
    for node in syntax.walk(expr):
        if isinstance(node, Call) and node.function == "any":
            yield node


def kind_of(hole: Call) -> str:
    """Return the kind of an `any` that `problems` has passed."""
    (kind,) = hole.args
    assert isinstance(kind, Name)
    return kind.id


def depth_of(hole: Call) -> int:
    """Return how deep productions of an `any` may have parts that are drawn."""
    values = {each.name: each.value for each in hole.keywords}
    return int(constant(values["depth"]) or 0) if "depth" in values else DEPTH


def favoured(hole: Call) -> tuple[Call, ...]:
    """Return the productions that an `any` gives a weight: calls of their names."""
    for each in hole.keywords:
        if each.name == "weights" and isinstance(each.value, ListOf):
            return tuple(item for item in each.value.items if isinstance(item, Call))
    return ()


def inner(part: Call, hole: Call) -> Call:
    """Return a hole within a production of another: one less deep, of one kind weighed alike."""
    depth = Keyword("depth", Number(depth_of(hole) - 1, str(depth_of(hole) - 1)), hole.span)
    weights = tuple(each for each in hole.keywords if each.name == "weights")
    same = weights if kind_of(part) == kind_of(hole) else ()
    return replace(part, keywords=(depth, *same), span=hole.span)


# ── all expressions of a file ────────────────────────────────────────────────────────────


def expressions(item: syntax.Item | syntax.Statement) -> Iterator[tuple[Expr, bool]]:
    """Yield each expression of an item, and whether it may be left out altogether."""
    for owner, expr in syntax.expressions(item):
        yield expr, isinstance(owner, syntax.Setting) and expr is owner.value


# ── what is wrong ────────────────────────────────────────────────────────────────────────


def problems(file: syntax.File) -> list[Diagnostic]:
    """Return everything that is wrong with the holes of a file, used or not."""
    found: list[Diagnostic] = []
    for item in file.items:
        for expr, optional in expressions(item):
            found.extend(_misplaced(expr, optional))
            for node in syntax.walk(expr):
                if isinstance(node, Call) and (node.function in HOLES or node.function == "each"):
                    found.extend(_of_call(node))
    return found


def _of_call(call: Call) -> Iterator[Diagnostic]:
    match call.function:
        case "choose":
            yield from _of_choose(call)
        case "maybe":
            yield from _of_arguments(call, 1, "maybe(e)")
        case "each":
            yield from _of_each(call)
        case "any":
            yield from _of_any(call)
        case _:
            yield from _of_range(call)


def _of_arguments(call: Call, count: int, form: str) -> Iterator[Diagnostic]:
    if len(call.args) != count or call.keywords:
        label = f"{len(call.args)} given" if not call.keywords else ""
        yield Diagnostic(
            "L506", f"`{call.function}` has other arguments", call.span, label, f"write `{form}`"
        )


def _of_choose(call: Call) -> Iterator[Diagnostic]:
    if not call.args:
        yield Diagnostic(
            "L502", "`choose` has nothing to choose from", call.span, "", "write `choose(a, b, …)`"
        )
    seen: set[str] = set()
    for each in call.args:
        if (text := show(each)) in seen:
            yield Diagnostic(
                "L511",
                f"`{text}` stands here twice",
                each.span,
                "",
                "to prefer it, give `weights = [..]`",
            )
        seen.add(text)
    for keyword in call.keywords:
        if keyword.name != "weights":
            yield Diagnostic(
                "L506",
                f"`choose` has no setting `{keyword.name}`",
                keyword.span,
                "",
                did_you_mean(keyword.name, ["weights"], "it knows `weights = [..]`"),
            )
        else:
            yield from _of_weights(keyword.value, len(call.args))


def _of_weights(value: Expr, count: int) -> Iterator[Diagnostic]:
    items = value.items if isinstance(value, ListOf) else None
    if items is None or len(items) != count:
        label = f"{count} alternatives, {len(items) if items is not None else 'no'} weights"
        yield Diagnostic(
            "L503",
            "`weights` must be a list with one number for each alternative",
            value.span,
            label,
        )
        return
    numbers = [constant(each) for each in items]
    for each, number in zip(items, numbers, strict=True):
        if number is None or number < 0:
            yield Diagnostic("L503", "a weight is a number, zero or more", each.span)
    if all(number == 0 for number in numbers):
        yield Diagnostic("L503", "one weight at least must be more than zero", value.span)


def _of_any(call: Call) -> Iterator[Diagnostic]:
    kinds = [*TEXTS]
    if len(call.args) != 1 or not isinstance(call.args[0], Name):
        yield Diagnostic("L506", "`any` takes one kind", call.span, "", "write `any(mask)`")
    elif call.args[0].id not in kinds:
        have = ", ".join(f"`{each}`" for each in kinds)
        name, span = call.args[0].id, call.args[0].span
        help = did_you_mean(name, kinds, f"kinds are {have}")
        yield Diagnostic("L508", f"`{name}` is no kind of text", span, "", help)
    for keyword in call.keywords:
        match keyword.name, keyword.value:
            case "depth", value:
                depth = constant(value)
                if depth is None or depth not in range(MAX_DEPTH + 1):
                    yield Diagnostic(
                        "L506",
                        f"`depth` is a whole number from 0 to {MAX_DEPTH}",
                        value.span,
                        show(value),
                    )
            case "weights", value:
                yield from _of_favoured(value)
            case name, _:
                help = did_you_mean(name, ["depth", "weights"], "it knows `depth` and `weights`")
                message = f"`any` has no setting `{name}`"
                yield Diagnostic("L506", message, keyword.span, "", help)


def _of_favoured(value: Expr) -> Iterator[Diagnostic]:
    for each in value.items if isinstance(value, ListOf) else (value,):
        match each:
            case Call(_, (weight,), ()) if isinstance(value, ListOf):
                given = constant(weight)
                if given is None or given < 0:
                    yield Diagnostic("L503", "a weight is a number, zero or more", weight.span)
            case _:
                yield Diagnostic(
                    "L503",
                    "`weights` of a kind is a list of productions with their weights",
                    each.span,
                    "",
                    "write `weights = [window(4), sink(0)]`",
                )


def _of_range(call: Call) -> Iterator[Diagnostic]:
    if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], Range):
        yield Diagnostic(
            "L506",
            f"`{call.function}` takes one range",
            call.span,
            "",
            f"write `{call.function}(lo..hi)`",
        )
        return
    low, high = constant(call.args[0].low), constant(call.args[0].high)
    if low is not None and high is not None and (why := refusal(call.function, low, high)):
        code, message, label = why
        yield Diagnostic(code, message, call.args[0].span, label)


def refusal(function: str, low: Value, high: Value) -> tuple[str, str, str] | None:
    """Say why nothing can be drawn from a range, as (code, message, label); None if it can."""
    label = f"{low}..{high}"
    if function in ("integer", "pow2") and not (float(low).is_integer() and high == high // 1):
        return "L506", f"the ends of `{function}` are whole numbers", label
    if low > high:
        return "L501", "this range is empty", f"{label}, the first number is the larger one"
    if function == "pow2" and not powers(low, high):
        return "L504", "there is no power of two in this range", label
    if function == "loguniform" and low <= 0:
        return "L505", "`loguniform` must begin above zero", label
    return None


def _of_each(call: Call) -> Iterator[Diagnostic]:
    yield from _of_arguments(call, 2, "each(n, e)")
    if len(call.args) == 2:
        count = constant(call.args[0])
        if count is not None and not (float(count).is_integer() and 0 <= count <= MAX_EACH):
            label = f"{count}, the most is {MAX_EACH}"
            yield Diagnostic(
                "L509", "`each` repeats a whole number of times", call.args[0].span, label
            )


# ── where something may be left out ──────────────────────────────────────────────────────


def vanishes(expr: Expr) -> bool:
    """Say whether a draw may leave nothing of the expression."""
    match expr:
        case Call("maybe"):
            return True
        case Call("choose", args):
            return any(vanishes(each) for each in args)
        case Binary(op, left, right) if op in _BOTH_SIDES:
            return vanishes(left) and vanishes(right)
        case Pipe(None, stages):
            return all(vanishes(each) for each in stages)
        case _:
            return False


def _misplaced(expr: Expr, optional: bool) -> Iterator[Diagnostic]:
    if not optional and vanishes(expr):
        yield Diagnostic(
            "L507",
            "something has to stand here, with or without `maybe`",
            expr.span,
            "",
            "write `choose(e, …)` and say what stands here otherwise",
        )
        return
    for child, may in _places(expr, optional):
        yield from _misplaced(child, may)


def _places(expr: Expr, optional: bool) -> Iterator[tuple[Expr, bool]]:
    """Yield the direct subexpressions, and whether each may be left out."""
    match expr:
        case Call("choose" | "maybe", args):
            yield from ((each, optional) for each in args)
        case Call("each", (count, repeated)):
            yield from ((count, False), (repeated, True))
        case Call("any"):
            pass
        case Call(_, args, keywords):
            yield from ((each, False) for each in args)
            yield from ((each.value, True) for each in keywords)
        case ListOf(items):
            yield from ((each, True) for each in items)
        case Pipe(head, stages):
            if head is not None:
                yield head, False
            yield from ((each, True) for each in stages)
        case Binary(op, left, right):
            both = op in _BOTH_SIDES
            yield left, both
            yield right, both or op in _RIGHT_SIDE
        case _:
            yield from ((each, False) for each in syntax.children(expr))
