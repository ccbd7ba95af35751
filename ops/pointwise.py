"""Everything elementwise: activations, arithmetic between streams, `gate` and `scale`.

One operation with a scalar expression inside: `x | silu` is a0 → silu(a0), and
`(one - 0.3 * two)` is a0, a1 → a0 − 0.3 · a1. A stream without heads that meets one with
heads gives each head its own feature when it has one a head, its own slice when it has more. What
runs along "1" is the same for every token of the streams that it meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..grammar.dialect import write
from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, walk
from .heads import by_head, by_head_text
from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Pointwise(Op):
    name = "pointwise"
    options = (Option("expr", "expr", required=True),)

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        whole = max(inputs, key=lambda each: (each.heads is not None, each.features))
        along = next((each for each in inputs if each.tokens != "1"), whole)
        for each in inputs:
            if each.tokens not in ("1", along.tokens):
                raise Mismatch("these streams run along different tokens", f"{each} and {along}")
            each = replace(each, tokens=whole.tokens)
            if each != whole and not self._fits(each, whole):
                raise Mismatch("these streams have different shapes", f"{each} and {whole}")
        return replace(whole, tokens=along.tokens)

    @staticmethod
    def _fits(part: Shape, whole: Shape) -> bool:
        if part.heads == whole.heads:
            return part.dim == 1
        return part.heads is None and part.dim in (1, whole.heads, whole.features)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        split = [run.has_heads(at, x) for at, x in enumerate(inputs)]
        if any(split):
            heads = inputs[split.index(True)].shape[-3]
            inputs = [
                x if done else by_head(x, heads) for x, done in zip(inputs, split, strict=True)
            ]
        values = {f"a{at}": x for at, x in enumerate(inputs)}
        result: Tensor = evaluate(options["expr"], values)
        return result.to(inputs[0].dtype) if result.is_floating_point() else result

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        heads = max((each.heads for each in shapes if each.heads is not None), default=None)
        names = {}
        for at, (name, shape) in enumerate(zip(inputs, shapes, strict=True)):
            if heads is not None and shape.heads is None:
                name = by_head_text(name, heads, shape)
            names[f"a{at}"] = name
        like = next((each for each in inputs if each.isidentifier()), "x")
        typed = f"{like}.new_full((), {{}})"
        return write(options["expr"], "torch", lambda leaf: names[_id(leaf)], typed)

    def flops(self, inputs: Sequence[Shape], options: Options) -> int:
        size = max(each.features for each in inputs)
        return size * sum(isinstance(node, Binary | Unary | Call) for node in walk(options["expr"]))


def _id(leaf: Name | Index) -> str:
    assert isinstance(leaf, Name)
    return leaf.id


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
    "//": lambda a, b: _constant(a) // _constant(b),
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


def _constant(value: Any) -> Any:
    """Return a value without its gradient: that of `//` is zero, which PyTorch does not say."""
    import torch

    return value.detach() if isinstance(value, torch.Tensor) else value


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
        arg
        if isinstance(arg, torch.Tensor)
        else torch.tensor(arg, dtype=torch.float64, device=like.device)
        for arg in args
    ]
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
        case "detach":
            return like.detach()
        case "step":
            stepped = like.clone()  # has the gradient of `like`, and gets other values
            stepped.detach().copy_(like > 0)
            return stepped
    if not like.is_floating_point() and name not in ("abs", "relu", "floor"):
        like = like.double()
    if name == "softplus":  # F.softplus is x from 20 on
        return -functional.logsigmoid(-like)
    if name == "log_sigmoid":
        return functional.logsigmoid(like)
    function = getattr(torch, name, None) or getattr(functional, name)
    return function(like)
