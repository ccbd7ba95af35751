"""Where the text of a model stands, in a folder: what the shell calls of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...compiler.pieces.batches import Batch
from ...compiler.pieces.caches import Cache

__all__ = ["Architecture", "Batch", "Cache"]


class Architecture(nn.Module):
    """A model over a vocabulary."""

    embed_tokens: nn.Module
    layers: nn.ModuleList

    def init_cache(self, batch: int, length: int | None = None) -> Any:
        """Return what the layers keep, still empty; without a length it grows."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        batch: Batch | None = None,
    ) -> Tensor:
        """Return what the model makes of tokens [b, n]; `batch` says how they stand."""
        raise NotImplementedError
