"""`keep`: which keys stay held from query to query, and which are gone for good.

keep = top(8, running_queries(p), per = kv_head, always = window(4) or j < 2)

Of the keys that a query reads these stay: what is `always`, and the best of the others by a score.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import FALSE, calls, names
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.source import Span
from ...grammar.syntax import POOLED, Call, Expr, Index, Name, walk
from ...ops import Shape
from ..algebra.masks import extent, reads_others
from ..model import Keep, Pairwise, is_map_elsewhere
from .library import bind
from .scalars import Axes, resolve
from .scope import Scope

_WORDS = ("kv_head", "layer")


def resolve_keep(scope: Scope, expr: Expr, axes: Axes) -> Keep | None:
    """Return what is held, with every name resolved; None for `none` (L203, L222, L245)."""
    if expr == Name("none"):
        return None
    kind = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if not isinstance(expr, Call) or kind != "top":
        help = did_you_mean(kind, ["top"]) or "use `top(count, e)`"
        raise error("L245", "this does not say what is kept", expr.span, "", help)
    params: dict[str, Expr | None] = {
        "count": None, "e": None, "per": Name("kv_head"), "always": FALSE,
    }  # fmt: skip
    taken = tuple(syntax.Parameter(name, default) for name, default in params.items())
    values = bind(kind, taken, expr, expr.span)
    count = scope.number(values["count"], "`count` of `top`")
    if isinstance(count, bool) or count != int(count) or count < 0:
        message = "`count` of `top` must be a whole number from 0"
        raise error("L203", message, values["count"].span, f"it is {count}")
    per = values["per"]
    if not isinstance(per, Name) or per.id not in _WORDS:
        raise error("L222", "`per` is one of `kv_head`, `layer`", per.span)
    share = axes.group if per.id == "kv_head" else int(scope.numbers["heads"])
    always = resolve(scope, values["always"], "mask", axes)
    return Keep(int(count), resolve(scope, values["e"], "keep", axes), share, always)


def require_held(
    scope: Scope, mix: Pairwise, axes: Axes, operands: tuple[Shape, ...], span: Span
) -> None:
    """Check that what is held from query to query is all that an attention reads (L245)."""
    keep = mix.keep
    assert keep is not None
    reach = extent(mix.mask)
    if axes.queries != "n" or axes.keys != "n":
        why, help = f"{axes.queries} × {axes.keys} tokens", "its queries and keys are its tokens"
    elif not reach.causal or (reach.low > 0 and not reach.prefix):
        why, help = "its queries must see their own keys and none after them", "`mask = causal`"
    elif mix.select is not None or mix.carry is not None or mix.again is not None:
        names_ = {"select": mix.select, "carry": mix.carry, "v = v + o": mix.again}
        found = next(name for name, each in names_.items() if each is not None)
        why, help = f"`{found}` is set too", "keep one of them"
    elif (read := next(_elsewhere(mix, keep), "")) != "":
        why, help = f"{read}, which may be gone", "read the pair's own query and key"
    elif (other := _unlike(scope, mix, keep, operands)) is not None:
        why = f"{other}, and each of {operands[0].heads or 1} heads, {keep.share} at a time, " \
            "holds other keys"  # fmt: skip
        help = "say `per = layer`; sequences are apart without `document`"
    else:
        return
    raise error("L245", "this cannot be kept", span, why, help)


def _elsewhere(mix: Pairwise, keep: Keep) -> Iterator[str]:
    """Yield what expressions read beside a pair's own query and key."""
    for expr in mix.exprs:
        for node in walk(expr):
            if isinstance(node, Call) and node.function in MAP_FUNCTIONS:
                of_queries = node.function.endswith("_queries")
                if node.function == "running_queries" and expr == keep.score:
                    of_queries = False
                if of_queries or node.function in ("convolve", "coin"):
                    yield f"`{node.function}` reads other queries or keys"
            if isinstance(node, Index) and any(calls(item, POOLED) for item in node.items):
                yield "groups of tokens are read"
        if reads_others(expr):
            yield "a stream is read at other tokens"
        for name in sorted(names(expr)):
            if name in ("n", "m"):
                yield f"`{name}` counts all tokens"
            if is_map_elsewhere(name):
                yield "the map of a layer below is read"


def _unlike(scope: Scope, mix: Pairwise, keep: Keep, operands: tuple[Shape, ...]) -> str | None:
    """Say which stream along the keys has not the heads that hold keys of their own, if any."""
    choosers = (operands[0].heads or 1) // keep.share
    read = {"k": operands[1], "v": operands[2]}
    for expr in mix.exprs:
        for node in walk(expr):
            if not isinstance(node, Index) or not isinstance(node.base, Name):
                continue
            if "j" in {name for item in node.items for name in names(item)}:
                name = node.base.id
                shape = Shape("n", 1) if name == "doc" else scope.shape(name, node.span)
                if shape is not None and shape.tokens == "n":
                    read[name] = shape
    for name, shape in read.items():
        if choosers > 1 and (shape.heads or 1) % choosers:
            return f"`{name}` has {shape.heads or 'no'} heads"
    return None
