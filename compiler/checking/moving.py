"""What training moves without a gradient: `NAME <- expression`, beside `param NAME = …`.

param bias[experts] = 0
bias <- bias + 0.001 * sign(top / experts - mean_each(chosen))

The expression reads tensors, and of streams their means over the batch.
"""

from __future__ import annotations

from ...grammar import syntax
from ...grammar.diagnostics import LoomError, error
from ...grammar.source import Span
from ...ops import OPS, Shape
from ..model import Apply, Flow, Part, Read, flow_nodes
from .scope import Scope

_MEANS = ("average", "average_each")


def is_undeclared(scope: Scope, statement: syntax.Statement | None) -> bool:
    """Say whether a `param` is none yet: what is wrong with it has been said."""
    return isinstance(statement, syntax.Param) and statement.name not in scope.tensors


def moved_shape(scope: Scope, update: syntax.Update) -> Shape:
    """Return the shape of the `param` that is written, as a stream of one token (L244)."""
    tensor = scope.tensors.get(update.name)
    if tensor is None or not tensor.moved:
        what = "it is none" if tensor is None else "it is a `const`"
        help = f"declare what it begins with: `param {update.name}[…] = 0`"
        raise error("L244", "training moves a `param`", update.span, what, help)
    match tensor.shape:
        case ():
            return Shape("1", 1)
        case (dim,):
            return Shape("1", dim)
        case (heads, dim):
            return Shape("1", dim, heads)
    label = f"`{update.name}` has {len(tensor.shape)} dimensions"
    help = "it takes [], [dim] or [heads, dim]"
    raise error("L244", "training moves numbers and features", update.span, label, help)


def expect_moved(scope: Scope, update: syntax.Update, flow: Flow, wanted: Shape) -> None:
    """Check what a `param` is set to: of its shape, of the whole batch, nothing learned (L244)."""
    span = update.value.span
    for node in flow_nodes(flow):
        if isinstance(node, Part) or (isinstance(node, Apply) and _owns(node)):
            help = "make it a `let`, and take the mean of that"
            label = "a stage with tensors of its own would never learn here"
            raise error("L244", "what is moved has no gradient", node.span, label, help)
    if (found := _of_tokens(scope, flow)) is not None:
        name = f"`{found.name}`" if isinstance(found, Read) else "this"
        label = f"{name} is another for each sequence"
        help = "take the mean over the batch: `mean_each(stream)`, or `mean(stream)`"
        raise error("L244", "this is not one number for the whole batch", span, label, help)
    if flow.shape != wanted:
        label = f"it is {flow.shape}, `{update.name}` is {wanted}"
        help = "`mean_each` keeps features and heads; `merge` makes features of heads"
        raise error("L244", "this does not have the shape of what is moved", span, label, help)


def _owns(node: Apply) -> bool:
    return bool(OPS[node.op].weights([each.shape for each in node.inputs], dict(node.options)))


def _of_tokens(scope: Scope, flow: Flow) -> Flow | None:
    """Return what an expression reads of tokens outside of a mean; None where it reads nothing."""
    if isinstance(flow, Read):
        if flow.name in scope.tensors:
            return None
        own = scope.streams.get(flow.name)
        return flow if own is None or _of_tokens(scope, own.flow) is not None else None
    if isinstance(flow, Apply) and not OPS[flow.op].random:
        if flow.op in _MEANS:
            return None
        inner = (_of_tokens(scope, each) for each in flow.inputs)
        return next((each for each in inner if each is not None), None)
    return flow


def several_times(span: Span) -> LoomError:
    """Return the error of what training moves in a part that runs several times (L244)."""
    return error(
        "L244",
        "a part that training moves runs once",
        span,
        "here it would be moved once for each time",
        "leave `once` and `loop` out: give each place a part of its own",
    )
