"""The shape of a stream: [heads, tokens, dim], with or without the heads.

`tokens` names the sequence it runs along: `n` for the block's own tokens, `m` for those of
the context, a number in decimals for a list of so many tokens. What runs along "1" is the
same for every token, and meets streams along any. At run time a stream is a tensor
[b, heads, tokens, dim] or [b, tokens, dim]; one along "1" may lack the batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    tokens: str
    dim: int
    heads: int | None = None

    def __str__(self) -> str:
        sizes = (
            (self.tokens, self.dim) if self.heads is None else (self.heads, self.tokens, self.dim)
        )
        return f"[{', '.join(map(str, sizes))}]"

    @property
    def features(self) -> int:
        """Numbers per token."""
        return self.dim * (self.heads or 1)
