"""What ONNX computes of PyTorch's operators that its exporter has no translation for.

`TABLE` is operator → function that writes it with operators of ONNX. What goes on from one row to
the next is a `Scan`, whose body is text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx.parser
import onnx_ir as ir
import torch
from onnxscript import opset23
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op  # as it writes a `Scan` itself

op: Any = opset23  # an operator of ONNX by its name, while a program is translated
_INT64 = ir.DataType.INT64
OPSET = 23  # the first with `Attention`, `RotaryEmbedding` and `RMSNormalization`


def prod(x: Any, dims: Sequence[int] | None, dtype: int | None = None) -> Any:  # noqa: ARG001
    """Multiply along dimensions."""
    return op.ReduceProd(x, op.Constant(value_ints=list(dims or ())), keepdims=0)


def floor(x: Any) -> Any:
    """Round down, what is whole already too."""
    return op.Identity(x) if x.dtype.is_integer() else op.Floor(x)


def power(x: Any, exponent: Any) -> Any:
    """Raise to a power, which is a float where either is: ONNX gives the type of the base."""
    if x.dtype.is_integer() and exponent.dtype.is_floating_point():
        x = op.CastLike(x, exponent)
    return op.Pow(x, exponent)


def attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Attend by `Attention`; a runtime wants a mask of as many queries as there are."""
    assert not dropout_p, "a module in evaluation drops nothing"
    assert enable_gqa or q.shape[1] == k.shape[1]
    if attn_mask is not None:
        lengths = op.Concat(op.Shape(q, start=2, end=3), op.Shape(k, start=2, end=3), axis=0)
        attn_mask = op.Expand(attn_mask, lengths)
    y, *_ = op.Attention(q, k, v, attn_mask, scale=scale, is_causal=int(is_causal))
    return y


def sort(
    x: Any,
    *,
    stable: bool | None = None,  # noqa: ARG001  it is in any case
    dim: int = -1,
    descending: bool = False,
) -> Any:
    """Sort by `TopK`, which keeps what is equal in order."""
    given = op.Cast(x, to=ir.DataType.INT32) if x.dtype == ir.DataType.BOOL else x
    count = op.Shape(x, start=dim, end=dim + 1 if dim != -1 else None)
    values, order = op.TopK(given, count, axis=dim, largest=int(descending), sorted=1)
    return op.CastLike(values, x), order


