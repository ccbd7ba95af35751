"""FlexAttention, compiled once, and the blocks of masks that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COMPILED: dict[str, Any] = {}


def compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention, compiled at its first call for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    if "flex" not in COMPILED:
        COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    made: Callable[..., Any] = COMPILED["flex"]
    return made


def blocks_of(
    module: nn.Module, mask: Callable[..., Tensor], q: Tensor, k: Tensor, own: Tensor | None
) -> Any:
    """Return the blocks of a mask for q [b, h, n, d] and k [b, g, m, d], those of the last call
    where they are of the same sequences `own` [b, n].
    """
    from torch.nn.attention.flex_attention import create_block_mask

    n, m = q.shape[2], k.shape[2]
    known = module.__dict__.get("_blocks")
    if known is not None and known[:3] == (n, m, q.device):
        before = known[3]
        if own is before or (own is not None and before is not None and torch.equal(own, before)):
            return known[4]
    rows = None if own is None else len(q)
    found = create_block_mask(mask, rows, q.shape[1], n, m, device=str(q.device))
    module.__dict__["_blocks"] = (n, m, q.device, own, found)
    return found
