"""Attention over keys of which each query leaves some behind for good, and their cache.

Which keys stay is found token by token, without a gradient; then all queries of a tile weigh
the keys that were held before it and their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from .batches import Batch
from .groups import of_heads, top_groups
from .maps import by_key
from .parts import Part
from .tiles import TILE, mixed, several


def forgetting(
    choose: Callable[..., tuple[Tensor, ...]],
    weigh: Callable[..., Any],
    v: Tensor,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    places: tuple[Any, ...],
    tensors: tuple[Any, ...],
    sums: tuple[Tensor | None, ...],
    own: Tensor | None,
    *,
    count: int,
    share: int,
    slots: int | None,
    whole: bool = False,
) -> tuple[Tensor, ...]:
    """Return the mixed values [b, h, n, e], which keys are held then, and what else weigh gives.

    weigh(*queries, *keys, *places, *tensors, kept) gives the weights of a tile, where `kept`
    [b, h, n, m] says of which keys. choose(v, …, *sums, kept) gives scores of keys, which always
    stay, which are seen, and `sums` [b, h, m, 1] with one query more. Of m keys the first m - n are
    held before the n tokens. `share` heads hold the same, `count` besides what always stays, and
    `slots` in all, if there is a limit. What is held then are numbers of keys [b, h / share, ·],
    whether they are, and their sums. `own` is below 0 at padding, which changes nothing.
    """
    (b, heads, n, _), m = queries[0].shape, keys[0].shape[-2]
    before, groups, device = m - n, heads // share, v.device
    size = n if whole else max(16, min(256, 4 * TILE // max(1, b * heads * m) // 16 * 16))
    places = tuple(None if x is None else for_heads(x, b, heads, groups) for x in places)
    wide = torch.promote_types(v.dtype, torch.float32)
    none = torch.zeros(b, heads, before, 1, dtype=wide, device=device)
    summed = [none if x is None else x[..., :before, :] for x in sums]
    every = torch.arange(m, device=device).expand(b, groups, -1)
    index = every[..., :before]
    alive, found = torch.ones_like(index, dtype=torch.bool), []
    for a in range(0, max(n, 1), max(size, 1)):
        end = min(a + size, n)
        index = torch.cat([index, every[..., before + a : before + end]], -1)
        alive = F.pad(alive, (0, end - a))
        summed = [F.pad(x, (0, 0, 0, end - a)) for x in summed]
        asked = tuple(rows_from(x, a, end) for x in queries)
        read = tuple(x if end == n and not a else of_slots(x, index) for x in (v, *keys))
        stand = tuple(x if x is None else of_slots(x.mT, index).mT for x in places)
        operands = (*read[1:], *stand, *tensors)
        live = None if own is None else rows_from(own, a, end)[:, 0] >= 0
        with torch.no_grad():
            kept, alive, summed = held_in_turn(
                choose, read[0], asked, operands, summed, alive, live, count, share
            )
        found.append(weighed_tile(weigh, end - a < n, read[0], *asked, *operands, kept))
        stays, alive = first_slots(alive, slots)
        index, summed = index.gather(-1, stays), [of_slots(x, stays) for x in summed]
    o, *more = (torch.cat(parts, -2) for parts in zip(*found, strict=True))
    return o, index, alive, *summed, *more


def held_in_turn(
    choose: Callable[..., tuple[Tensor, ...]],
    v: Tensor,
    queries: tuple[Any, ...],
    operands: tuple[Any, ...],
    sums: list[Tensor],
    alive: Tensor,
    live: Tensor | None,
    count: int,
    share: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return which keys each query finds [b, h, n, m], which stay after all, and the sums then.

    In turn: what is `alive` [b, h / share, m] of the keys, the last n of which are the queries'
    own. Queries that are not `live` [b, n, 1] leave all as it was.
    """
    (_, heads, n, _), m = queries[0].shape, alive.shape[-1]
    at, rows = torch.arange(m, device=alive.device), []
    for t in range(n):
        rows.append(alive | (at == m - n + t))
        kept = rows[-1].repeat_interleave(share, 1)[:, :, None]
        asked = (rows_from(x, t, t + 1) for x in queries)
        e, always, seen, *sums = choose(v, *asked, *operands, *sums, kept)
        always = of_heads(always, share, heads).any(2)
        free = of_heads(seen, share, heads).any(2) & ~always
        e = of_heads(e.masked_fill(~seen, 0), share, heads).sum(2)
        stays = (always | top_groups(e, free, count))[:, :, 0]
        alive = stays if live is None else torch.where(live[:, t : t + 1], stays, alive)
    kept = torch.stack(rows, 2) if rows else alive[:, :, None][:, :, :0]
    return kept.repeat_interleave(share, 1), alive, sums


def weighed_tile(
    weigh: Callable[..., Any], again: bool, v: Tensor, *operands: Any
) -> tuple[Tensor, ...]:
    """Return the mixed values of some queries, and what else weigh gives of them.

    With `again`, weights are made again in the backward pass.
    """
    if again and torch.is_grad_enabled():
        made: tuple[Tensor, ...] = torch.utils.checkpoint.checkpoint(
            weighed_tile, weigh, False, v, *operands, use_reentrant=False
        )
        return made
    p, *more = several(weigh(*operands))
    return mixed(p, v), *more


