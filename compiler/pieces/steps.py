"""Recurrences token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def over_tokens(
    step: Callable[..., Any], states: tuple[Tensor, ...], streams: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the states after all tokens, and what `step` makes of each token [b, h, n, …].

    `step` takes the states and one token of each stream [b, h, n, …], and returns the states
    after it and what it makes of it. A compiler gets one operator for any number of tokens: it
    would unroll a loop.
    """
    n = streams[0].shape[2]
    if n == 0:
        _, made = step(states, tuple(x.new_zeros(x.shape[:2] + x.shape[3:]) for x in streams))
        return states, tuple(x[:, :, None][:, :, :0] for x in made)
    if torch.compiler.is_compiling():

        def copied(
            states: tuple[Tensor, ...], token: list[Tensor]
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            after, made = step(states, token)
            after = (new.to(old.dtype).expand_as(old).clone()
                     for new, old in zip(after, states, strict=True))  # fmt: skip
            return tuple(after), tuple(x.clone() for x in made)

        last, every = torch._higher_order_ops.scan(
            copied, states, [x.movedim(2, 0) for x in streams]
        )
        return last, tuple(x.movedim(0, 2) for x in every)
    outputs = []
    for token in zip(*(x.unbind(2) for x in streams), strict=True):
        states, made = step(states, token)
        outputs.append(made)
    return states, tuple(torch.stack(each, dim=2) for each in zip(*outputs, strict=True))


def token_numbers(fresh: Tensor, place: int | Tensor) -> Tensor:
    """Return how many tokens of its document are before each token [b, 1, n].

    Documents begin at `fresh` tokens [b, 1, n, 1]; of the first there were `place` tokens, a
    number or [b, 1, 1], before these.
    """
    number = torch.arange(fresh.shape[2], device=fresh.device)
    return number - torch.where(fresh[..., 0], number, -place).cummax(-1)[0]


def at_ends(x: Tensor, fresh: Tensor) -> Tensor:
    """Return x [b, h, n, …] at the last token of each token's document.

    Documents begin at `fresh` tokens [b, 1, n, 1].
    """
    n = fresh.shape[2]
    number = torch.arange(n, device=x.device)
    last = F.pad(fresh[:, 0, :, 0], (0, 1), value=True)[:, 1:]
    ends = torch.where(last, number, n).flip(1).cummin(1)[0].flip(1)
    return x.gather(2, ends.reshape(-1, 1, n, *[1] * (x.ndim - 3)).expand_as(x))
