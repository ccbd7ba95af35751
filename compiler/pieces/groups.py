"""Groups of tokens: what is pooled of them, and which of them a query chooses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch
from .parts import by_token


def groups_in(
    x: Tensor, size: int, stride: int, start: int, run: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the tokens of each group of x [b, (heads,) n, d], [b, (heads,) groups, size, d].

    Group g holds `size` tokens from start + stride · g on. Beside them which there are
    [b or 1, (1,) groups, size, 1]: those of the sequence, where run [b, n] is no padding.
    """
    n = x.shape[-2]
    count = (n + stride - 1) // stride
    after = start + stride * count + size - n  # a group more: of no tokens there is none to unfold
    tokens = F.pad(x, (0, 0, -start, after)).unfold(-2, size, stride)[..., :count, :, :].mT
    at = stride * torch.arange(count, device=x.device)[:, None]
    at = at + torch.arange(start, start + size, device=x.device)
    held = torch.tensor([n], device=x.device) if run is None else (run >= 0).sum(1)
    inside = (at >= 0) & (at < held[:, None, None])
    inside = inside[..., None]
    return tokens, inside[:, None] if x.ndim == 4 else inside


class GroupBatch(NamedTuple):
    """How the groups of a call stand, as a cache takes them: those that were not complete before.

    `place` [groups] or [b, groups] numbers them, `run` says which a row has begun, None for all.
    """

    place: Tensor
    bound: int
    before: Any
    after: Any
    run: Tensor | None
    cut: bool = False
    given: Tensor | None = None
    slack: int = 0