def searchsorted(
    row: Any,
    x: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """Count the numbers of a sorted row [..., n] that are less than each of x [..., m]."""
    assert sorter is None, "the row is in order"
    last, before = op.Constant(value_ints=[-1]), op.Constant(value_ints=[-2])
    among = op.Unsqueeze(row, before) if len(row.shape) > 1 else row
    less = op.LessOrEqual if right or side == "right" else op.Less
    found = op.Cast(less(among, op.Unsqueeze(x, last)), to=_INT64)
    count = op.ReduceSum(found, last, keepdims=0)
    return op.Cast(count, to=ir.DataType.INT32) if out_int32 else count


def from_bits(x: Any, dtype: int) -> Any:
    """Read whole numbers of 32 bits as the floats that have these bits."""
    if (x.dtype, dtype) != (ir.DataType.INT32, ir.DataType.FLOAT):
        raise NotImplementedError("bits are read as float32, of int32, alone")
    number = op.Constant
    size = op.BitwiseAnd(x, number(value=ir.tensor(0x7FFFFFFF, ir.DataType.INT32)))
    step = number(value=ir.tensor(2**23, ir.DataType.INT32))
    exponent = op.Div(size, step)
    within = op.Cast(op.Sub(size, op.Mul(exponent, step)), to=ir.DataType.DOUBLE)
    small = op.Equal(exponent, number(value=ir.tensor(0, ir.DataType.INT32)))
    power = op.Cast(op.Max(exponent, number(value=ir.tensor(1, ir.DataType.INT32))),
                    to=ir.DataType.DOUBLE)  # fmt: skip
    lead = op.Where(small, _double(0.0), _double(2.0**23))
    found = op.Mul(op.Add(lead, within), op.Pow(_double(2.0), op.Sub(power, _double(150.0))))
    beyond = op.Where(op.Equal(within, _double(0.0)), _double(math.inf), _double(math.nan))
    top = op.Equal(exponent, number(value=ir.tensor(255, ir.DataType.INT32)))
    found = op.Where(top, beyond, found)
    negative = op.Less(x, number(value=ir.tensor(0, ir.DataType.INT32)))
    return op.Cast(op.Where(negative, op.Neg(found), found), to=ir.DataType.FLOAT)


def _double(value: float) -> Any:
    return op.Constant(value=ir.tensor(value, ir.DataType.DOUBLE))


_EXTREME = """
body ({type}[] most, int64[] at, {type}[] x, int64[] number)
  => ({type}[] most_out, int64[] at_out, {type}[] every_most, int64[] every_at)
{{
  new = {relation} (x, most)
  most_out = Where (new, x, most)
  at_out = Where (new, number, at)
  every_most = Identity (most_out)
  every_at = Identity (at_out)
}}
"""


def cummax(x: Any, dim: int) -> Any:
    """Give the largest number so far, and where it was."""
    return _extreme(x, dim, "GreaterOrEqual")


def cummin(x: Any, dim: int) -> Any:
    """Give the smallest number so far, and where it was."""
    return _extreme(x, dim, "LessOrEqual")


def _extreme(x: Any, dim: int, relation: str) -> Any:
    dim = dim % len(x.shape)
    body = _body(_EXTREME.format(type=_type(x), relation=relation))
    first = op.Squeeze(op.Slice(x, [0], [1], [dim]), [dim])
    count = op.Squeeze(op.Shape(x, start=dim, end=dim + 1), [0])
    numbers = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    at = op.Cast(op.Mul(op.Cast(first, to=_INT64), op.Constant(value_int=0)), to=_INT64)
    _, _, most, where = call_op(
        "Scan", first, at, x, numbers, _num_outputs=4, body=body, num_scan_inputs=2,
        scan_input_axes=[dim, 0], scan_output_axes=[dim, dim],
    )  # fmt: skip
    return most, where


_SUBSTITUTE = """
body (float[] known, float[] row, float[] given, float[] unit)
  => (float[] known_out, float[] every)
{
  last = Constant <value_ints = [-1]> ()
  before = Constant <value_ints = [-2]> ()
  lying = Unsqueeze (row, before)
  seen = MatMul (lying, known)
  sum = Squeeze (seen, before)
  left = Sub (given, sum)
  own = Mul (row, unit)
  diagonal = ReduceSum (own, last)
  every = Div (left, diagonal)
  standing = Unsqueeze (unit, last)
  found = Unsqueeze (every, before)
  placed = Mul (standing, found)
  known_out = Add (known, placed)
}
"""
_UNIT = _SUBSTITUTE.replace("ReduceSum (own, last)", "Constant <value_float = 1.0> ()")


def linalg_solve_triangular(
    a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """Solve a @ x = b by substitution, row by row; x @ a = b with `left` False."""
    if not left:
        rank = max(len(a.shape), len(b.shape))
        x = _solved(_mT(a, len(a.shape)), _mT(b, len(b.shape)), not upper, unitriangular)
        return _mT(x, rank)
    return _solved(a, b, upper, unitriangular)


def _solved(a: Any, b: Any, upper: bool, unit: bool) -> Any:
    text = _UNIT if unit else _SUBSTITUTE
    rows = op.Shape(a, start=-1)
    one = op.EyeLike(op.ConstantOfShape(op.Concat(rows, rows, axis=0)))
    known = op.ConstantOfShape(op.Shape(op.MatMul(a, b)))
    _, x = call_op(
        "Scan", known, a, b, one, _num_outputs=2, body=_body(text), num_scan_inputs=3,
        scan_input_axes=[-2, -2, 0], scan_output_axes=[-2],
        scan_input_directions=[int(upper)] * 3, scan_output_directions=[int(upper)],
    )  # fmt: skip
    return x


def _mT(x: Any, count: int) -> Any:
    return op.Transpose(x, perm=[*range(count - 2), count - 1, count - 2])


def _type(x: Any) -> str:
    return str(x.dtype.name).lower()


def _body(text: str) -> ir.Graph:
    return ir.serde.deserialize_graph(onnx.parser.parse_graph(text))


aten, prims = torch.ops.aten, torch.ops.prims
TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.floor.default: floor,
    aten.pow.Tensor_Tensor: power,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
    aten.searchsorted.Tensor: searchsorted,
    aten.sort.stable: sort,
    aten.view.dtype: from_bits,
    aten.linalg_solve_triangular.default: linalg_solve_triangular,
    prims.prod.default: prod,
}
