"""What ONNX computes of PyTorch's operators where its exporter has no translation, or a longer one.

`TABLE` is operator → function that writes it in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset23 as op

OPSET = 23  # the first with `Attention` and `RotaryEmbedding`


def prod(x: Any, dims: Sequence[int] | None, dtype: int | None = None) -> Any:  # noqa: ARG001
    """Multiply along dimensions."""
    return op.ReduceProd(x, op.Constant(value_ints=list(dims or ())), keepdims=0)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.prims.prod.default: prod,
}
