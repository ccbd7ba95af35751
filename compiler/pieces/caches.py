"""The cache of a batch, whose rows go their own ways."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Past
from .parts import Part


class Cache:
    """What the tokens so far left behind, for a batch whose rows may differ in length.

    A call of the module with it goes on where every row stands, and moves it on. `parts` are
    what one block keeps, or the caches of the layers of a model.
    """

    def __init__(self, module: nn.Module, batch: int, **parts: Any) -> None:
        weight = next(module.parameters(), torch.empty(0))
        self.kind = type(module).__name__  # the module that it is for
        self.batch, self.dtype, self.device = batch, weight.dtype, weight.device
        self.parts = parts
        self.length = 0  # how many tokens a row was given in all, padding included
        self.front = 0  # how many learned tokens stand before those of each row
        self.bound = 0  # no row has had more tokens of its sequence
        self.rows: Tensor | None = None  # how many each has had [b], where they differ
        self.doc: Tensor | None = None  # the segment of the last token of each row [b]
        self.context: Tensor | None = None  # what was read of it is kept
        self.offered: Tensor | None = None
        self.marked: tuple[Any, ...] | None = None
        self.calls: list[Any] | None = None  # since a mark: what the module was given
        self.call: Any = None  # what it is given now

    # how far it is

    @property
    def since(self) -> int | Tensor:
        """How many tokens each row has had of its sequence: one number, or [b]."""
        return self.bound if self.rows is None else self.rows

    @property
    def longest(self) -> int:
        """How many tokens the longest row has had of its sequence."""
        return self.bound if self.rows is None else int(self.rows.max()) if self.batch else 0

    @property
    def _held(self) -> int:
        """How many tokens the longest row holds, learned ones too."""
        return self.longest + self.front if self.longest else 0

    @property
    def lengths(self) -> Tensor:
        """How many tokens every row has had of its sequence, [b]."""
        return torch.as_tensor(self.since, device=self.device).expand(self.batch).clone()

    @property
    def nbytes(self) -> int:
        """Bytes held, whether written yet or not."""
        return sum(each.nbytes for each in self.parts.values())

    @property
    def kept(self) -> dict[str, Tensor]:
        """All tensors that are held, by name; of a model see each layer."""
        return {name: each for part in self.parts.values() for name, each in part.kept.items()}

    def __getitem__(self, at: int) -> Any:
        return list(self.parts.values())[at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts.values())

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def past(self) -> Past:
        """How far its rows are."""
        return Past(self.since, self.bound, self.doc)

    @property
    def limit(self) -> int | None:
        """How many tokens of a sequence fit; None for any number."""
        limits = [each.limit for each in self.parts.values() if hasattr(each, "limit")]
        least = min((each for each in limits if each is not None), default=None)
        return None if least is None else least - self.front

    def expect(self, batch: Batch, module: nn.Module) -> None:
        """Raise `ValueError` where a call of a module does not fit; nothing is changed."""
        rows, tokens = batch.shape if batch.index is None else batch.index.shape
        if self.kind != type(module).__name__:
            raise ValueError(f"the cache was made by `init_cache` of {self.kind}, not of "
                             f"{type(module).__name__}")  # fmt: skip
        if rows != self.batch:
            raise ValueError(f"the cache is for a batch of {self.batch}; "
                             f"{rows} sequences were given")  # fmt: skip
        weight = next(module.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (self.dtype, self.device):
            raise ValueError(f"the cache was made for a module in {self.dtype} on {self.device}; "
                             f"this one is in {weight.dtype} on {weight.device}")  # fmt: skip
        if batch.given is not None and any(part.counts for part in self._every()):
            raise ValueError("a cache that forgets counts positions itself; leave them out")
        if self.limit is not None and self.bound + tokens > self.limit:
            self.bound = batch.bound = self.longest
            if self.bound + tokens > self.limit:
                raise ValueError(f"the cache holds {self.limit} tokens; "
                                 f"{self.bound + tokens} were given")  # fmt: skip

    def reading(self, context: Tensor | None) -> Tensor | None:
        """Return a context that is to be read, None where what is kept of it serves.

        Raises `ValueError` for another context than the one that is kept.
        """
        known, self.offered = self.context, context
        renewed = any(part.missing is not None for part in self._every())
        if context is None or known is None or renewed:
            return context
        if context is known or (context.shape == known.shape and torch.equal(context, known)):
            return None
        raise ValueError(
            "the cache holds what was read of another context; leave `context` out, "
            "or empty the cache with `reset()`"
        )

    def advance(self, batch: Batch) -> None:
        """Go on after the tokens of a call."""
        after = batch.after
        self.rows = after if isinstance(after, Tensor) else None
        self.length += batch.place.shape[-1]
        self.bound += batch.place.shape[-1]
        self.context = self.context if self.offered is None else self.offered
        if self.calls is not None:
            self.calls.append(self.call)
        doc = batch.segments
        if doc is not None and doc.shape[1]:
            step = torch.arange(doc.shape[1], device=doc.device).expand(doc.shape)
            step = step if batch.live is None else torch.where(batch.live, step, -1)
            last = step.amax(1, keepdim=True)
            own = doc.gather(1, last.clamp(min=0))
            self.doc = torch.where(last < 0, Past(batch.before, 0, self.doc).before(doc), own)[:, 0]

    # rows

    def _every(self) -> Iterator[Part]:
        for each in self.parts.values():
            yield from each._every() if isinstance(each, Cache) else (each,)

    def _caches(self) -> Iterator[Any]:
        yield self
        for each in self.parts.values():
            if isinstance(each, Cache):
                yield from each._caches()

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row `rows[b]` holds, as beam search does; rows is [b']."""
        rows = torch.as_tensor(rows, device=self.device)
        self._expect_rows(rows)
        for part in self._every():
            part.reorder(rows)
        for each in self._caches():
            each.batch = len(rows)
        self.rows = None if self.rows is None else self.rows[rows]
        self.doc = None if self.doc is None else self.doc[rows]
        self.context = None if self.context is None else self.context[rows]
        self.calls = self.marked = None

    def _expect_rows(self, rows: Tensor) -> None:
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise ValueError(f"the cache has rows 0 to {self.batch - 1}, not {rows.tolist()}")

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Empty some rows (their numbers, or true for them [b]), or all: new sequences begin."""
        which = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        if rows is not None:
            given = torch.as_tensor(rows, device=self.device)
            if given.dtype != torch.bool:
                self._expect_rows(given)
            which = given if given.dtype == torch.bool else torch.zeros_like(which).index_fill(
                0, given, True)  # fmt: skip
            if which.shape != (self.batch,):
                raise ValueError(f"`rows` are numbers below {self.batch}, or {self.batch} truths; "
                                 f"they are {list(given.shape)}")  # fmt: skip
        for part in self._every():
            part.reset(which)
        if rows is None:
            self.length, self.bound = 0, 0
            self.rows = self.doc = self.context = None
        else:
            self.rows = torch.where(which, 0, self.lengths)
            self.doc = None if self.doc is None else torch.where(which, 0, self.doc)
        self.calls = self.marked = None

    # going back

    def mark(self) -> tuple[Any, ...]:
        """Return what `restore` goes back to; `crop` reaches back to the last mark."""
        parts = [part.mark() for part in self._every()]
        stand = (self.batch, self.length, self.bound, self.rows, self.doc, self.context)
        self.marked, self.calls = (*stand, parts), []
        return self.marked

    def restore(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark; later ones are lost."""
        batch, self.length, self.bound, self.rows, self.doc, self.context, parts = mark
        for each in self._caches():
            each.batch = batch
        for part, kept in zip(self._every(), parts, strict=True):
            part.restore(kept)
        self.marked, self.calls = mark, []

    def crop(self, length: int | Tensor) -> None:
        """Keep the first `length` tokens of every row's sequence, a number or [b].

        Below 0 it says how many are taken back. Rings, states and convolutions need a `mark`
        that was set no later than there: what was accepted since then is computed again.
        """
        now, length_now = self.lengths, self.length
        wanted = torch.as_tensor(length, device=self.device).expand(self.batch)
        wanted = torch.minimum(torch.where(wanted < 0, now + wanted, wanted), now)
        if bool((wanted < 0).any()):
            raise ValueError(f"only {int(now.min())} tokens can be taken back, not {length}")
        if bool((wanted == now).all()):
            return
        if all(part.shrinks for part in self._every()):
            self._stand(wanted)
            self.length = length_now - int((now - wanted).min())
            return
        calls, marked = self.calls, self.marked
        if marked is None or calls is None:
            raise ValueError("a ring, a state and a convolution go back only to where "
                             "`cache.mark()` was called, or after")  # fmt: skip
        bound, rows = marked[2:4]
        began = torch.as_tensor(bound if rows is None else rows, device=self.device)
        if bool((wanted < began).any()):
            raise ValueError(f"the last mark stands at {began.tolist()} tokens; "
                             f"{wanted.tolist()} are before it")  # fmt: skip
        if any(each[2] for each in calls):
            raise ValueError("new sequences began since the mark; go back to it with `restore`")
        self.restore(marked)
        left = wanted - began
        for module, inputs, _ in calls:
            live = inputs.get("attention_mask")
            x = inputs["x"]
            live = x.new_ones(x.shape[:2], dtype=torch.bool) if live is None else live.bool()
            count = live.cumsum(1)
            stays = live & (count <= left[:, None])
            left = left - stays.sum(1)
            if bool(stays.any()):
                with torch.no_grad():
                    inputs = {**inputs, "attention_mask": stays, "context": None}
                    module(inputs.pop("x"), cache=self, **inputs)
        self.length = length_now - int((now - wanted).min())

    def _stand(self, lengths: Tensor) -> None:
        """Let the rows be so far."""
        self.bound = int(lengths.max()) if len(lengths) else 0
        same = bool((lengths == self.bound).all())
        self.rows = None if same else lengths.expand(self.batch).clone()

    def note(self, module: Any, cut: bool, **given: Any) -> None:
        """Remember a call until it is done, and from a mark on."""
        self.call = (module, {k: v for k, v in given.items() if v is not None}, cut)

    def also(self, **given: Any) -> None:
        """Remember what else a call is given."""
        self.call[1].update(given)

    # elsewhere

    def copy(self) -> Any:
        """Return a cache that goes on by itself from here."""
        calls, marked = self.calls, self.marked
        self.calls = self.marked = None
        made = copy.deepcopy(self)
        self.calls, self.marked = calls, marked
        return made

    def state_dict(self) -> dict[str, Tensor]:
        """Return all it holds as tensors by name, to be stored."""
        state = {"lengths": self.lengths}
        more = {"doc": self.doc, "context": self.context}
        state |= {name: each for name, each in more.items() if each is not None}
        for at, part in enumerate(self._every()):
            state |= {f"{at}.{name}": x for name, x in part.state(self._held).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what was stored, of as many rows, or of one row for all."""
        parts = list(self._every())
        found = {int(name.partition(".")[0]) for name in state if "." in name}
        if "lengths" not in state or not found <= set(range(len(parts))):
            raise ValueError(f"this is no state of a cache of {self.kind}")
        for at, part in enumerate(parts):
            part.expect({name.partition(".")[2]: x for name, x in state.items()
                         if name.startswith(f"{at}.")})  # fmt: skip
        lengths = state["lengths"].to(self.device)
        if len(lengths) not in (1, self.batch):
            raise ValueError(f"the cache is for a batch of {self.batch}; "
                             f"{len(lengths)} rows were stored")  # fmt: skip
        for at, part in enumerate(parts):
            own = {name.partition(".")[2]: x.to(self.device)
                   for name, x in state.items() if name.startswith(f"{at}.")}  # fmt: skip
            if own:
                part.load(own, self.batch)
        self._stand(lengths)
        self.length = self.bound
        self.doc = state["doc"].to(self.device).expand(self.batch) if "doc" in state else None
        context = state.get("context")
        self.context = context if context is None else context.to(self.device).expand(
            self.batch, *context.shape[1:])  # fmt: skip
        self.calls = self.marked = None


def begin(
    module: nn.Module,
    x: Tensor,
    cache: Cache | None,
    attention_mask: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
    *,
    cuts: bool = True,
    rows: bool = False,
    begins: bool = True,
) -> Batch:
    """Return how the tokens of a call stand; raise `ValueError` where the cache does not fit.

    Without `begins`, a row of a cache holds one sequence until it is reset.
    """
    if cache is not None and not hasattr(cache, "past"):
        raise ValueError(f"`cache` comes from `init_cache` of a module, it is {type(cache)}")
    past = None if cache is None else cache.past
    rows = rows and cache is None
    batch = Batch(x, past, attention_mask, segments, cu_seqlens, positions, cuts=cuts, rows=rows)
    if cache is not None:
        continued = batch.changed is not None and not bool(batch.changed.any())
        if batch.cut and not begins and not continued:
            raise ValueError("with a cache, a row of this module holds one sequence: give others "
                             "rows of their own, or end it with `cache.reset(rows)`")  # fmt: skip
        cache.expect(batch, module)
        new = batch.cut or cu_seqlens is not None
        cache.note(module, new, x=x, attention_mask=attention_mask, positions=positions)
    return batch


def finish(y: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
    """Lay the result of a call out as what was given; the cache goes on."""
    if cache is not None:
        cache.advance(batch)
    return batch.give(y)
