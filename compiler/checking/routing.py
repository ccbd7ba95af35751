"""Experts: a feed-forward that is several, each for the tokens that are sent to it.

x | mixture(swiglu, w)      w [n, 8]: eight of them, with tensors stacked [8, …]

How many run for a token at most is found in what its weights are made of: `w * (s | largest(2))`
is 0 but for two features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...grammar.diagnostics import error
from ...grammar.expr import names
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, Name, Unary
from ...ops import OPS, Shape
from ..model import Apply, Block, Experts, Flow, Part, Read, flow_nodes


def as_experts(
    part: Block, given: Shape, weights: Flow, streams: Mapping[str, Flow], span: Span
) -> Block:
    """Return a part as so many as there are weights (L236)."""
    shape = weights.shape
    if shape.heads is not None or shape.tokens != given.tokens:
        label = f"they are {shape}, needed is {Shape(given.tokens, shape.dim)}"
        raise error("L236", "experts are weighed by a number each, for each token", span, label)
    if why := _obstacle(part):
        help = "an expert is made of `linear`, `param`, functions and features of one token"
        raise error("L236", f"`{part.name}` cannot be an expert", span, why, help)
    most = most_chosen(weights, streams)
    most = None if most is None else min(most, shape.dim)
    return replace(part, experts=Experts(shape.dim, most))


def _obstacle(part: Block) -> str:
    """Say why a part cannot run on the tokens of several experts at once."""
    if part.kind != "ffn":
        return f"it is a {part.kind}, which is no feed-forward"
    if part.reads or part.context_width is not None or part.regularize is not None:
        return "it reads more than the tokens it is sent, or adds to the loss"
    if part.moving:
        return "training moves a tensor in it"
    for tensor in part.tensors:
        if not tensor.learned or len(tensor.shape) > 1:
            return f"`{tensor.name}` is neither a number nor features that are learned"
        if not isinstance(tensor.init, str) and "h" in names(tensor.init):
            return f"what `{tensor.name}` begins with reads `h`"
    for node in (node for flow in part.flows for node in flow_nodes(flow)):
        if isinstance(node, Part):
            return f"`{node.what.name}` in it is a part of its own"
        if isinstance(node, Apply) and (why := _of_operation(node)):
            return why
    return ""


def _of_operation(node: Apply) -> str:
    op, options = OPS[node.op], dict(node.options)
    shapes = [each.shape for each in node.inputs]
    if op.weights(shapes, options):
        plain = node.op == "linear" and options["reparam"] == "none"
        if not plain or shapes[0].heads is not None:
            return f"the tensors of `{node.op}` in it are not those of a plain `linear`"
    elsewhere = op.reads_earlier(shapes, options) or op.looks_ahead(options)
    if elsewhere or op.positional or op.by_sequence or op.whole_rows or op.random:
        return f"`{node.op}` in it looks beyond one token, or draws"
    return ""


def most_chosen(flow: Flow, streams: Mapping[str, Flow]) -> int | None:
    """Return how many features of a token are not 0 at most; None where it is not known."""
    match flow:
        case Read(name):
            return most_chosen(streams[name], streams) if name in streams else None
        case Apply("largest" | "top", _, options):
            given: dict[str, Any] = dict(options)
            return given["count"] if given.get("over", "features") == "features" else None
        case Apply("one_hot"):
            return 1
        case Apply("slice" | "dropout", (x,)):
            return most_chosen(x, streams)
        case Apply("pointwise", inputs, options):
            given = dict(options)
            found = {f"a{at}": most_chosen(each, streams) for at, each in enumerate(inputs)}
            return _most(given["expr"], found)
    return None


def _most(expr: Expr, known: Mapping[str, int | None]) -> int | None:
    """Return how many features of an expression are not 0, given how many of its operands."""
    match expr:
        case Name(id):
            return known.get(id)
        case Unary("-", inner) | Binary("/", inner, _) | Call("abs" | "relu" | "sqrt", (inner,)):
            return _most(inner, known)
        case Binary("*", left, right):
            sides = [each for each in (_most(left, known), _most(right, known)) if each is not None]
            return min(sides, default=None)
        case Binary("+" | "-", left, right):
            one, two = _most(left, known), _most(right, known)
            return None if one is None or two is None else one + two
    return None
