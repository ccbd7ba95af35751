"""Evaluating a mask point by point, for checks that want the plain truth of small sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...grammar.expr import TRUE, rebuild
from ...grammar.syntax import Expr, Index, Name, walk
from ..algebra.counting import numbers
from ..model import Mixing, Pairwise


def visible_pairs(mixing: Mixing, n: int, m: int, segments: Tensor | None) -> Tensor | None:
    """Return [b or 1, queries, keys], true where any head sees the key; None if streams decide."""
    assert isinstance(mixing.mix, Pairwise)
    mask = mixing.mix.mask
    if any(isinstance(node, Index) and node.base != Name("doc") for node in walk(mask)):
        return None
    sizes = {"n": n, "m": m}
    rows, keys = (sizes.get(axis) or int(axis) for axis in (mixing.queries, mixing.keys))
    values = {
        "i": np.arange(rows)[None, None, :, None],
        "j": np.arange(keys)[None, None, None, :],
        "h": np.arange(mixing.heads)[None, :, None, None],
        "n": rows,
        "m": keys,
    }
    if segments is not None:
        values["doc_i"] = segments.numpy()[:, None, :, None]
        values["doc_j"] = segments.numpy()[:, None, None, :]
    seen = np.asarray(numbers(_named(mask), values) if mask != TRUE else True)
    batch = 1 if segments is None else segments.shape[0]
    return torch.from_numpy(np.broadcast_to(seen, (batch, mixing.heads, rows, keys)).any(1).copy())


def _named(expr: Expr) -> Expr:
    """Replace doc[i] by the name doc_i."""
    if isinstance(expr, Index):
        item = expr.items[0]
        assert isinstance(item, Name)
        return Name(f"doc_{item.id}")
    return rebuild(expr, _named)
