"""What the tokens so far left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Past


class Part:
    """One kind of what the tokens left behind: tensors [b, …] by name."""

    shrinks = False  # whether tokens can be taken back without having noted what was before

    def __init__(self, **kept: Tensor) -> None:
        self.kept = kept

    @property
    def nbytes(self) -> int:
        """Bytes held, whether written yet or not."""
        return sum(each.nbytes for each in self.kept.values())

    def reorder(self, rows: Tensor) -> None:
        """Let every row go on from what row `rows[row]` holds."""
        self.kept = {name: each.index_select(0, rows) for name, each in self.kept.items()}

    def reset(self, rows: Tensor) -> None:
        """Empty the rows that are true."""
        self.kept = {name: torch.where(by_row(rows, each), 0, each)
                     for name, each in self.kept.items()}  # fmt: skip

    def mark(self) -> dict[str, Tensor]:
        """Return what brings back what is held now."""
        return dict(self.kept)

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go back to what was marked."""
        self.kept = dict(kept)

    def state(self, count: int) -> dict[str, Tensor]:
        """Return what `count` tokens left, to be stored."""
        return dict(self.kept)

    def load(self, kept: dict[str, Tensor], rows: int) -> None:
        """Take up what was stored; one row is for all."""
        self.kept = {name: each.expand(rows, *each.shape[1:]).clone()
                     for name, each in kept.items()}  # fmt: skip


