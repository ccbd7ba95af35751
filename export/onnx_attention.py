"""Attentions that were written out become one operator: `Attention`, with a bias or a soft cap.

before    p = Softmax(cap * Tanh(MatMul(q * c, k.mT)) + bias);  y = MatMul(p, v)
after     y = Attention(q, k, v, bias, scale = c * cap, softcap = cap)
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule


def _fits(_: Any, q: ir.Value, k: ir.Value, v: ir.Value, bias: ir.Value | None = None,
          **constants: ir.Value) -> bool:  # fmt: skip
    """Say whether these are of four dimensions, and a bias one of every query."""
    if any(each.shape is None or len(each.shape) != 4 for each in (q, k, v)):
        return False
    if q.shape[1] != k.shape[1] or k.shape[1] != v.shape[1]:
        return False
    if bias is not None:
        if bias.shape is None or not 2 <= len(bias.shape) <= 4:
            return False
        if (bias.shape[-2], bias.shape[-1]) != (q.shape[2], k.shape[3]):
            return False
    return all(_number(each) is not None for each in constants.values())


def _number(value: ir.Value) -> float | None:
    """Return a constant of one number."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))


def _attention(op: Any, q: Any, k: Any, v: Any, bias: Any, **attributes: float) -> Any:
    k = op.Transpose(k, perm=[0, 1, 3, 2])
    given = [q, k, v] if bias is None else [q, k, v, bias]
    return op.Attention(*given, **attributes)


def _capped(op: Any, q: Any, k: Any, v: Any, c: Any, cap: Any, bias: Any = None) -> Any:
    cap = _number(cap)
    return _attention(op, q, k, v, bias, scale=_number(c) * cap, softcap=cap)


def _biased(op: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
    return _attention(op, q, k, v, bias, scale=1.0)


def _capped_and_biased_before(op: Any, q: Any, k: Any, v: Any, c: Any, cap: Any, bias: Any) -> Any:
    scores = op.Mul(op.Tanh(op.MatMul(op.Mul(q, c), k)), cap)
    return op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), v)


def _capped_before(op: Any, q: Any, k: Any, v: Any, c: Any, cap: Any) -> Any:
    scores = op.Mul(op.Tanh(op.MatMul(op.Mul(q, c), k)), cap)
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _biased_before(op: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
    return op.MatMul(op.Softmax(op.Add(op.MatMul(q, k), bias), axis=-1), v)


RULES = (
    RewriteRule(_capped_and_biased_before, _capped, _fits),
    RewriteRule(_capped_before, _capped, _fits),
    RewriteRule(_biased_before, _biased, _fits),
)
