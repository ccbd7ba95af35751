"""Evaluating a mask point by point, for checks that want the plain truth of small sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..grammar.expr import TRUE, rebuild
from ..grammar.syntax import Expr, Index, Name, walk
from .counting import numbers
from .model import Block, Pairwise


def visible_pairs(block: Block, n: int, m: int, segments: Tensor | None) -> Tensor | None:
    """Return [b or 1, n, keys], true where any head sees the key; None if streams decide."""
    assert isinstance(block.mix, Pairwise)
    mask = block.mix.mask
    if any(isinstance(node, Index) and node.base != Name("doc") for node in walk(mask)):
        return None
    keys = m if block.crosses else n
    values = {
        "i": np.arange(n)[None, None, :, None],
        "j": np.arange(keys)[None, None, None, :],
        "h": np.arange(block.heads)[None, :, None, None],
        "n": n,
        "m": keys,
    }
    if segments is not None:
        values["doc_i"] = segments.numpy()[:, None, :, None]
        values["doc_j"] = segments.numpy()[:, None, None, :]
    seen = np.asarray(numbers(_named(mask), values) if mask != TRUE else True)
    batch = 1 if segments is None else segments.shape[0]
    return torch.from_numpy(np.broadcast_to(seen, (batch, block.heads, n, keys)).any(1).copy())


def _named(expr: Expr) -> Expr:
    """Replace doc[i] by the name doc_i."""
    if isinstance(expr, Index):
        item = expr.items[0]
        assert isinstance(item, Name)
        return Name(f"doc_{item.id}")
    return rebuild(expr, _named)
