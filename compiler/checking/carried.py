"""`carry`: what each further token does to every key before it.

    carry = k - b * w * dot(w, k)     a vector of the key k, of w and b at the further token

It is an expression as mixers have them, for one key head; in it, k is the key.
"""

from __future__ import annotations

from dataclasses import replace

from ...grammar.diagnostics import error
from ...grammar.expr import names, substitute
from ...grammar.show import show
from ...grammar.source import Span
from ...grammar.syntax import Expr, Index, Name, Number, walk
from ..algebra.affine import Affine
from ..algebra.levels import NotAffineError, affine_parts
from ..algebra.masks import extent
from ..model import Pairwise, Read
from .mixers import Mixer
from .scalars import streams_read
from .scope import Scope
from .settled import finite, settled

KEY = "k"


def resolve_carry(scope: Scope, value: Expr, size: int) -> Expr | None:
    """Return what is done to keys of a size, None for nothing; it is linear in them (L235)."""
    if value == Name(KEY):
        return None
    numbers = {**scope.numbers, "heads": scope.numbers["kv_heads"]}
    visitor = Mixer(replace(scope, numbers=numbers), {KEY: (size,)}, "`carry`")
    found, dims, _ = visitor.number(value)
    if dims != (size,):
        label = f"it is {list(dims)}, a key [{size}]"
        raise error("L235", "`carry` makes a key of a key", value.span, label)
    for node in walk(found):
        if isinstance(node, Index) and isinstance(node.base, Name) and node.items:
            _of_key_heads(scope, node.base.id, node.span)
    found = finite(settled(found))
    ranks = {name: visitor.rank(name) for name in names(found) - {"true", "false", "h"}}
    try:
        _, rest = affine_parts(found, KEY, Affine(ranks, frozenset()).rank)
    except NotAffineError as wrong:
        part: Expr = wrong.args[0]
        raise _not_linear(part.span or value.span, part) from None
    if rest is not None:
        raise _not_linear(value.span, rest)
    return found


def carriers(scope: Scope, carry: Expr | None) -> tuple[Read, ...]:
    """Return the streams that a resolved `carry` reads of a further token."""
    if carry is None:
        return ()
    return streams_read(scope, (substitute(carry, {KEY: Number(0, "0")}),), ())


def require_fit(mix: Pairwise, axes: tuple[str, str], key: str, span: Span) -> None:
    """Check that an attention can read keys that are carried (L235)."""
    reads_keys = any(
        isinstance(node, Index) and node.base == Name(key)
        for expr in mix.exprs
        for node in walk(expr)
    )
    why = help = ""
    if axes != ("n", "n") or not extent(mix.mask).causal:
        why, help = "a query may see keys that are yet to come", "set `mask = causal`"
    elif mix.similarity is not None:
        why, help = "its similarity is no product", "leave `similarity` at `dot`"
    elif reads_keys:
        why = "an expression reads keys as they were"
    if why:
        raise error("L235", "this attention cannot carry its keys", span, why, help)


def _of_key_heads(scope: Scope, tensor: str, span: Span) -> None:
    """Check that a tensor that is read by the head has as many as the keys (L235)."""
    size, heads = scope.tensors[tensor].shape[0], int(scope.numbers["kv_heads"])
    if size != heads:
        label = f"`{tensor}` has {size}, kv_heads = {heads}"
        raise error("L235", "`carry` is of key heads", span, label)


def _not_linear(span: Span, part: Expr) -> Exception:
    return error(
        "L235",
        "`carry` is not linear in the key",
        span,
        f"`{show(part)}`",
        "write a sum of products, each with `k` once: `k - b * w * dot(w, k)`",
    )
