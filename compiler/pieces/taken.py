"""Tokens that are taken out of their sequences, for a part that runs on them alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .batches import Batch
from .caches import Cache
from .parts import Part


class TakenCache(Part):
    """What a part keeps of the tokens that it was given: each row counts its own."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    @property
    def kept(self) -> dict[str, Tensor]:
        return self.cache.kept

    @kept.setter
    def kept(self, kept: dict[str, Tensor]) -> None:
        assert not kept

    @property
    def missing(self) -> Tensor | None:  # type: ignore[override]
        every = (each.missing for each in self.cache._every())
        return next((each for each in every if each is not None), None)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def limit(self) -> int | None:
        """How many tokens fit, if all are taken; None for any number."""
        return self.cache.limit

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder(rows)

    def reset(self, rows: Tensor) -> None:
        self.cache.reset(None if bool(rows.all()) else rows)

    def mark(self) -> Any:
        return self.cache.mark()

    def restore(self, kept: Any) -> None:
        self.cache.restore(kept)

    def state(self, count: int) -> dict[str, Tensor]:  # noqa: ARG002  it counts them itself
        return self.cache.state_dict()

    def expect(self, kept: dict[str, Tensor]) -> None:
        if "lengths" not in kept:
            raise ValueError("what was stored counts no tokens that are taken")

    def load(self, kept: dict[str, Tensor], rows: int) -> None:  # noqa: ARG002  it knows them
        self.cache.load_state_dict(kept)


def taken(
    batch: Batch, chosen: Tensor, count: int | None, share: float | None, cache: Cache | None
) -> Batch:
    """Return how the chosen tokens stand by themselves, of chosen [rows, n, 1] what is not 0.

    Each keeps its position. `count` or `share` of a sequence are so many at most.
    """
    n = chosen.shape[1]
    live = chosen.detach()[..., 0] != 0
    live = live if batch.live is None else live & batch.live
    most = n
    if torch.compiler.is_exporting():  # one text for all lengths, in which no length is rounded
        pass
    elif batch.run is None and share is not None:
        most = max(1, math.floor(share * n))
    elif batch.run is None and count is not None:
        most = count
    elif live.numel() and not torch.compiler.is_compiling():
        most = max(1, int(live.sum(1).max()))
    doc = batch.segments if not batch.cuts else batch.own if batch.cut and cache is None else None
    past = None if cache is None else cache.past
    positions, cuts, most = batch.positions, batch.cuts, min(most, n)
    within = Batch(chosen, past, live, doc, None, positions, cuts=cuts, most=most)
    if cache is not None and cache.limit is not None and cache.bound + most > cache.limit:
        cache.bound = within.bound = cache.longest
    return within