class KeyValueCache(Part):
    """What the tokens so far left behind for later queries to read.

    `sizes` says what is kept of each token: name → (heads or None, features). With a `ring`,
    only the first `prefix` tokens of a sequence and the last `ring` are kept. A token stands in
    the slot of its number in its sequence; a new sequence takes the slots of the one before.
    Without a `length`, room is made as it is needed.
    """

    def __init__(
        self,
        batch: int,
        length: int | None,
        sizes: dict[str, tuple[int | None, int]],
        ring: int | None = None,
        prefix: int = 0,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.prefix, self.grows = prefix, length is None
        self.is_ring = ring is not None and (length is None or prefix + ring < length)
        self.capacity = prefix + ring if ring is not None and self.is_ring else length or 0
        self.marked = False  # whether what is held must outlive a new sequence
        super().__init__(**{
            name: torch.zeros(
                (batch, self.capacity, dim)
                if heads is None
                else (batch, heads, self.capacity, dim),
                dtype=torch.int64 if name == "doc" else dtype,
                device=device,
            )
            for name, (heads, dim) in sizes.items()
        })  # fmt: skip

    @property
    def shrinks(self) -> bool:  # type: ignore[override]
        return not self.is_ring

    @property
    def limit(self) -> int | None:
        """How many tokens fit; None for any number."""
        return None if self.is_ring or self.grows else self.capacity

    def update(self, batch: Batch, **new: Tensor) -> tuple[Any, ...]:
        """Take up new tokens.

        Returns all that can be visible now, the positions of its keys, and the number of each
        one's sequence (None where all are of the only one). Of what earlier calls brought,
        gradients are not kept.
        """
        count, held = batch.place.shape[-1], batch.bound
        self._make_room(held + count)
        if batch.given is not None or "positions" in self.kept:
            if self.is_ring:
                raise ValueError("a cache that forgets counts positions itself; leave them out")
            self._note_positions()
            new = {**new, "positions": batch.positions.expand(len(self), count)[..., None]}
        if batch.cut or (self.is_ring and count > 1 and held + count > self.capacity):
            first = min(held, self.capacity)
            places, run = self._slots(batch.before, first)
            found = {name: torch.cat([each[..., :first, :].to(new[name].dtype), new[name]], dim=-2)
                     for name, each in self.kept.items()}  # fmt: skip
            if batch.run is None:
                places = torch.cat([places, batch.place])
            else:
                both = (len(self), -1)
                places = torch.cat([places.expand(both), batch.place.expand(both)], 1)
                run = torch.cat([run.expand(both), batch.run], 1)
            self._write(batch, new)
        else:
            first = min(held + count, self.capacity)
            found = {name: x[..., :first, :] for name, x in self._write(batch, new).items()}
            places, run = self._slots(batch.after, first)
            run = run.expand(len(self), -1)
        if "positions" in found:
            places = found.pop("positions")[..., 0]
        return (*found.values(), places, None if batch.run is None else run)

    def __len__(self) -> int:
        return next(iter(self.kept.values())).shape[0]

    def _note_positions(self) -> None:
        """Make room for the positions of keys, where they are not their numbers."""
        if "positions" not in self.kept:
            slot = torch.arange(self.capacity, device=next(iter(self.kept.values())).device)
            self.kept["positions"] = slot.repeat(len(self), 1)[..., None]

    def _make_room(self, tokens: int) -> None:
        if self.is_ring or tokens <= self.capacity:
            return
        if not self.grows:
            raise ValueError(f"the cache holds {self.capacity} tokens; {tokens} were given")
        more = max(tokens, 2 * self.capacity, 64) - self.capacity
        self.capacity += more
        self.kept = {name: torch.nn.functional.pad(each, (0, 0, 0, more))
                     for name, each in self.kept.items()}  # fmt: skip

    def _slot(self, place: Tensor) -> Tensor:
        """Return the slot of the token with a number in its sequence."""
        if not self.is_ring:
            return place
        ring = max(1, self.capacity - self.prefix)
        return torch.where(place < self.prefix, place, self.prefix + (place - self.prefix) % ring)

    def _write(self, batch: Batch, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put new tokens into their slots: of the last sequence of a row, what is kept of it.

        Returns all that is held then, with the gradients of the new.
        """
        if batch.cut and self.marked:
            self._apart()
        if not batch.place.shape[-1] or not self.capacity:
            return self.kept
        if batch.run is None:
            slot, source, any_ = self._slots_of_all(batch)
        else:
            slot, source, any_ = self._slots_by_row(batch, batch.run)
        learns = torch.is_grad_enabled() and any(each.requires_grad for each in new.values())
        done = {}
        for name, each in new.items():
            held = self.kept[name]
            values = each.to(held.dtype) if learns else each.detach().to(held.dtype)
            if any_ is None:
                values = values if source is None else values[..., source, :]
                write = held.index_copy if learns else held.index_copy_
                done[name] = write(held.ndim - 2, slot, values)
                continue
            to, of = (by_token(at, held).expand(each.shape) for at in (slot, source))
            values = torch.where(by_row(any_, held), values.gather(-2, of), held.gather(-2, to))
            write = held.scatter if learns else held.scatter_
            done[name] = write(held.ndim - 2, to, values)
        if learns:  # what a later call writes leaves alone what this one has read
            self.kept = {name: each.detach().clone() for name, each in done.items()}
        return done

    def _slots_of_all(self, batch: Batch) -> tuple[Tensor, Tensor | None, None]:
        """Return the slots [t] that are written and, where not all tokens are kept, by which."""
        place = batch.place
        if not self.is_ring:
            return place, None, None
        ring = self.capacity - self.prefix
        stays = (place < self.prefix) | (place >= batch.bound + len(place) - ring)
        return self._slot(place[stays]), stays, None

    def _slots_by_row(self, batch: Batch, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slots [b, n] of every row, the tokens they are written by, and rows with any.

        What does not stay writes once more what the last token that stays has written.
        """
        rows, count = run.shape
        place = batch.place.expand(rows, count)
        last = run.amax(1, keepdim=True)
        stays = (run == last) & (last >= 0)
        if self.is_ring:
            after = torch.as_tensor(batch.after, device=run.device).expand(rows)[:, None]
            stays &= (place < self.prefix) | (place >= after - (self.capacity - self.prefix))
        step = torch.arange(count, device=run.device)
        final = torch.where(stays, step, 0).amax(1, keepdim=True)
        source, any_ = torch.where(stays, step, final), stays.any(1)
        slot = self._slot(place).gather(1, source)
        return torch.where(any_[:, None], slot, 0), source, any_

    def _slots(self, length: int | Tensor, held: int) -> tuple[Tensor, Tensor]:
        """Return the number in its sequence of what each slot holds, and its run: -2 for nothing.

        They are [held] or, for the length of every row, [b, held].
        """
        slot = torch.arange(held, device=next(iter(self.kept.values())).device)
        length = length[:, None] if isinstance(length, Tensor) else torch.as_tensor(length)
        place = slot
        if self.is_ring:
            ring = max(1, self.capacity - self.prefix)
            latest = length - 1 - (length - 1 - slot) % ring
            place = torch.where(slot < self.prefix, slot, latest)
        holds = (place < length) & (place >= torch.clamp(slot, max=self.prefix))
        return place, torch.where(holds, 0, -2)

    def reset(self, rows: Tensor) -> None:
        """Nothing is to be emptied: slots past the length of a row are not read."""
        if self.marked:
            self._apart()

    def _apart(self) -> None:
        self.kept = {name: each.clone() for name, each in self.kept.items()}
        self.marked = False

    def mark(self) -> dict[str, Tensor]:
        """Return what brings back what is held now: a ring is copied, slots to come are not."""
        if self.is_ring:
            return {name: each.clone() for name, each in self.kept.items()}
        self.marked = True
        return dict(self.kept)

    def restore(self, kept: dict[str, Tensor]) -> None:
        if self.is_ring:
            kept = {name: each.clone() for name, each in kept.items()}
        self.kept, self.marked = dict(kept), not self.is_ring
        self.capacity = next(iter(kept.values())).shape[-2]

    def state(self, count: int) -> dict[str, Tensor]:
        return {name: each[..., : min(count, self.capacity), :].clone()
                for name, each in self.kept.items()}  # fmt: skip

    def load(self, kept: dict[str, Tensor], rows: int) -> None:
        held = next(iter(kept.values())).shape[-2]
        self._make_room(held)
        if "positions" in kept:
            self._note_positions()
        for name, each in kept.items():
            self.kept[name][..., :held, :] = each.to(self.kept[name])


class ContextCache(Part):
    """What is made of a context, computed once."""

    shrinks = True
    missing: Tensor | None = None  # the rows [b] that have none yet

    def serves(self, context: Tensor | None) -> bool:
        """Say whether what is kept is all that is needed."""
        return context is None and bool(self.kept) and self.missing is None

    def keep(self, run: Tensor | None, **made: Tensor) -> tuple[Any, ...]:
        """Keep what was made of a context, of the rows that lack it; return what serves now.

        `run` [b, m] is -1 at padding, or None where there is none.
        """
        if self.missing is not None:
            like = next(iter(made.values()))
            batch, tokens = len(like), like.shape[-2]
            run = like.new_zeros(batch, tokens, dtype=torch.int64) if run is None else run
            old = next(iter(self.kept.values()))
            zeros = torch.zeros(batch, old.shape[-2], dtype=torch.int64, device=old.device)
            held = {"run": zeros, **self.kept}
            run = joined_rows(self.missing, run, held.pop("run"), -1)
            made = {name: joined_rows(self.missing, each, held[name])
                    for name, each in made.items()}  # fmt: skip
        self.kept = {name: each.detach() for name, each in made.items()}
        self.kept |= {} if run is None else {"run": run}
        self.missing = None
        return (*made.values(), run)

    def brought(self) -> tuple[Any, ...]:
        """Return what is kept, and the run of its tokens."""
        run = self.kept.get("run")
        return (*(each for name, each in self.kept.items() if name != "run"), run)

    def reset(self, rows: Tensor) -> None:
        if bool(rows.all()):
            self.kept, self.missing = {}, None
        elif self.kept:
            self.missing = rows if self.missing is None else self.missing | rows


class StateCache(Part):
    """The states of a recurrence after the tokens so far; `begin` makes those before the first."""

    def __init__(self, **kept: Tensor) -> None:
        super().__init__(**kept)
        self.first = {name: each[:1] for name, each in kept.items()}

    def keep(self, **states: Tensor) -> None:
        """Keep the states after the tokens so far."""
        self.kept = {name: each.detach() for name, each in states.items()}

    def reset(self, rows: Tensor) -> None:
        self.kept = {name: torch.where(by_row(rows, each), self.first[name], each)
                     for name, each in self.kept.items()}  # fmt: skip


class TailCache(Part):
    """The last tokens that stages with a memory have read."""

    def before(self, name: str, x: Tensor, count: int, batch: Batch) -> tuple[Tensor, Any]:
        """Return the `count` tokens before x [..., n, d] and what is known of their sequence.

        They are zeros at first. The last tokens of x are kept for the next call.
        """
        old = self.kept.get(name)
        if old is None:
            old = x.new_zeros(*x.shape[:-2], count, x.shape[-1])
        every = torch.cat([old, x], dim=-2)
        if batch.run is None:
            self.kept[name] = every[..., every.shape[-2] - count :, :].detach()
            return old, None
        ends = (batch.run >= 0).sum(1)[:, None] + torch.arange(count, device=x.device)
        self.kept[name] = every.gather(-2, by_token(ends, x).expand(old.shape)).detach()
        back = torch.arange(count, 0, -1, device=x.device)
        known = back <= torch.as_tensor(batch.before, device=x.device).expand(len(x))[:, None]
        return old, torch.cat([torch.where(known, 0, -2), batch.run], 1)


class Cache:
    """What the tokens so far left behind, for a batch whose rows may differ in length.

    A call of the module with it goes on where every row stands, and moves it on. `parts` are
    what one block keeps, or the caches of the layers of a model.
    """

    def __init__(self, batch: int, weight: Tensor, **parts: Any) -> None:
        self.batch, self.dtype, self.device = batch, weight.dtype, weight.device
        self.parts = parts
        self.bound = 0  # no row has had more tokens
        self.rows: Tensor | None = None  # how many each has had [b], where they differ
        self.doc: Tensor | None = None  # the segment of the last token of each row [b]
        self.context: Tensor | None = None  # what was read of it is kept
        self.offered: Tensor | None = None
        self.marked: tuple[Any, ...] | None = None
        self.calls: list[Any] | None = None  # since a mark: what the module was given

    # how far it is

    @property
    def since(self) -> int | Tensor:
        """How many tokens each row has had of its sequence: one number, or [b]."""
        return self.bound if self.rows is None else self.rows

    @property
    def length(self) -> int:
        """How many tokens the longest row has had of its sequence."""
        return self.bound if self.rows is None else int(self.rows.max()) if self.batch else 0

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
        return min((each for each in limits if each is not None), default=None)

    def expect(self, batch: Batch, module: nn.Module) -> None:
        """Raise `ValueError` where a call of a module does not fit; nothing is changed."""
        rows, tokens = batch.shape if batch.index is None else batch.index.shape
        if rows != self.batch:
            raise ValueError(f"the cache is for a batch of {self.batch}; "
                             f"{rows} sequences were given")  # fmt: skip
        weight = next(module.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (self.dtype, self.device):
            raise ValueError(f"the cache was made for a module in {self.dtype} on {self.device}; "
                             f"this one is in {weight.dtype} on {weight.device}")  # fmt: skip
        if self.limit is not None and self.bound + tokens > self.limit:
            self.bound = batch.bound = self.length
            if self.bound + tokens > self.limit:
                raise ValueError(f"the cache holds {self.limit} tokens; "
                                 f"{self.bound + tokens} were given")  # fmt: skip

    def reading(self, context: Tensor | None) -> Tensor | None:
        """Return a context that is to be read, None where what is kept of it serves.

        Raises `ValueError` for another context than the one that is kept.
        """
        known, self.offered = self.context, context
        if context is None or known is None or any(
            isinstance(part, ContextCache) and part.missing is not None for part in self._every()
        ):
            return context
        if context is known or (context.shape == known.shape and torch.equal(context, known)):
            return None
        raise ValueError("the cache holds what was read of another context; leave `context` out, "
                         "or empty the cache with `reset()`")

    def advance(self, batch: Batch) -> None:
        """Go on after the tokens of a call."""
        after = batch.after
        self.rows = after if isinstance(after, Tensor) else None
        self.bound += batch.place.shape[-1]
        self.context = self.context if self.offered is None else self.offered
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

    def _caches(self) -> Iterator[Cache]:
        yield self
        for each in self.parts.values():
            if isinstance(each, Cache):
                yield from each._caches()

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row `rows[b]` holds, as beam search does; rows is [b']."""
        rows = torch.as_tensor(rows, device=self.device)
        for part in self._every():
            part.reorder(rows)
        for each in self._caches():
            each.batch = len(rows)
        self.rows = None if self.rows is None else self.rows[rows]
        self.doc = None if self.doc is None else self.doc[rows]
        self.context = None if self.context is None else self.context[rows]
        self.calls = self.marked = None

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Empty some rows (their numbers, or true for them [b]), or all: new sequences begin."""
        which = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        if rows is not None:
            given = torch.as_tensor(rows, device=self.device)
            which = given if given.dtype == torch.bool else torch.zeros_like(which).index_fill(
                0, given, True)  # fmt: skip
            if which.shape != (self.batch,):
                raise ValueError(f"`rows` must be numbers below {self.batch}, or "
                                 f"[{self.batch}] truths, they are {list(given.shape)}")  # fmt: skip
        for part in self._every():
            part.reset(which)
        if rows is None:
            self.bound, self.rows, self.doc, self.context = 0, None, None, None
        else:
            self.rows = torch.where(which, 0, self.lengths)
            self.doc = None if self.doc is None else torch.where(which, 0, self.doc)
        self.calls = self.marked = None

    # going back

    def mark(self) -> tuple[Any, ...]:
        """Return what `restore` goes back to; `crop` reaches back to the last mark."""
        parts = [part.mark() for part in self._every()]
        self.marked, self.calls = (self.bound, self.rows, self.doc, parts), []
        return self.marked

    def restore(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark; later ones are lost."""
        self.bound, self.rows, self.doc, parts = mark
        for part, kept in zip(self._every(), parts, strict=True):
            part.restore(kept)
        self.marked, self.calls = mark, []

    def crop(self, length: int | Tensor) -> None:
        """Keep the first `length` tokens of every row's sequence, a number or [b].

        Below 0 it says how many are taken back. Rings, states and convolutions need a `mark`
        that was set no later than there: what was accepted since then is computed again.
        """
        now = self.lengths
        wanted = torch.as_tensor(length, device=self.device).expand(self.batch)
        wanted = torch.minimum(torch.where(wanted < 0, now + wanted, wanted), now)
        if bool((wanted < 0).any()):
            raise ValueError(f"only {int(now.min())} tokens can be taken back, not {length}")
        if bool((wanted == now).all()):
            return
        if all(part.shrinks for part in self._every()):
            self._stand(wanted)
            return
        calls, marked = self.calls, self.marked
        if marked is None or calls is None:
            raise ValueError("a ring, a state and a convolution go back only to where "
                             "`cache.mark()` was called, or after")  # fmt: skip
        bound, rows = marked[:2]
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

    def _stand(self, lengths: Tensor) -> None:
        """Let the rows be so far."""
        self.bound = int(lengths.max()) if len(lengths) else 0
        same = bool((lengths == self.bound).all())
        self.rows = None if same else lengths.expand(self.batch).clone()

    def note(self, module: Any, cut: bool, **given: Any) -> None:
        """Remember a call since the last mark."""
        if self.calls is not None:
            self.calls.append((module, {k: v for k, v in given.items() if v is not None}, cut))

    # elsewhere

    def copy(self) -> Cache:
        """Return a cache that goes on by itself from here."""
        calls, marked = self.calls, self.marked
        self.calls = self.marked = None
        made = copy.deepcopy(self)
        self.calls, self.marked = calls, marked
        return made

    def state_dict(self) -> dict[str, Tensor]:
        """Return all it holds as tensors by name, to be stored."""
        state = {"lengths": self.lengths}
        if self.doc is not None:
            state["doc"] = self.doc
        for at, part in enumerate(self._every()):
            state |= {f"{at}.{name}": x for name, x in part.state(self.length).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what was stored, of as many rows, or of one row for all."""
        lengths = state["lengths"].to(self.device)
        if len(lengths) not in (1, self.batch):
            raise ValueError(f"the cache is for a batch of {self.batch}; "
                             f"{len(lengths)} rows were stored")  # fmt: skip
        for at, part in enumerate(self._every()):
            own = {name.partition(".")[2]: x.to(self.device)
                   for name, x in state.items() if name.startswith(f"{at}.")}  # fmt: skip
            if own:
                part.load(own, self.batch)
        self._stand(lengths)
        self.doc = state["doc"].to(self.device).expand(self.batch) if "doc" in state else None
        self.calls = self.marked = None


def by_row(rows: Tensor, x: Tensor) -> Tensor:
    """Lay one number a row [b] along x [b, …]."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def by_token(at: Tensor, x: Tensor) -> Tensor:
    """Lay one number a token [b, n] along x [b, (heads,) n, d]."""
    return at[:, None, :, None] if x.ndim == 4 else at[..., None]


def joined_rows(new: Tensor, x: Tensor, old: Tensor, fill: int = 0) -> Tensor:
    """Return x for the rows that are new, else old; the one with fewer tokens is filled up."""
    axis = 1 if x.ndim == 2 else x.ndim - 2
    most = max(x.shape[axis], old.shape[axis])
    right = [0, 0] * (x.ndim - 1 - axis)
    x, old = (
        torch.nn.functional.pad(each, (*right, 0, most - each.shape[axis]), value=fill)
        for each in (x, old)
    )
    return torch.where(by_row(new, x), x, old)


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
    past = None if cache is None else cache.past
    rows = rows and cache is None
    batch = Batch(x, past, attention_mask, segments, cu_seqlens, positions, cuts=cuts, rows=rows)
    if cache is not None:
        if batch.cut and not begins:
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
