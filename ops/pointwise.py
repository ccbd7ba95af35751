"""Everything elementwise: activations, arithmetic between streams, `gate` and `scale`.

One operation with a scalar expression inside: `x | silu` is a0 → silu(a0), and
`(one - 0.3 * two)` is a0, a1 → a0 − 0.3 · a1. A stream without heads that meets one with
heads gives each head its own feature when it has one a head, its own slice when it has more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..grammar.dialect import write
from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, walk
from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Pointwise(Op):
    name = "pointwise"
    options = (Option("expr", "expr", required=True),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        whole = max(inputs, key=lambda each: (each.heads is not None, each.features))
        for each in inputs:
            if each.tokens != whole.tokens:
                raise Mismatch("these streams run along different tokens", f"{each} and {whole}")
            if each != whole and not self._fits(each, whole):
                raise Mismatch("these streams have different shapes", f"{each} and {whole}")
        return whole

    @staticmethod
    def _fits(part: Shape, whole: Shape) -> bool:
        if part.heads == whole.heads:
            return part.dim == 1
        return part.heads is None and part.dim in (whole.heads, whole.features)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        heads = max((x.shape[1] for x in inputs if x.ndim == 4), default=None)
        if heads is not None:
            inputs = [x if x.ndim == 4 else _split(x, heads) for x in inputs]
        values = {f"a{at}": x for at, x in enumerate(inputs)}
        result: Tensor = evaluate(options["expr"], values)
        return result.to(inputs[0].dtype) if result.is_floating_point() else result

    def text(self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options,
             module: str) -> str:  # fmt: skip
        heads = max((each.heads for each in shapes if each.heads is not None), default=None)
        names = {}
        for at, (name, shape) in enumerate(zip(inputs, shapes, strict=True)):
            if heads is not None and shape.heads is None:
                name = f"{name}.unflatten(-1, ({heads}, -1)).transpose(1, 2)"
            names[f"a{at}"] = name
        return write(options["expr"], "torch", lambda leaf: names[_id(leaf)])

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        size = max(each.features for each in inputs)
        return size * sum(isinstance(node, Binary | Unary | Call) for node in walk(options["expr"]))


def _id(leaf: Name | Index) -> str:
    assert isinstance(leaf, Name)
    return leaf.id


def _split(x: Tensor, heads: int) -> Tensor:
    b, n, width = x.shape
    return x.reshape(b, n, heads, width // heads).transpose(1, 2)


def evaluate(expr: Expr, values: Mapping[str, Any]) -> Any:
    """Return the value of a scalar expression whose names stand for tensors or numbers."""
    import torch

    match expr:
        case Number(value):
            return value
        case Name("true" | "false" as id):
            return id == "true"
        case Name(id):
            return values[id]
        case Unary("not", operand):
            value = evaluate(operand, values)
            return torch.logical_not(torch.as_tensor(value))
        case Unary(_, operand):
            return -evaluate(operand, values)
        case Binary(op, left, right):
            return _BINARY[op](evaluate(left, values), evaluate(right, values))
        case Compare(operands, ops):
            sides = [evaluate(each, values) for each in operands]
            holds: Any = True
            for op, a, b in zip(ops, sides, sides[1:], strict=False):
                holds = torch.as_tensor(_COMPARE[op](a, b)) & torch.as_tensor(holds)
            return holds
        case Call(name, args, ()) if name in FUNCTIONS:
            return _call(name, [evaluate(arg, values) for arg in args])
        case _:
            raise TypeError(f"{type(expr).__name__} is not a scalar expression")


_BINARY: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
    "and": lambda a, b: _truth(a) & _truth(b),
    "or": lambda a, b: _truth(a) | _truth(b),
}
_COMPARE: dict[str, Any] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _truth(value: Any) -> Tensor:
    import torch

    return torch.as_tensor(value, dtype=torch.bool)


def _call(name: str, args: list[Any]) -> Any:
    """Apply a scalar function by PyTorch's own definition of it."""
    import torch
    from torch.nn import functional

    if not any(isinstance(arg, torch.Tensor) for arg in args):
        return FUNCTIONS[name].value(*args)
    like = next(arg for arg in args if isinstance(arg, torch.Tensor))
    # Numbers as float64 scalars: they take the dtype of the tensors they meet, unrounded.
    tensors = [
        arg if isinstance(arg, torch.Tensor)
        else torch.tensor(arg, dtype=torch.float64, device=like.device)
        for arg in args
    ]  # fmt: skip
    match name:
        case "min":
            return torch.minimum(*tensors)
        case "max":
            return torch.maximum(*tensors)
        case "clip":
            return torch.minimum(torch.maximum(tensors[0], tensors[1]), tensors[2])
        case "where":
            return torch.where(tensors[0].bool(), tensors[1], tensors[2])
        case "ispow2":
            whole = tensors[0].long()
            return (whole > 0) & ((whole & (whole - 1)) == 0)
    if not like.is_floating_point() and name not in ("abs", "relu", "floor"):
        like = like.double()
    function = getattr(torch, name, None) or getattr(functional, name)
    return function(like)
