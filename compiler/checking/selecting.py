"""`select`: which of the visible keys a query reads, by content.

select = top(8, dot(q[h, i], kb[h, j // 64]), size = 64, always = blocks(64))

top(count, e)       the groups with the best scores        above(threshold, e)   all above it
mass(share, e)      the fewest whose softmax reaches it    random(count)         without a score
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import FALSE, TRUE, fold, names, rebuild, substitute
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.show import show
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, Index, Name, Number, children, walk
from ..algebra.masks import extent
from ..facts.later import incomplete
from ..model import Mixing, Pairwise, Select, elsewhere, is_map_elsewhere, there
from .depth import Found, place_of
from .library import bind
from .scalars import Axes, resolve
from .scope import Scope

KINDS = {"top": "count", "above": "threshold", "mass": "share", "random": "count"}
_SHARES = ("head", "kv_head", "layer")
_WITHIN = ("max", "sum", "mean", "lse")
_OPTIONS: dict[str, Expr] = {
    "size": Number(1), "rows": Number(1), "per": Name("head"), "always": FALSE,
    "counted": FALSE, "among": TRUE, "within": Name("none"),
}  # fmt: skip


def resolve_select(scope: Scope, expr: Expr, axes: Axes, mask: Expr) -> Select | None:
    """Return a selection under a mask with every name resolved; None for `none` (L241)."""
    if expr == Name("none"):
        return None
    if isinstance(expr, syntax.Attribute) and place_of(expr) is not None:
        return _elsewhere(scope, expr, axes, mask)
    kind = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if not isinstance(expr, Call) or kind not in KINDS:
        raise error(
            "L241",
            "this is no selection",
            expr.span,
            "",
            did_you_mean(kind, KINDS)
            or "use `top(count, e)`, `above(threshold, e)`, `mass(share, e)` or `random(count)`",
        )
    seeds: dict[str, Expr | None] = {"seed": Number(0)} if kind == "random" else {"e": None}
    params: dict[str, Expr | None] = {KINDS[kind]: None, **seeds, **_OPTIONS}
    taken = tuple(syntax.Parameter(name, default) for name, default in params.items())
    values = bind(kind, taken, expr, expr.span)
    amount = _amount(scope, kind, values[KINDS[kind]])
    size = scope.size(values["size"], f"`size` of `{kind}`")
    rows = scope.size(values["rows"], f"`rows` of `{kind}`")
    within = _word(values["within"], ("none", *_WITHIN), "within").removeprefix("none")
    share = _share(scope, values["per"], axes)
    counted = _word(values["counted"], ("true", "false"), "counted") == "true"
    always = resolve(scope, values["always"], "mask", axes)
    among = resolve(scope, values["among"], "mask", axes)
    given = values["e"] if kind != "random" else _noise(scope, values["seed"], size, rows)
    score = resolve(scope, given, "select", axes)
    span = given.span if kind != "random" else expr.span
    if not within and (why := _differs(score, size, rows)) is not None:
        raise error(
            "L241",
            "the score differs within a group",
            span,
            why,
            "read what is pooled of a group, or say `within = max` (or sum, mean, lse)",
        )
    kind = "top" if kind == "random" else kind
    chosen = Select(kind, amount, score, size, rows, share, always, counted, among, within,
                    _by_heads(score))  # fmt: skip
    _looks_back(scope, chosen, axes, mask, span)
    return chosen


def _amount(scope: Scope, kind: str, expr: Expr) -> float:
    if KINDS[kind] == "count":
        return scope.size(expr, f"`count` of `{kind}`")
    value = scope.number(expr, f"`{KINDS[kind]}` of `{kind}`")
    if kind == "mass" and not 0 < value <= 1:
        raise error("L219", "a share lies in 0 < share <= 1", expr.span, f"it is {value}")
    return float(value)


def _word(expr: Expr, words: tuple[str, ...], name: str) -> str:
    if not isinstance(expr, Name) or expr.id not in words:
        listed = ", ".join(f"`{each}`" for each in words)
        raise error("L222", f"`{name}` is one of {listed}", expr.span)
    return expr.id


def _share(scope: Scope, per: Expr, axes: Axes) -> int:
    heads = int(scope.numbers["heads"])
    return {"head": 1, "kv_head": axes.group, "layer": heads}[_word(per, _SHARES, "per")]


def _noise(scope: Scope, seed: Expr, size: int, rows: int) -> Expr:
    """Return a number of each group that looks drawn: of whole numbers, so the same everywhere."""
    start = int(scope.number(seed, "`seed` of `random`"))
    i, j = (Binary("//", Name(at), Number(by)) for at, by in (("i", rows), ("j", size)))
    done: Expr = Number(start)
    for part, by in ((Name("h"), 7919), (i, 104729), (j, 1299709)):
        scrambled = Binary("*", Binary("+", done, Binary("*", part, Number(by))), Number(48271))
        done = Binary("%", scrambled, Number(2147483647))
    return done


def _by_heads(score: Expr) -> bool:
    """Say whether a score is another for each head."""
    for node in walk(score):
        if isinstance(node, Name) and node.id in ("h", "s"):
            return True
        if isinstance(node, Call) and node.function in MAP_FUNCTIONS:
            return True
    return False


def _differs(score: Expr, size: int, rows: int) -> str | None:
    """Say what of a score differs within a group of keys or rows, if anything."""
    for place, by in (("j", size), ("i", rows)):
        if by > 1 and (part := _differing(score, place, by)) is not None:
            return f"`{show(part)}` of {by} {'keys' if place == 'j' else 'queries'}"
    return None


def _differing(expr: Expr, place: str, by: int) -> Expr | None:
    """Return a part of an expression that is not the same at all tokens of a group."""
    if place not in names(expr):
        return next((node for node in walk(expr) if node == Name("s")), None)
    if isinstance(expr, Call) and expr.function in MAP_FUNCTIONS:
        return expr
    if not any(isinstance(node, Index | Call) for node in walk(expr)):
        begins = Binary("*", Binary("//", Name(place), Number(by)), Number(by))
        return None if _same(expr, substitute(expr, {place: begins}), place, by) else expr
    if isinstance(expr, Index):
        return next((expr for each in expr.items if _differing(each, place, by)), None)
    return next((found for each in children(expr) if (found := _differing(each, place, by))), None)


def _same(one: Expr, other: Expr, place: str, by: int) -> bool:
    """Say whether two expressions of whole places are equal, at all of some groups."""
    import numpy as np

    from ..algebra.points import numbers

    at = np.arange(8 * by)
    rest = {each: np.int64(5) for each in ("i", "j", "h", "n", "m") if each != place}
    with np.errstate(all="ignore"):
        a, b = (numbers(fold(each), {**rest, place: at}) for each in (one, other))
    return bool(np.array_equal(np.broadcast_to(a, at.shape), np.broadcast_to(b, at.shape)))


def _looks_back(scope: Scope, select: Select, axes: Axes, mask: Expr, span: Span) -> None:
    """Check that a choice under a causal mask reads no token after its query (L242)."""
    if axes.queries != axes.keys or not extent(mask).causal:
        return
    sides = ("j",) if select.rows > 1 else ("i", "j")  # queries choose together, as was asked for
    free = select.candidates(mask)
    found = incomplete(select.score, free, scope.streams, sides, select.rows, mask)
    if found is None:
        return
    raise error(
        "L242",
        "this chooses by what comes after the query",
        span,
        f"`{show(found)}` reads a group that is not complete",
        f"say `always = blocks({select.size})`, or that it is complete in `among`",
    )


def _elsewhere(scope: Scope, expr: syntax.Attribute, axes: Axes, mask: Expr) -> Select:
    """Return the selection of a layer below, by the streams that it reads there (L225)."""

    def found(name: str) -> Found:
        stream = scope.elsewhere(syntax.Attribute(expr.base, name, expr.span))
        assert stream is not None
        return stream

    mixed = found("o")
    below = mixed.scope
    flow = below.streams["o"].flow if below is not None and "o" in below.streams else None
    mix = flow.mix if isinstance(flow, Mixing) else None
    select = mix.select if isinstance(mix, Pairwise) else None
    if expr.name != "select" or select is None or below is None:
        title = "" if below is None else f"it is `{below.title}`"
        raise error(
            "L225", "that layer chooses no keys", expr.span, title, "give it a `select`"
        )  # fmt: skip
    assert isinstance(flow, Mixing)
    assert isinstance(mix, Pairwise)
    read = {
        node.base.id
        for each in select.exprs
        for node in walk(each)
        if isinstance(node, Index) and isinstance(node.base, Name) and node.base.id != "doc"
    }
    passed = {each for each in read if elsewhere(each) and not is_map_elsewhere(each)}
    own = sorted(each for each in read - passed if "." in each or each not in below.streams)
    heads, why = int(scope.numbers["heads"]), ""
    if flow.heads != heads and select.share < flow.heads:
        why = f"heads = {heads}, and {flow.heads} in `{below.title}`"
    elif (flow.queries, flow.keys) != (axes.queries, axes.keys):
        why = f"{axes.queries} × {axes.keys} tokens, and {flow.queries} × {flow.keys} there"
    elif own:
        why = f"its score reads `{own[0]}`, which only `{below.title}` has"
    elif mix.mask != mask:
        why = f"mask = {show(mask)}, and {show(mix.mask)} in `{below.title}`"
    elif "s" in names(select.score):
        why = "its score reads the logits of that layer"
    if why:
        raise error("L225", "the choice of that layer is of other pairs", expr.span, why)
    streams = {name: found(name) for name in sorted(read - passed)}
    scope.inputs |= {each.name: each.shape for each in streams.values()}
    new = {name: each.name for name, each in streams.items()}
    for name in sorted(passed):  # of a layer below that one, whose choice it uses itself
        new[name] = _further(mixed.name, name)
        scope.inputs[new[name]] = below.inputs[name]
    share = heads if select.share == flow.heads else select.share
    return replace(select.mapped(lambda each: _renamed(each, new)), share=share, elsewhere=True)


def _further(way: str, name: str) -> str:
    """Return the name here of what is called `name` in the layer that `way` is a stream of."""
    one, other = elsewhere(way), elsewhere(name)
    assert one is not None
    assert other is not None
    (step, _), (further, path) = one, other
    return there(further if further >= 0 else step + further, path)


def _renamed(expr: Expr, new: Mapping[str, str]) -> Expr:
    """Return an expression of another layer as it is read here."""
    match expr:
        case Index(Name(id, span), items) if id in new:
            items = tuple(_renamed(each, new) for each in items)
            return Index(Name(new[id], span), items, expr.span)
    return rebuild(expr, lambda each: _renamed(each, new))
