"""What the tokens so far left behind."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """What the tokens so far left behind, by name."""

    def __init__(self, **kept: Tensor) -> None:
        self.length = 0
        self.kept = kept

    @property
    def nbytes(self) -> int:
        """Bytes held, whether written yet or not."""
        return sum(each.nbytes for each in self.kept.values())


class KeyValueCache(Cache):
    """What the tokens so far left behind for later queries to read.

    `sizes` says what is kept of each token: name → (heads or None, features). With a `ring`,
    only the first `prefix` tokens and the last `ring` are kept.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        sizes: dict[str, tuple[int | None, int]],
        ring: int | None = None,
        prefix: int = 0,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.is_ring = ring is not None and prefix + ring < length
        self.capacity = prefix + ring if ring is not None and self.is_ring else length
        self.positions: Tensor | None = None  # kept only where they are not 0, 1, 2 …
        self.kept = {
            name: torch.zeros(
                (batch, self.capacity, dim)
                if heads is None
                else (batch, heads, self.capacity, dim),
                dtype=torch.int64 if name == "doc" else dtype,
                device=device,
            )
            for name, (heads, dim) in sizes.items()
        }

    def update(self, positions: Tensor | None, **new: Tensor) -> tuple[Tensor, ...]:
        """Take up new tokens; return all that is visible now, and the positions j of its keys."""
        start, count = self.length, next(iter(new.values())).shape[-2]
        end = start + count
        if end > self.capacity and not self.is_ring:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were given")
        for name, each in new.items():
            if each.shape[0] != self.kept[name].shape[0]:
                raise ValueError(f"the cache is for a batch of {self.kept[name].shape[0]}; "
                                 f"{each.shape[0]} sequences were given")  # fmt: skip
        if self.is_ring and positions is not None:
            raise ValueError("a cache that forgets counts positions itself; leave them out")
        index = torch.arange(start, end, device=next(iter(new.values())).device)
        self.length = end
        if end <= self.capacity or count == 1:
            self._write(index, new)
            held = min(end, self.capacity)
            return (*(each[..., :held, :] for each in self.kept.values()),
                    self._places(positions, start, held))  # fmt: skip
        held = min(start, self.capacity)
        joined = [
            torch.cat([old[..., :held, :], new[name]], dim=-2) for name, old in self.kept.items()
        ]
        places = torch.cat([self._slots(start, held), index])
        keep = (index < self.prefix) | (index >= end - (self.capacity - self.prefix))
        self._write(index[keep], {name: each[..., keep, :] for name, each in new.items()})
        return (*joined, places)

    def _write(self, index: Tensor, new: dict[str, Tensor]) -> None:
        ring = max(1, self.capacity - self.prefix)
        slots = torch.where(
            index < self.prefix, index, self.prefix + (index - self.prefix) % ring
        ) if self.is_ring else index  # fmt: skip
        for name, each in new.items():
            self.kept[name].index_copy_(self.kept[name].ndim - 2, slots,
                                        each.detach().to(self.kept[name].dtype))  # fmt: skip

    def _slots(self, length: int, held: int) -> Tensor:
        """Return the position that each of the first `held` slots holds after `length` tokens."""
        slot = torch.arange(held, device=next(iter(self.kept.values())).device)
        if length <= self.capacity:
            return slot
        ring = self.capacity - self.prefix
        latest = length - 1 - (length - 1 - slot) % ring
        return torch.where(slot < self.prefix, slot, latest)

    def _places(self, positions: Tensor | None, start: int, held: int) -> Tensor:
        if positions is None and self.positions is None:
            return self._slots(self.length, held)
        count = self.length - start
        device = next(iter(self.kept.values())).device
        if self.positions is None:
            batch = next(iter(self.kept.values())).shape[0]
            self.positions = torch.arange(self.capacity, device=device).repeat(batch, 1)
        new = torch.arange(start, self.length, device=device) if positions is None else positions
        self.positions[:, start : start + count] = new
        return self.positions[:, :held]


class ContextCache(Cache):
    """The keys and values of a context, computed once."""


class StateCache(Cache):
    """The states of a recurrence after the tokens so far."""

    doc: Tensor | None = None  # the segment of the last token, where segments are given


class TailCache(Cache):
    """The last tokens that stages with a memory have read."""

    def before(self, name: str, x: Tensor, count: int) -> Tensor:
        """Return the `count` tokens before x [..., n, d], zeros at first; keep the last of x."""
        empty = x.new_zeros(*x.shape[:-2], count, x.shape[-1])
        old = self.kept.get(name, empty)
        self.kept[name] = torch.cat([old, x], dim=-2)[..., -count:, :].detach()
        return old


class BlockCache:
    """The caches of a block that keeps several things, by name."""

    def __init__(self, **parts: Cache) -> None:
        self.length = 0
        self.parts = parts

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self.parts.values())
