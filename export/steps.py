"""A module with its cache as inputs and outputs: what a program is that has no objects.

    first = First(module)           # y, *cache = first(x)
    step = Step(module, spec)       # y, *cache = step(x, *cache)

A cache is a list of tensors: how many tokens each row has had [b], then all that is kept. What
grows with the sequence has room for the tokens so far, [b, …, c, d], and comes back with room for
those of the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """One tensor of a cache: which part keeps it, by what name."""

    part: int  # of all parts; -1 for how many tokens the rows have had
    name: str
    cache: int = 0  # whose rows these are, where parts count their own


class First(nn.Module):
    """The first call of sequences: gives y and the cache after it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, x: Tensor, context: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Map x [b, n, …] to y, and the tensors of the cache after it."""
        cache = _begun(self.module, x)
        for each in _counting(cache):
            each.rows = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        y = self.module(x, cache=cache, **_given(context=context, condition=condition))
        return (y, *_tensors(cache))


class Step(nn.Module):
    """A later call: goes on after the tensors of a cache, which are left as they are."""

    def __init__(self, module: nn.Module, spec: tuple[Kept, ...], room: int | None) -> None:
        super().__init__()
        self.module, self.spec, self.room = module, spec, room

    def forward(
        self, x: Tensor, cache: list[Tensor], condition: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Map x [b, 1, …] and the tensors of a cache to y, and those after it."""
        made = _begun(self.module, x)
        bound = _NEVER if self.room is None else cache[self.room].shape[-2] - made.front
        _restored(made, self.spec, cache, bound)
        y = self.module(x, cache=made, **_given(condition=condition))
        return (y, *_tensors(made))


def _given(**given: Tensor | None) -> dict[str, Tensor]:
    """Return the arguments that there are."""
    return {name: each for name, each in given.items() if each is not None}


_NEVER = 2**30  # more tokens than any row has had, where nothing that is kept tells how many


def spec_of(module: nn.Module, x: Tensor, given: dict[str, Tensor]) -> tuple[Kept, ...]:
    """Return what the tensors of a cache are, after a call."""
    cache = _begun(module, x)
    for each in _counting(cache):
        each.rows = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    with torch.no_grad():
        module(x, cache=cache, **given)
    return tuple(kept for kept, _ in _every(cache))


def _begun(module: nn.Module, x: Tensor) -> Any:
    """Return an empty cache whose parts make exactly the room that is needed."""
    made: Any = module
    cache = made.init_cache(x.shape[0])
    for part, _ in _parts(cache):
        if _grows(part):
            part._make_room = _Exactly(part)
    return cache


@dataclass(frozen=True)
class _Exactly:
    """Makes room for so many tokens, without asking how many there are: that would be a guard."""

    part: Any

    def __call__(self, tokens: Any) -> None:
        first = isinstance(self.part.capacity, int) and not self.part.capacity
        more = tokens if first else _AT_A_STEP
        self.part.capacity = tokens
        self.part.kept = {
            name: torch.cat([x, x.new_zeros(*x.shape[:-2], more, x.shape[-1])], -2).narrow(
                -2, 0, tokens
            )
            for name, x in self.part.kept.items()
        }


_AT_A_STEP = 2  # no step adds more tokens, or groups of them, of which some room may be spare


def _grows(part: Any) -> bool:
    return getattr(part, "grows", False) and not part.is_ring


def _parts(cache: Any, counts: int = 0) -> Iterator[tuple[Any, int]]:
    """Yield all parts, and which of the caches that count tokens each belongs to."""
    seen = counts
    for part in cache._every():
        if hasattr(part, "cache"):  # tokens that are taken: it counts its own
            seen += 1
            yield from _parts(part.cache, seen)
        else:
            yield part, counts


def _counting(cache: Any) -> list[Any]:
    """Return the caches that count the tokens of their rows: it, and those of tokens taken."""
    inner = [part.cache for part in cache._every() if hasattr(part, "cache")]
    return [cache, *(each for one in inner for each in _counting(one))]


def _every(cache: Any) -> Iterator[tuple[Kept, Tensor]]:
    for at, each in enumerate(_counting(cache)):
        yield Kept(-1, "lengths", at), each.rows
    for at, (part, _) in enumerate(_parts(cache)):
        for name, x in part.kept.items():
            yield Kept(at, name), x


def _tensors(cache: Any) -> list[Tensor]:
    return [x.contiguous() for _, x in _every(cache)]


def _restored(cache: Any, spec: tuple[Kept, ...], tensors: list[Tensor], bound: Any) -> None:
    """Put tensors into a new cache; what a call changes is copied."""
    counting, parts = _counting(cache), [part for part, _ in _parts(cache)]
    held: dict[int, dict[str, Tensor]] = {}
    for kept, x in zip(spec, tensors, strict=True):
        if kept.part < 0:
            counting[kept.cache].rows = x
        else:
            held.setdefault(kept.part, {})[kept.name] = x.clone()
    for at, own in held.items():
        parts[at].kept = own
        if hasattr(parts[at], "capacity"):
            parts[at].capacity = next(iter(own.values())).shape[-2]
    for each in counting:
        each.bound = bound
    cache.context = next(iter(tensors))  # what was read of it is kept