def rows_from(x: Any, a: int, end: int) -> Any:
    """Return the queries a … end - 1 of x [..., n, ·]; what is the same for all as it is."""
    return x if x is None or x.shape[-2] == 1 else x[..., a:end, :]


def by_slot(number: Tensor | None) -> Any:
    """Lay a number of each token, or of each that every group holds [b, g, m], along the keys."""
    if number is None or number.ndim < 3:
        return by_key(number)
    return number[:, :, None]


def for_heads(x: Tensor, b: int, heads: int, groups: int) -> Tensor:
    """Lay places of keys [(1 or b, 1 or groups), 1, m] out for every head, or one if all share."""
    x = x if x.ndim == 4 else x[None, None]
    count = 1 if groups == 1 else heads
    each = x.repeat_interleave(heads // groups, 1) if x.shape[1] > 1 else x
    return each.expand(b, count, -1, -1)


def of_slots(x: Tensor, at: Tensor) -> Tensor:
    """Return the keys at places [b, groups, s] of x [b, h, m, d], or [b, m, d] in one group."""
    at = at.repeat_interleave(x.shape[1] // at.shape[1], 1) if x.ndim == 4 else at[:, 0]
    return x.gather(-2, at[..., None].expand(*at.shape, x.shape[-1]))


def first_slots(alive: Tensor, slots: int | None) -> tuple[Tensor, Tensor]:
    """Return the places [b, groups, s] of what is alive [b, groups, m], in order, and if it is.

    Without a limit, there are as many as the row with most of them has.
    """
    if slots is None:
        slots = int(alive.sum(-1).max()) if alive.numel() else 0
    order = (~alive).byte().argsort(dim=-1, stable=True)[..., :slots]
    return order, alive.gather(-1, order)


class BudgetCache(Part):
    """What is held of the tokens so far, where each token leaves some behind for good.

    `sizes` are those of `KeyValueCache`. So many heads, `groups`, hold tokens of their own, `slots`
    at most, or as many as there are. In `numbers` is the position of each, and one more; 0 where
    a slot is empty.
    """

    def __init__(
        self,
        batch: int,
        length: int | None,
        sizes: dict[str, tuple[int | None, int]],
        groups: int,
        slots: int | None = None,
        wide: tuple[str, ...] = (),
        changing: tuple[str, ...] = (),
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        bounded = slots is not None and (length is None or slots < length)
        self.capacity = slots if bounded else length
        self.limit = None if bounded else length
        exact = torch.promote_types(dtype, torch.float32)
        room, self.changing = self.capacity or 0, changing
        kinds = {"doc": torch.int64, **dict.fromkeys((*wide, *changing), exact)}
        made = {
            name: torch.zeros(batch, *(() if heads is None else (heads,)), room, dim,
                              dtype=kinds.get(name, dtype), device=device)
            for name, (heads, dim) in sizes.items()
        }  # fmt: skip
        numbers = torch.zeros(batch, groups, room, 1, dtype=torch.int64, device=device)
        super().__init__(**made, numbers=numbers)

    def beside(self, batch: Batch, **new: Tensor) -> tuple[Any, ...]:
        """Return what is held and new tokens after it, their positions, and numbers of sequences.

        These are [b, groups, m]; -2 where a slot is empty.
        """
        numbers = self._numbers(batch)
        count, held = batch.place.shape[-1], numbers[..., : self.kept["numbers"].shape[-2], 0]
        before = torch.as_tensor(batch.before, device=held.device).reshape(-1, 1, 1)
        run = torch.where((held > 0) & (before > 0), 0, -2)
        own = held.new_zeros(1, count) if batch.run is None else batch.run
        run = torch.cat([run, own[:, None].expand(*held.shape[:2], -1)], -1)
        found = []
        for name, x in new.items():
            old = self.kept[name]
            dtype = old.dtype if name in self.changing else x.dtype
            found.append(torch.cat([old.to(dtype), x.to(dtype)], -2))
        return (*found, numbers[..., 0] - 1, run)

    def take_up(self, batch: Batch, index: Tensor, alive: Tensor, **every: Tensor) -> None:
        """Hold the keys of these numbers [b, groups, s], where they are alive; sums are of them."""
        stays, alive = first_slots(alive, self.capacity)
        index = index.gather(-1, stays)
        more = max(0, (self.capacity or 0) - index.shape[-1])
        held = {
            name: of_slots(x, stays if name in self.changing else index)
            for name, x in every.items()
        }
        held["numbers"] = of_slots(self._numbers(batch), index) * alive[..., None]
        self.kept = {name: F.pad(x.detach(), (0, 0, 0, more)).to(self.kept[name].dtype)
                     for name, x in held.items()}  # fmt: skip

    def _numbers(self, batch: Batch) -> Tensor:
        """Return the positions of what is held and of new tokens, and one more."""
        old = self.kept["numbers"]
        new = batch.positions.reshape(-1, 1, batch.place.shape[-1], 1) + 1
        return torch.cat([old, new.expand(*old.shape[:2], -1, -1)], -2)
