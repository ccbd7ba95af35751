"""What a block or model costs, from the checked architecture alone: no tensors, no torch.

    cost(model).params                        learned numbers
    cost(model).flops(tokens=4096)            of one forward pass over one sequence
    cost(model).cache_bytes(tokens=4096)      what decoding keeps after so many tokens
    cost(model).activation_bytes(tokens=4096) of one forward pass, before any is freed

A multiply-add counts two. Pairwise mixing counts visible pairs exactly; what a mask hides
because of data (segments, streams) counts as visible. Against a context, `tokens` is the
length of the context as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ...grammar.expr import FALSE
from ...grammar.syntax import Binary, Call, Expr, Index, Name, Unary, walk
from ...ops import OPS, Weight
from ...ops.shape import axis_size
from ..algebra.levels import affine_parts
from ..model import Apply, Block, Mixing, Model, Recurrence, Select, applies
from .dtypes import DType, size
from .kept import budget_of, kept
from .parameters import model_weights, weights


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of one block or model."""

    what: Block | Model

    @property
    def params(self) -> int:
        """The number of learned numbers."""
        own = weights(self.what) if isinstance(self.what, Block) else model_weights(self.what)
        return sum(_size(each) for each in own)

    def flops(self, tokens: int) -> int:
        """Floating point operations of a forward pass over one sequence of so many tokens."""
        if isinstance(self.what, Block):
            return _block_flops(self.what, tokens)
        model = self.what
        total = sum(
            count * _block_flops(each, tokens + more) for each, more, count in _counted(model)
        )
        return total if model.encoder is None else total + Cost(model.encoder).flops(tokens)

    def cache_bytes(self, tokens: int, dtype: DType = "float32") -> int:
        """Bytes that decoding keeps for one sequence of so many tokens."""
        if isinstance(self.what, Block):
            return kept(self.what).bytes(tokens, size(dtype))
        return sum(
            count * kept(each).bytes(tokens + more, size(dtype))
            for each, more, count in _counted(self.what)
        )

    def activation_bytes(self, tokens: int, dtype: DType = "float32") -> int:
        """Bytes of all intermediate results of a forward pass over one sequence.

        A fused attention counts its output and one statistic a row, not its map.
        """
        if isinstance(self.what, Block):
            return _activations(self.what) * tokens * size(dtype)
        model = self.what
        total = sum(
            count * _activations(each) * (tokens + front) for each, front, count in _counted(model)
        )
        more = 0 if model.encoder is None else Cost(model.encoder).activation_bytes(tokens, dtype)
        return total * size(dtype) + more


def cost(what: Block | Model) -> Cost:
    """Return the costs of a block or model."""
    return Cost(what)


def _size(weight: Weight) -> int:
    return prod(weight.shape) if weight.learned else 0


def _counted(model: Model) -> Iterable[tuple[Block, int, int]]:
    """Yield what a model is made of, how many tokens are put in front of it, and how often."""
    front = model.memory or 0
    yield from ((each, 0, 1) for each in model.ends)
    yield from ((each, front, count) for each, count in Counter(model.run).items())


def _applies(block: Block) -> list[Apply]:
    flows = [*(each.flow for each in block.streams), block.out]
    return [node for flow in flows for node in applies(flow)]


def _block_flops(block: Block, tokens: int) -> int:
    total = sum(
        axis_size(node.shape.tokens, tokens)
        * OPS[node.op].flops([each.shape for each in node.inputs], dict(node.options))
        for node in _applies(block)
    )
    for part in block.parts:
        given = tokens if part.taken is None else part.taken.of(tokens)
        total += _times(part.what) * _block_flops(part.what, given)
    return total + sum(_mixing_flops(each, tokens, block) for each in block.mixings.values())


def _times(part: Block) -> int:
    """Return how many of a part run for a token, at most."""
    if part.experts is None:
        return 1
    return part.experts.count if part.experts.most is None else part.experts.most


def _mixing_flops(mixing: Mixing, tokens: int, block: Block) -> int:
    if isinstance(mixing.mix, Recurrence):
        dims = {each.name: each.shape for each in block.tensors}
        return tokens * mixing.heads * _recurrence_flops(mixing, mixing.mix, dims)
    mix = mixing.mix
    each = 2 * (mixing.inputs[0].shape.dim + mixing.shape.dim)
    chosen = () if mix.select is None else mix.select.exprs
    chosen += () if mix.keep is None else mix.keep.exprs
    each += sum(_scalar_ops(expr) for expr in mix.exprs if expr not in (mix.mask, *chosen))
    if mix.carry is not None:  # each further token does it to each key that its query sees
        key = mixing.inputs[1].shape
        dims = {each.name: each.shape for each in block.tensors}
        dims |= {**_per_head(mixing, key.heads or 1), "k": (key.dim,)}
        each += _expr_flops(mix.carry, dims)[0]
    rows, columns = axis_size(mixing.queries, tokens), axis_size(mixing.keys, tokens)
    from ..algebra.counting import pairs  # loads numpy, and a search may never ask

    seen = pairs(mix.mask, rows, columns, mixing.heads)
    if mix.keep is not None:  # once for the weights, and once for what stays
        budget = budget_of(mix, mixing.heads)
        assert budget is not None
        read = min(seen, mixing.heads * rows * (budget.of(columns) + 1))
        return (2 * each + _scalar_ops(mix.keep.score)) * read
    if mix.select is None:
        return each * seen
    return each * _read(mix.select, mix.mask, seen, (rows, columns, mixing.heads)) + _choosing(
        mix.select, mixing, seen
    )


