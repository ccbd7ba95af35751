"""What an expression over numbers, vectors and matrices is worth.

Values are tensors with as many leading dimensions as whoever asks has (pairs, or batch and
heads) and then their own: none for a number, one for a vector, two for a matrix. What names
and indices stand for, and calls that only the asker knows, a `leaf` says.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...grammar.expr import rebuild
from ...grammar.functions import MIXER_FUNCTIONS, VECTOR_FUNCTIONS
from ...grammar.syntax import Binary, Call, Expr, Name, Number, children
from ...ops.pointwise import evaluate

Value = Tensor | int | float
Leaf = Callable[[Expr], Value | None]


def value(expr: Expr, leaf: Leaf, lead: int) -> Value:
    """Return the value of an expression; `lead` dimensions come before those of a value."""
    known = leaf(expr)
    if known is not None:
        return known
    match expr:
        case Number(number):
            return number
        case Binary("@", left, right):
            return _contracted(value(left, leaf, lead), value(right, leaf, lead), lead)
        case Call(name, args, ()) if name in VECTOR_FUNCTIONS or name in MIXER_FUNCTIONS:
            parts = [torch.as_tensor(value(arg, leaf, lead)) for arg in args]
            return _of_vectors(name, parts, lead)
    # Everything else is elementwise: values for names, brought to as many dimensions.
    parts_ = [value(each, leaf, lead) for each in children(expr)]
    most = max((each.ndim for each in parts_ if isinstance(each, Tensor)), default=0)
    values = {
        f"part {at}": each.reshape(*each.shape, *[1] * (most - each.ndim))
        if isinstance(each, Tensor) and each.ndim
        else each
        for at, each in enumerate(parts_)
    }
    names = iter(values)
    result: Value = evaluate(rebuild(expr, lambda _: Name(next(names))), values)
    return result


def per_head(x: Tensor, heads: int) -> Tensor:
    """Return a stream as [b, heads, n, d].

    With heads it is repeated to so many; without, each head gets its own slice, a number
    [b, heads, n] where that is one feature.
    """
    if x.ndim == 4:
        return x.repeat_interleave(heads // x.shape[1], dim=1)
    b, n, width = x.shape
    x = x.reshape(b, n, heads, width // heads).transpose(1, 2)
    return x[..., 0] if x.shape[-1] == 1 else x


def _contracted(a: Value, b: Value, lead: int) -> Tensor:
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    dtype = torch.promote_types(a.dtype, b.dtype)  # places are float64 in a block of less
    a, b = a.to(dtype), b.to(dtype)
    match a.ndim - lead, b.ndim - lead:
        case 1, 1:
            return (a * b).sum(-1)
        case 1, 2:
            return (a[..., None, :] @ b)[..., 0, :]
        case 2, 1:
            return (a @ b[..., None])[..., 0]
        case 2, 2:
            return a @ b
    raise TypeError("`@` needs vectors or matrices on both sides")


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """Return the x of a @ x = b, of a matrix and a vector."""
    b = b + torch.zeros_like(a[..., 0])  # for all that there is a matrix for
    x: Tensor = torch.linalg.solve(a, b[..., None])
    return x[..., 0]


def _of_vectors(name: str, args: list[Tensor], lead: int) -> Tensor:
    """Apply `sum`, `mean` or `norm` (over all dimensions there are), or a product or `solve`."""
    match name, args:
        case "outer", [a, b]:
            return a[..., :, None] * b[..., None, :]
        case "dot", [a, b]:
            return (a * b).sum(-1)
        case "diag", [a]:
            return torch.diag_embed(a)
        case "softmax", [a]:
            return torch.softmax(a, -1)
        case "solve", [a, b]:
            return _solved(a, b)
        case "sum" | "mean" | "norm", [a] if a.ndim <= lead:  # of a number
            return a.abs() if name == "norm" else a
        case "sum", [a]:
            return a.flatten(lead).sum(-1)
        case "mean", [a]:
            return a.flatten(lead).mean(-1)
        case "norm", [a]:
            norm: Tensor = torch.linalg.vector_norm(a.flatten(lead), dim=-1)
            return norm
    raise TypeError(f"`{name}` is not a function of vectors")