def batch_of_groups(batch: Batch, count: int, size: int, stride: int, start: int) -> GroupBatch:
    """Return how groups of the `count` tokens of a call stand, and of those just before them."""
    after, bound = batch.after, max(0, (batch.bound - start - size) // stride + 1)
    device = batch.place.device
    if batch.run is None and isinstance(after, int):
        every = -(-after // stride)
        place = torch.arange(bound, every, device=device)
        return GroupBatch(place, bound, bound, every, None)
    rows = (batch.place if batch.run is None else batch.run).shape[0]
    since, ends = (
        torch.as_tensor(x, device=device).expand(rows)[:, None] for x in (batch.before, after)
    )
    first = ((since - start - size) // stride + 1).clamp(min=0)
    place = first + torch.arange((count + size - 2) // stride + 2, device=device)
    total = -(-ends // stride)
    run = torch.where(place < total, 0, -1)
    return GroupBatch(place, bound, first[:, 0], total[:, 0], run)


def new_groups(
    x: Tensor,
    size: int,
    stride: int,
    start: int,
    run: Tensor | None,
    before: Tensor | None,
    groups: GroupBatch | None,
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Return what `groups_in` does, with a cache of these `groups`; `before` stand before x."""
    if before is None or groups is None:
        return groups_in(x, size, stride, start, run)
    every = torch.cat([before, x], dim=-2)
    at = stride * groups.place[..., None] + torch.arange(start, start + size, device=x.device)
    since, ends = (torch.as_tensor(each, device=x.device) for each in (batch.before, batch.after))
    if at.ndim == 3:
        since, ends = (each.expand(x.shape[0])[:, None, None] for each in (since, ends))
    inside = (at >= 0) & (at < ends)
    place = (at - since + before.shape[-2]).clamp(0, max(0, every.shape[-2] - 1))
    if at.ndim == 2:
        tokens, inside = every[..., place, :], inside[None]
    else:
        index = by_token(place.flatten(1), every)
        index = index.expand(*every.shape[:-2], -1, every.shape[-1])
        tokens = every.gather(-2, index).unflatten(-2, place.shape[1:])
    inside = inside[..., None]
    return tokens, inside[:, None] if x.ndim == 4 else inside


def pooled_sum(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the sum of each group."""
    return tokens.masked_fill(~inside, 0).sum(-2)


def pooled_mean(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the mean of each group, of the tokens that there are."""
    return tokens.masked_fill(~inside, 0).sum(-2) / inside.sum(-2).clamp(min=1)


def pooled_max(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the maxima of each group, 0 of one without any token."""
    most = tokens.masked_fill(~inside, -torch.inf).amax(-2)
    return most.masked_fill(~inside.any(-2), 0)


def pooled_min(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the minima of each group, 0 of one without any token."""
    return -pooled_max(-tokens, inside)


def pooled_first(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the first token of each group, 0 where it has none."""
    earlier = F.pad(inside, (0, 0, 1, 0))[..., :-1, :]
    return tokens.masked_fill(~inside | earlier, 0).sum(-2)


def pooled_last(tokens: Tensor, inside: Tensor) -> Tensor:
    """Return the last token of each group, 0 where it has none."""
    later = F.pad(inside, (0, 0, 0, 1))[..., 1:, :]
    return tokens.masked_fill(~inside | later, 0).sum(-2)


def pooled_linear(tokens: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Return a linear map, weight [d, size · d], of the tokens of each group, one after another."""
    return F.linear(tokens.masked_fill(~inside, 0).flatten(-2), weight)


def pooled_attention(tokens: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of each group by the softmax of its tokens' products with weight [1, d]."""
    tokens = tokens.masked_fill(~inside, 0)
    lowest = torch.finfo(tokens.dtype).min
    share = F.linear(tokens, weight).masked_fill(~inside, lowest).softmax(-2)
    return (share * tokens).sum(-2)


def windows_of(tokens: Tensor, inside: Tensor, fill: float = 0) -> Tensor:
    """Return the tokens of each group [b, (heads,) groups, size, d], `fill` where there is none."""
    return tokens.masked_fill(~inside, fill)


def run_of_groups(run: Tensor | None, stride: int) -> Tensor | None:
    """Return of each `stride` tokens 0 where they are begun, -1 for padding; run is [b, n]."""
    return None if run is None else run[:, ::stride].clamp(max=0)


def where_begun(y: Tensor, run: Tensor | None, stride: int) -> Tensor:
    """Return y [b, groups, d], 0 where none of the `stride` tokens is; run is [b, n]."""
    of_groups = run_of_groups(run, stride)
    return y if of_groups is None else y.masked_fill((of_groups < 0)[..., None], 0)


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Return the tokens of x [b, (heads,) groups, d] at numbers [b or 1, 1, 1, m].

    What lies past an end is the token at that end.
    """
    at = at.long().clamp(0, max(0, x.shape[-2] - 1))
    if not x.shape[-2]:  # there is no row to take
        x = F.pad(x, (0, 0, 0, 1))
    if at.shape[0] == 1:
        return x.index_select(-2, at.flatten())
    at = at[:, 0, 0, :, None] if x.ndim == 3 else at[:, 0, :, :, None].expand(-1, x.shape[1], -1, 1)
    return x.gather(-2, at.expand(*at.shape[:-1], x.shape[-1]))


def columns_at(x: Tensor, at: Tensor) -> Tensor:
    """Return the columns of a map x [b, h, n, keys] at numbers [b or 1, h or 1, n or 1, m]."""
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], at.shape[-1])
    at = at.long().clamp(0, x.shape[-1] - 1)
    if at.numel() == at.shape[-1]:  # the same for every query
        return at_groups(x, at)
    return x.gather(-1, at.expand(*x.shape[:-1], -1))


def groups_of_keys(j: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the group of `size` tokens of each key, as its rank, and where the groups begin.

    Keys stand in order at j [b or 1, 1, 1, m]; so do the ranks. The beginnings are
    [b or 1, 1, 1, groups], 0 for more groups than there are.
    """
    group = j.long() // size
    count = j.shape[-1] // size + 4  # of two ranges of keys, each begins and ends within a group
    rank = ranks_of(group).clamp(max=count - 1)
    first = group.new_zeros(*group.shape[:-1], count)
    return rank, first.scatter(-1, rank, group * size)


def ranks_of(group: Tensor) -> Tensor:
    """Number the groups of keys that stand together, group [b or 1, 1, 1, m], from 0."""
    return F.pad(group[..., 1:] != group[..., :-1], (1, 0)).cumsum(-1)[..., : group.shape[-1]]


def sum_of_groups(x: Tensor, group: Tensor) -> Tensor:
    """Return the sum of x [b, h, n, m] over the keys of each one's group [b or 1, 1, 1, m]."""
    rank = ranks_of(group)
    return at_groups(torch.zeros_like(x).scatter_add(-1, rank.expand(x.shape), x), rank)


def max_of_groups(x: Tensor, group: Tensor) -> Tensor:
    """Return the maximum of x [b, h, n, m] over the keys of each one's group [b or 1, 1, 1, m].

    What is minus infinity counts as none; of a group of none it is 0.
    """
    rank = ranks_of(group)
    none = torch.full_like(x, -torch.inf)
    most = none.scatter_reduce(-1, rank.expand(x.shape), x, "amax")
    return at_groups(most.masked_fill(most == -torch.inf, 0), rank)


def any_of_groups(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Say which of `count` groups have a key of x [b, h, n, m], by the group of each key."""
    found = torch.zeros(*x.shape[:-1], count, dtype=torch.int8, device=x.device)
    return found.scatter_reduce(-1, group.expand(x.shape), x.to(torch.int8), "amax").bool()


def at_groups(x: Tensor, group: Tensor) -> Tensor:
    """Return what is known of groups, x [b, h, n, groups], at the group of each key."""
    if group.shape[0] == 1:
        return x.index_select(-1, group.flatten())
    return x.gather(-1, group.expand(*x.shape[:-1], -1))


def best_of_groups(e: Tensor, free: Tensor, group: Tensor, count: int, by: str) -> Tensor:
    """Return the max or sum of scores e [b, h, n, m] over the keys of each group that are free."""
    group = group.expand(e.shape)
    if by == "max":
        none = e.new_full((*e.shape[:-1], count), -torch.inf)
        return none.scatter_reduce(-1, group, e.masked_fill(~free, -torch.inf), "amax")
    none = e.new_zeros(*e.shape[:-1], count)
    return none.scatter_add(-1, group, e.masked_fill(~free, 0))


def score_within(
    e: Tensor, free: Tensor, group: Tensor, count: int, by: str, rows: tuple[Tensor, int] | None
) -> Tensor:
    """Return the score of each group of keys, for `rows` of queries together, by one of these.

    They are max, sum, mean and lse. e and free are [b, h, n, m]; it gives [b, h, n, groups].
    """
    if by == "lse":
        most = score_within(e, free, group, count, "max", rows)
        most = most.masked_fill(most.isinf(), 0)
        rest = (e - at_groups(most, group)).exp()
        return score_within(rest, free, group, count, "sum", rows).log() + most
    kind = "max" if by == "max" else "sum"
    found = best_of_groups(e, free, group, count, kind)
    number = best_of_groups(torch.ones_like(e), free, group, count, "sum")
    if rows is not None:
        some = number > 0
        found = over_rows(found, some, rows, kind)
        number = over_rows(number, some, rows, "sum")
    return found / number.clamp(min=1) if by == "mean" else found


def over_rows(x: Tensor, free: Tensor, rows: tuple[Tensor, int], by: str) -> Tensor:
    """Return the max or sum of x [b, h, n, groups] over the queries that choose together."""
    row, count = rows
    return at_groups(best_of_groups(x.mT, free.mT, row, count, by), row).mT


def any_of_rows(x: Tensor, rows: tuple[Tensor, int]) -> Tensor:
    """Say of which groups, x [b, h, n, groups], something holds for any query of each row's."""
    row, count = rows
    return at_groups(any_of_groups(x.mT, row, count), row).mT


def of_heads(x: Tensor, share: int, heads: int) -> Tensor:
    """Return x [b, h or 1, n, m] with the heads that share in a dimension: [b, h / share, …]."""
    x = x.expand(-1, heads, -1, -1)
    return x.view(x.shape[0], heads // share, share, *x.shape[2:])


def top_groups(e: Tensor, free: Tensor, count: Tensor | int) -> Tensor:
    """Choose the `count` best of scores e [b, h, n, groups] that are free; of equals the first.

    `count` is a number, or one of each row [b, h, n, 1].
    """
    groups, fixed = e.shape[-1], isinstance(count, int)
    if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not fixed):
        return top_of_any(e, free, count)
    room = torch.as_tensor(count, device=e.device)
    most = count if isinstance(count, int) else int(room.max()) if room.numel() else 0
    if fixed and groups <= most:
        return free
    e = torch.where(free, e, -torch.inf)
    if torch.compiler.is_compiling() or bool(e.sum().isnan()):
        e = e.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = e.topk(min(max(most, 1), groups), -1, sorted=not fixed).values
    if fixed:
        chosen = free & (e >= (least := best.amin(-1, keepdim=True)))
    else:
        at = (room - 1).clamp(0, best.shape[-1] - 1).expand(*e.shape[:-1], 1)
        chosen = free & (e >= (least := best.gather(-1, at))) & (room > 0)
    if torch.compiler.is_compiling() or bool((chosen.sum(-1, keepdim=True) > room).any()):
        chosen = first_of_equals(e, chosen, least, room)
    return chosen


def first_of_equals(e: Tensor, chosen: Tensor, least: Tensor, room: Tensor) -> Tensor:
    """Keep so many of what is chosen, of those that are as good as the last the first ones."""
    above = chosen & (e > least)
    equal = chosen & ~above
    return above | (equal & (equal.cumsum(-1) <= room - above.sum(-1, keepdim=True)))


def top_of_any(e: Tensor, free: Tensor, count: Tensor | int) -> Tensor:
    """Choose as `top_groups` does, in one text for any number of groups, which is not asked for.

    Behind them stand as many that are not free as may be missing.
    """
    groups, room = e.shape[-1], torch.as_tensor(count, device=e.device)
    e = torch.where(free, e, -torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    more = max(count, 1) if isinstance(count, int) else 1
    padded = torch.nn.functional.pad(e, (0, more), value=-torch.inf)
    if isinstance(count, int):
        least = padded.topk(more, -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        at = (room - 1).clamp(0, groups).expand(*e.shape[:-1], 1)
        least = padded.sort(-1, descending=True).values.gather(-1, at)
    return first_of_equals(e, free & (e >= least) & (room > 0), least, room)


def best_groups(e: Tensor, free: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `top_groups` chooses as numbers of groups [b, h, n, count], and which there are.

    Where scores next to the last are equal, the map of all is made to tell them apart.
    """
    count = min(count, e.shape[-1])
    best, group = largest_of(torch.where(free, e, -torch.inf), min(count + 1, e.shape[-1]))
    found, group = best[..., :count], group[..., :count]
    unclear = found.isnan() | (found == torch.inf)
    if best.shape[-1] > count:
        last = best[..., count:]
        unclear = unclear | ((found == last) & (last > -torch.inf))
    if bool(unclear.any()) or bool((found == -torch.inf).any() and (free & (e < -1e38)).any()):
        chosen = top_groups(e, free, count)
        ranked = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        return ranked.indices[..., :count], ranked.values[..., :count].bool()
    return group, found > -torch.inf


def largest_of(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `x.topk(count)` does, in less time where there are many more: of equals any.

    They are among those of the four parts of x that have the largest maxima at the same place.
    """
    length = x.shape[-1]
    if length < 8 * count or length % 4:
        best = x.topk(count, -1)
        return best.values, best.indices
    place = largest_of(x.unflatten(-1, (4, -1)).amax(-2), count)[1]
    place = torch.cat([place + part * (length // 4) for part in range(4)], -1)
    best = x.gather(-1, place).topk(count, -1)
    return best.values, place.gather(-1, best.indices)


def groups_above(e: Tensor, free: Tensor, threshold: float) -> Tensor:
    """Choose all of the scores that are free and above a threshold."""
    return free & (e > threshold)


def groups_of_mass(e: Tensor, free: Tensor, share: float) -> Tensor:
    """Choose the fewest of the free scores whose softmax reaches a share; of equals the first."""
    e = e.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    p = e.masked_fill(~free, torch.finfo(e.dtype).min).softmax(-1) * free
    p, order = torch.sort(p, dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    chosen = torch.zeros_like(p, dtype=torch.bool)
    return free & chosen.scatter(-1, order, before < share)
