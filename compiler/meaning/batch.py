"""The meaning of a batch: every sequence of it is run alone.

    attention_mask 1 1 1 0 1 1      segments 0 0 0 0 1 1
    alone          x[0 1 2], x[4 5]

A sequence is a run of one segment's tokens in a row, padding left out; where no segments are
given, it is a whole row. Each goes through the meaning by itself, and what comes out is laid
back where its tokens stood. What stands at padding is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """The tokens of one sequence: the row they are in, and where they stand in it."""

    row: int
    at: Tensor  # [tokens]


Given = Tensor | None
Alone = Callable[[Tensor, Given, Given, Given, Given], Tensor]


def run_alone(
    alone: Alone,
    x: Tensor,
    *,
    cuts: bool,
    stride: int = 1,
    listed: bool = False,
    context: Tensor | None = None,
    attention_mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Return alone(x, context, segments, positions, condition) of every sequence, as x is laid out.

    With `cuts`, a segment is a sequence of its own; else segments are handed on. Where one token
    comes out for each `stride`, a row is one sequence, and what it has no tokens for is zero. Where
    it is `listed`, a list of tokens comes out, as many for any sequence.
    """
    b, n = x.shape[:2]
    if cu_seqlens is not None:
        segments, attention_mask = _packed(cu_seqlens, x)
    if attention_mask is None and context_mask is None and (segments is None or not cuts):
        every = segments if segments is None else segments.expand(x.shape[:2])
        return alone(x, context, every, positions, condition)
    live = x.new_ones(b, n, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    marks = None if segments is None else segments.expand(b, n)
    places = None if positions is None else positions.expand(b, n)
    whole: Tensor | None = None
    for row, at in _sequences(live, marks if cuts else None):
        own = None if context is None else context[row : row + 1]
        if own is not None and context_mask is not None:
            own = own[:, context_mask[row].bool()]
        y = alone(
            x[row : row + 1, at],
            own,
            None if marks is None or cuts else marks[row : row + 1, at],
            None if places is None else places[row : row + 1, at],
            None if condition is None else condition[row : row + 1],
        )
        by_token = stride == 1 and not listed and y.ndim == 3 and y.shape[1] == len(at)
        if whole is None:
            size = (-(-n // stride),) if by_token or stride > 1 else y.shape[1:2]
            whole = y.new_zeros(b, *size, *y.shape[2:])
        rows = torch.tensor([row], device=x.device)
        at = at if by_token else torch.arange(y.shape[1], device=x.device)
        where = (rows[:, None], at[None]) if y.ndim == 3 else (rows,)
        whole = whole.index_put(where, y)
    assert whole is not None
    return whole


def _packed(cu_seqlens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the segments and the mask of one row in which sequences end at given places."""
    ends = cu_seqlens[1:].tolist()
    place = torch.arange(x.shape[1], device=x.device)
    segments = sum(((place >= end).long() for end in ends), torch.zeros_like(place))
    return segments[None], (place < ends[-1])[None]


def _sequences(live: Tensor, segments: Tensor | None) -> Iterator[Sequence]:
    """Yield every sequence of a batch; an empty row is a sequence of no tokens."""
    for row, own in enumerate(live):
        at = own.nonzero()[:, 0]
        if segments is None or not len(at):
            yield Sequence(row, at)
            continue
        marks = segments[row, at]
        ends = (marks[1:] != marks[:-1]).nonzero()[:, 0] + 1
        for part in torch.tensor_split(at, ends.cpu()):
            yield Sequence(row, part)
