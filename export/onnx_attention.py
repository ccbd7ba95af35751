"""Attentions that were written out become one operator: `Attention`, with a bias or a soft cap.

before    p = Softmax(cap * Tanh(MatMul(q * c, k.mT)) + bias);  y = MatMul(p, v)
after     y = Attention(q, k, v, bias, scale = c * cap, softcap = cap)
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule


def _fits(_: Any, q: ir.Value, k: ir.Value, v: ir.Value, **others: ir.Value) -> bool:
    """Say whether these have four dimensions and as many heads, and a mask is one of every pair."""
    if any(each.shape is None or len(each.shape) != 4 for each in (q, k, v)):
        return False
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        return False
    for name, each in others.items():
        if name in ("c", "cap"):
            if _number(each) is None:
                return False
        elif each.shape is None or len(each.shape) > 4:
            return False
    mask = others.get("mask")
    return mask is None or tuple(mask.shape)[-2:] == (q.shape[2], k.shape[3])


def _number(value: ir.Value) -> float | None:
    """Return a constant of one number."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))


def _attention(op: Any, q: Any, k: Any, v: Any, mask: Any, **attributes: float) -> Any:
    k = op.Transpose(k, perm=[0, 1, 3, 2])
    given = [q, k, v] if mask is None else [q, k, v, mask]
    return op.Attention(*given, **attributes)


def _capped(op: Any, q: Any, k: Any, v: Any, c: Any, cap: Any, mask: Any = None) -> Any:
    cap = _number(cap)
    return _attention(op, q, k, v, mask, scale=_number(c) * cap, softcap=cap)


def _masked(op: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return _attention(op, q, k, v, mask, scale=1.0)


def _more(op: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    return _attention(op, q, k, v, op.Add(mask, bias), scale=1.0)


def _less(op: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    return _attention(op, q, k, v, op.Sub(mask, bias), scale=1.0)


def _written(op: Any, scores: Any, v: Any) -> Any:
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _cap(op: Any, q: Any, k: Any, c: Any, cap: Any) -> Any:
    return op.Mul(op.Tanh(op.MatMul(op.Mul(q, c), k)), cap)


RULES = tuple(
    RewriteRule(before, after, _fits)
    for before, after in (
        (
            lambda op, q, k, v, c, cap, mask: _written(op, op.Add(_cap(op, q, k, c, cap), mask), v),
            _capped,
        ),
        (lambda op, q, k, v, c, cap: _written(op, _cap(op, q, k, c, cap), v), _capped),
        (
            lambda op, q, k, v, bias, mask: _written(
                op, op.Add(op.Add(op.MatMul(q, k), bias), mask), v
            ),
            _more,
        ),
        (
            lambda op, q, k, v, bias, mask: _written(
                op, op.Add(op.Sub(op.MatMul(q, k), bias), mask), v
            ),
            _less,
        ),
        (
            lambda op, q, k, v, mask: _written(op, op.Add(op.MatMul(q, k), mask), v),
            _masked,
        ),
    )
)
