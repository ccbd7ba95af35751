"""The shape of a stream: [heads, tokens, dim], with or without the heads.

`tokens` names the sequence it runs along: `n` for the block's own tokens, `m` for those of
the context, a number in decimals for a list of so many tokens, `n/64` for one token of each 64 of
the block's, the last of which may be fewer. What runs along "1" is the
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


def pooled(tokens: str, stride: int) -> str:
    """Return the axis of one token for each `stride` tokens of an axis, or begun `stride`.

    >>> pooled("n", 64), pooled("n/4", 16), pooled("10", 4)
    ('n/64', 'n/64', '3')
    """
    if tokens.isdecimal():
        return str(-(-int(tokens) // stride))
    of, before = pooling(tokens)
    return of if before * stride == 1 else f"{of}/{before * stride}"


def pooling(tokens: str) -> tuple[str, int]:
    """Return the axis that one is pooled of, and of how many of its tokens: of `n/64` n and 64."""
    of, _, stride = tokens.partition("/")
    return of, int(stride or 1)


def axis_size(axis: str, tokens: int) -> int:
    """Return how many tokens an axis has, where a block and its context have so many."""
    if axis.isdecimal():
        return int(axis)
    return -(-tokens // pooling(axis)[1])