def _read(select: Select, mask: Expr, seen: int, sizes: tuple[int, int, int]) -> int:
    """Return of how many pairs that are seen the values are read at most."""
    if select.kind != "top":
        return seen
    from ..algebra.counting import pairs

    rows, columns, heads = sizes
    always = 0 if select.always == FALSE else pairs(
        Binary("and", mask, select.always), rows, columns, heads
    )  # fmt: skip
    return min(seen, heads * rows * int(select.amount) * select.size + always)


def _choosing(select: Select, mixing: Mixing, seen: int) -> int:
    """Return what the scores of a choice take: of each pair, or of each group that is seen."""
    products = sum(isinstance(node, Call) and node.function == "dot" for node in walk(select.score))
    each = _scalar_ops(select.score) + 2 * products * mixing.inputs[0].shape.dim
    return each * (seen if select.within else -(-seen // (select.size * select.rows)))


def _scalar_ops(expr: Expr) -> int:
    return sum(isinstance(node, Binary | Unary | Call) for node in walk(expr))


def _recurrence_flops(mixing: Mixing, mix: Recurrence, tensors: dict[str, tuple[int, ...]]) -> int:
    """Operations per token and head: sizes of all intermediate results, products twice.

    Of a state that is kept in levels, each fades, is corrected and is weighed.
    """
    dims = tensors | {each.name: each.shape for each in mix.states}
    dims |= _per_head(mixing, mixing.heads)
    levels = {each.name: each.levels for each in mix.leveled}
    total = sum(2 * prod(each.kept) for each in mix.leveled)
    for update in mix.updates:
        work, made = _expr_flops(update.value, dims)
        if update.name in levels:
            linear, rest = affine_parts(
                update.value, update.name, lambda each: len(_expr_flops(each, dims)[1])
            )
            work = levels[update.name] * (0 if linear is None else _expr_flops(linear, dims)[0])
            work += 0 if rest is None else _expr_flops(rest, dims)[0] + prod(made)
        total += work
        dims[update.name] = made
    return total


def _per_head(mixing: Mixing, heads: int) -> dict[str, tuple[int, ...]]:
    """Return what a head has of each stream, where there are so many."""
    dims: dict[str, tuple[int, ...]] = {}
    for stream in mixing.inputs:
        shape = stream.shape
        each = shape.dim if shape.heads is not None else shape.dim // heads
        dims[stream.name] = (each,) if shape.heads is not None or each > 1 else ()
    return dims


def _expr_flops(expr: Expr, dims: dict[str, tuple[int, ...]]) -> tuple[int, tuple[int, ...]]:
    match expr:
        case Name(id):
            return 0, dims.get(id, ())
        case Index(Name(id), items):
            return 0, dims.get(id, ())[len(items) :]
        case Binary("@", left, right):
            (one, a), (two, b) = _expr_flops(left, dims), _expr_flops(right, dims)
            made = a[:-1] + b[1:]
            return one + two + 2 * prod(made) * a[-1], made
        case Call("outer", (left, right)):
            (one, a), (two, b) = _expr_flops(left, dims), _expr_flops(right, dims)
            return one + two + prod(a + b), a + b
        case Call("diag", (operand,)):
            work, made = _expr_flops(operand, dims)
            return work, made * 2
        case Call("solve", (left, right)):
            (one, _), (two, b) = _expr_flops(left, dims), _expr_flops(right, dims)
            return one + two + 2 * b[0] ** 3 // 3 + 2 * b[0] ** 2, b
        case Call("sum" | "mean" | "norm" | "dot", args):
            parts = [_expr_flops(arg, dims) for arg in args]
            return sum(work + 2 * prod(made) for work, made in parts), ()
        case Binary() | Unary() | Call():
            inside = (
                [expr.left, expr.right]
                if isinstance(expr, Binary)
                else ([expr.operand] if isinstance(expr, Unary) else list(expr.args))
            )
            parts = [_expr_flops(each, dims) for each in inside]
            made = max((each for _, each in parts), key=len, default=())
            return sum(work for work, _ in parts) + prod(made), made
        case _:
            return 0, ()


def _activations(block: Block) -> int:
    """Numbers per token that a forward pass makes."""
    total = sum(node.shape.features for node in _applies(block))
    total += sum(_times(each.what) * _activations(each.what) for each in block.parts)
    return total + sum(each.heads * (each.shape.dim + 1) for each in block.mixings.values())
