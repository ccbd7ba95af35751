"""An attention that its own values read, as its mask shows it earlier tokens alone.

    branch u { mask = j < i; v = w - beta * u }     u[i] = Σ_j p[i, j] · v[j]

The values are taken apart into what they are without it, and the share of it that is in them, a
number for each head and token:  w  and  -beta[j, h].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ...grammar.derive import derivative
from ...grammar.diagnostics import error
from ...grammar.expr import fold, names, substitute
from ...grammar.source import Span
from ...grammar.syntax import Expr, Index, Name, Number
from ...ops import Shape
from ..algebra.levels import NotAffineError, affine_parts
from ..algebra.masks import extent
from ..model import Apply, Flow, Read, Stream, flow_nodes
from .arithmetic import composed
from .flows import Target, elaborate
from .scope import Scope

_FIRST = Number(0, "0")


class Apart(NamedTuple):
    """The values without the attention, and the share of it in them, over h and j."""

    rest: Read
    share: Expr


def values_apart(scope: Scope, name: str, value: Expr, shape: Shape) -> Apart:
    """Take apart the values of the attention `name`, whose mixed heads have a shape (L234)."""
    known = replace(scope, inputs={**scope.inputs, name: shape})
    flow = elaborate(known, value, Target(scope.own("v"), shape))
    if not isinstance(flow, Apply) or flow.op != "pointwise":
        raise _unclear(name, value.span, "they are no sum of streams")
    options: dict[str, Any] = dict(flow.options)
    expr: Expr = options["expr"]
    operands = {f"a{at}": each for at, each in enumerate(flow.inputs)}
    own = next((at for at, each in operands.items() if _is(each, name)), "")
    for each in operands.values():
        nodes = list(flow_nodes(each))
        if not _is(each, name) and any(_is(node, name) for node in nodes):
            raise _unclear(name, value.span, f"`{name}` goes through stages")
        if any(isinstance(node, Apply) and node.module for node in nodes):
            help = "give the pipeline in it a name: `let w = x | linear | split`"
            raise _unclear(name, value.span, "a learned stage stands in them", help)
    try:
        linear, rest = affine_parts(expr, own, lambda _: 0)
    except NotAffineError:
        raise _unclear(name, value.span, f"they are not linear in `{name}`") from None
    if linear is None or rest is None:
        raise _unclear(name, value.span, f"they are nothing but `{name}`")
    share = derivative(linear, Name(own))
    read = {at: _at_key(scope, name, operands[at], value.span) for at in sorted(names(share))}
    return Apart(_without(scope, name, rest, flow, shape), fold(substitute(share, read)))


def require_strict(name: str, mask: Expr, axes: tuple[str, str], span: Span) -> None:
    """Check that an attention that its values read sees earlier tokens alone (L234)."""
    if axes != ("n", "n") or extent(mask).ahead >= 0:
        help = "say so in its mask: `mask = j < i`"
        raise error(
            "L234", f"the values of `{name}` read it, and it may see its own token", span, "", help
        )


def _without(scope: Scope, name: str, rest: Expr, flow: Apply, shape: Shape) -> Read:
    """Return the values without the attention, a stream of its own if they are none."""
    made: Flow = composed(rest, flow.inputs, flow.span)
    if isinstance(rest, Name):
        made = flow.inputs[int(rest.id[1:])]
    if made.shape != shape:
        label = f"without it they are {made.shape}, needed is {shape}"
        raise _unclear(name, flow.span, label, "bring each of its terms to heads, with `split`")
    if isinstance(made, Read):
        return made
    return _named(scope, f"{name}_rest", made)


def _named(scope: Scope, name: str, flow: Flow) -> Read:
    """Give a flow a name that is free."""
    while name in scope.streams or name in scope.declared or name in scope.tensors:
        name += "_"
    scope.streams[name] = Stream(name, flow)
    return Read(name, flow.shape, flow.span)


def _at_key(scope: Scope, name: str, flow: Flow, span: Span) -> Expr:
    """Return a stream or tensor as a number of the key's head and token."""
    heads, head, key = int(scope.numbers["heads"]), Name("h"), Name("j")
    if isinstance(flow, Read) and flow.name in scope.tensors:
        size = scope.tensors[flow.name].shape
        if size in ((), (heads,)):
            return Index(Name(flow.name), (head,) * len(size), span)
    elif flow.shape.tokens == "n":
        if not isinstance(flow, Read):
            flow = _named(scope, f"{name}_share", flow)
        from_zero = Index(Name(flow.name), (key, head if flow.shape.dim > 1 else _FIRST), span)
        if flow.shape.heads is None and flow.shape.dim in (1, heads):
            return from_zero
        if flow.shape.heads == heads and flow.shape.dim == 1:
            return Index(Name(flow.name), (head, key, _FIRST), span)
    label = f"it is {flow.shape}"
    raise _unclear(name, span, label, f"multiply `{name}` by a number for each head and token")


def _is(flow: Flow, name: str) -> bool:
    return isinstance(flow, Read) and flow.name == name


def _unclear(name: str, span: Span, label: str, help: str = "") -> Exception:
    return error(
        "L234",
        f"the values of `{name}` read it in a way that is not solved",
        span,
        label,
        help or f"write them as `w - beta * {name}`, with streams for w and beta",
    )
