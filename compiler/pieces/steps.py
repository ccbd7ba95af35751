"""Recurrences token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def over_tokens(
    step: Callable[..., Any], states: tuple[Tensor, ...], streams: tuple[Tensor | None, ...], n: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the states after n tokens, and what `step` makes of each of them [b, h, n, …].

    `step` takes the states and one token of each stream [b, h, n, …], and returns the states
    after it and what it makes of it; a stream may be None. A compiler gets one operator for any
    number of tokens: it would unroll a loop.
    """
    if n == 0:
        nothing = [None if x is None else x.new_zeros(x.shape[:2] + x.shape[3:]) for x in streams]
        _, made = step(states, nothing)
        return states, tuple(x[:, :, None][:, :, :0] for x in made)
    if torch.compiler.is_compiling():
        have = [x is not None for x in streams]

        def copied(
            states: tuple[Tensor, ...], token: list[Tensor]
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            left = iter(token)
            after, made = step(states, [next(left) if each else None for each in have])
            after = (new.to(old.dtype).expand_as(old).clone()
                     for new, old in zip(after, states, strict=True))  # fmt: skip
            return tuple(after), tuple(x.clone() for x in made)

        given = [x.movedim(2, 0) for x in streams if x is not None]
        given = given or [torch.arange(n)]  # only to say how many tokens there are
        last, every = torch._higher_order_ops.scan(copied, states, given)
        return last, tuple(x.movedim(0, 2) for x in every)
    outputs = []
    each = ([None] * n if x is None else x.unbind(2) for x in streams)
    for token in zip(*each, strict=True):
        states, made = step(states, token)
        outputs.append(made)
    return states, tuple(torch.stack(each, dim=2) for each in zip(*outputs, strict=True))


def solved(a: Tensor, b: Tensor) -> Tensor:
    """Return the x [..., d] of a @ x = b, of matrices a [..., d, d] and vectors b [..., d]."""
    b = b + torch.zeros_like(a[..., 0])  # for all that there is a matrix for
    x: Tensor = torch.linalg.solve(a, b[..., None])
    return x[..., 0]


def at_ends(x: Tensor, fresh: Tensor | None) -> Tensor:
    """Return x [b, h, n, …] at the last token of each token's sequence.

    Sequences begin at `fresh` tokens [b, 1, n, 1]; None for one sequence.
    """
    if fresh is None:
        return x[:, :, -1:].expand_as(x)
    n = fresh.shape[2]
    number = torch.arange(n, device=x.device)
    last = F.pad(fresh[:, 0, :, 0], (0, 1), value=True)[:, 1:]
    ends = torch.where(last, number, n).flip(1).cummin(1)[0].flip(1)
    return x.gather(2, ends.reshape(-1, 1, n, *[1] * (x.ndim - 3)).expand_as(x))
