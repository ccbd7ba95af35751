"""The logits of keys that later tokens carry: token by token, as it is said.

s[h,i,j] = q[h,i] · (T_i … T_(j+1) k[g,j])        T_t x = carry(x, streams at t)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...grammar.syntax import Expr, Index, Name
from . import values
from .values import Value, per_head


def carried_logits(
    carry: Expr, q: Tensor, k: Tensor, streams: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return q · k [b, heads, n, n] of keys [b, g, n, d] as each query finds them."""
    heads = k.shape[1]
    tokens = {name: per_head(each, heads) for name, each in streams.items()}
    keys, rows = torch.zeros_like(k), []
    for t in range(k.shape[2]):

        def leaf(node: Expr, keys: Tensor = keys, t: int = t) -> Value | None:
            match node:
                case Name("k"):
                    return keys
                case Name(id) if id in tokens:
                    return tokens[id][:, :, t, None]
                case Index(Name(id), items):
                    tensor = tensors[id].to(keys)
                    return tensor[None, :, None] if items else tensor[None, None, None]
            return None

        now = torch.as_tensor(values.value(carry, leaf, lead=3)).expand(k.shape)
        keys = torch.cat([now[:, :, :t], k[:, :, t : t + 1], now[:, :, t + 1 :]], 2)
        found = keys.repeat_interleave(q.shape[1] // heads, dim=1)
        rows.append((found @ q[:, :, t, :, None])[..., 0])
    if not rows:
        return q @ k.repeat_interleave(q.shape[1] // heads, dim=1).mT
    return torch.stack(rows, 2)
