"""What a block keeps of the tokens so far: keys and values, states, contexts, last tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import Batch


class Part:
    """One kind of what the tokens left behind: tensors [b, …] by name."""

    shrinks = False  # whether tokens can be taken back without having noted what was before
    counts = False  # whether it must count positions itself
    missing: Tensor | None = None  # the rows [b] whose context is yet to be read

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

    def state(self, count: int) -> dict[str, Tensor]:  # noqa: ARG002  of a list of tokens
        """Return what `count` tokens left, to be stored."""
        return dict(self.kept)

    def expect(self, kept: dict[str, Tensor]) -> None:
        """Raise `ValueError` where what was stored is of another kind."""
        for name, each in self.kept.items():
            other = kept.get(name)
            if other is None or other.ndim != each.ndim or other.shape[-1] != each.shape[-1]:
                found = "nothing" if other is None else str(list(other.shape))
                raise ValueError(f"`{name}` of the cache is {list(each.shape)}, "
                                 f"what was stored is {found}")  # fmt: skip

    def load(self, kept: dict[str, Tensor], rows: int) -> None:
        """Take up what was stored; one row is for all."""
        self.kept = {name: each.expand(rows, *each.shape[1:]).clone()
                     for name, each in kept.items()}  # fmt: skip


class KeyValueCache(Part):
    """What the tokens so far left behind for later queries to read.

    `sizes` says what is kept of each token: name → (heads or None, features). With a `ring`,
    only the first `prefix` tokens of a sequence and the last `ring` are kept. A token stands in
    the slot of its number in its sequence; a new sequence takes the slots of the one before.
    Without a `length`, room is made as it is needed. An `ordered` ring is read as its tokens
    came, not as they stand in it. What is `wide` is float32 at least; so is what is `changing`,
    which later tokens write anew.
    """

    def __init__(
        self,
        batch: int,
        length: int | None,
        sizes: dict[str, tuple[int | None, int]],
        ring: int | None = None,
        prefix: int = 0,
        wide: tuple[str, ...] = (),
        ordered: bool = False,
        changing: tuple[str, ...] = (),
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.prefix, self.grows = prefix, length is None
        self.is_ring = ring is not None and (length is None or prefix + ring < length)
        self.capacity = prefix + ring if ring is not None and self.is_ring else length or 0
        self.ordered = ordered and self.is_ring
        self.changing = changing
        self.changes = self.is_ring or bool(changing)
        exact = torch.promote_types(dtype, torch.float32)
        self.marked = False  # whether what is held must outlive a new sequence
        super().__init__(**{
            name: torch.zeros(
                (batch, self.capacity, dim)
                if heads is None
                else (batch, heads, self.capacity, dim),
                dtype=torch.int64
                if name == "doc"
                else exact
                if name in wide or name in changing
                else dtype,
                device=device,
            )
            for name, (heads, dim) in sizes.items()
        })  # fmt: skip

    @property
    def shrinks(self) -> bool:  # type: ignore[override]
        return not self.changes

    @property
    def counts(self) -> bool:  # type: ignore[override]
        return self.is_ring

    @property
    def limit(self) -> int | None:
        """How many tokens fit; None for any number."""
        return None if self.is_ring or self.grows else self.capacity

    def start(self, batch: Batch) -> int | None:
        """Return which of the keys of `update` is that of the first new token, where it is one."""
        held = batch.bound
        if batch.start is None or "positions" in self.kept or (batch.cut and held):
            return None
        goes_round = self.is_ring and held > 0 and held + batch.place.shape[-1] > self.capacity
        return None if goes_round else batch.start

    def update(self, batch: Batch, **new: Tensor) -> tuple[Any, ...]:
        """Take up new tokens.

        Returns all that can be visible now, the positions of its keys, and the number of each
        one's sequence (None where all are of the only one). Of what earlier calls brought,
        gradients are not kept.
        """
        count, held = batch.place.shape[-1], batch.bound
        new = self._prepared(batch, new)
        traced = torch.compiler.is_exporting()
        if batch.cut or (self.is_ring and count > 1 and (traced or held + count > self.capacity)):
            found, places, run = self._and_new(batch, new)
            self._write(batch, new)
        else:
            first = self.capacity if traced else min(held + count, self.capacity)
            found = {name: x[..., :first, :] for name, x in self._write(batch, new).items()}
            places, run = self._slots(batch.after, first)
            found, places, run = self._as_they_came(found, places, run)
            run = run.expand(self.rows, -1)
        return self._given_back(batch, found, places, run)

    def beside(self, batch: Batch, **new: Tensor) -> tuple[Any, ...]:
        """Return what `update` does, the new tokens after all that is held; take up nothing."""
        return self._given_back(batch, *self._and_new(batch, self._prepared(batch, new)))

    def rewrite(self, batch: Batch, **found: Tensor) -> None:
        """Put the first of what is given in place of what is held of the tokens before."""
        first = self._held(batch)
        for name, x in found.items():
            self.kept[name][..., :first, :] = x[..., :first, :].detach()

    def take_up(self, batch: Batch, **new: Tensor) -> None:
        """Take up new tokens, the last of those that are given, and return nothing."""
        count = batch.place.shape[-1]
        last = {name: x[..., x.shape[-2] - count :, :] for name, x in new.items()}
        self._write(batch, self._prepared(batch, last))

    def _prepared(self, batch: Batch, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make room for new tokens; return all that is noted of them."""
        count = batch.place.shape[-1]
        self._make_room(batch.bound + count - batch.slack)
        if batch.given is None and "positions" not in self.kept:
            return new
        self._note_positions()
        return {**new, "positions": batch.positions.expand(self.rows, count)[..., None]}

    def _and_new(
        self, batch: Batch, new: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return what is held and new tokens after it, with their places and runs."""
        first = self._held(batch)
        places, run = self._slots(batch.before, first)
        held = {name: each[..., :first, :] for name, each in self.kept.items()}
        held, places, run = self._as_they_came(held, places, run)
        found = {}
        for name, each in held.items():
            dtype = each.dtype if name in self.changing else new[name].dtype
            found[name] = torch.cat([each.to(dtype), new[name].to(dtype)], dim=-2)
        if batch.run is None:
            return found, torch.cat([places, batch.place]), run
        both = (self.rows, -1)
        places = torch.cat([places.expand(both), batch.place.expand(both)], 1)
        return found, places, torch.cat([run.expand(both), batch.run], 1)

    def _held(self, batch: Batch) -> int:
        """Return how many slots may hold something: all, where asking would be a guard."""
        if torch.compiler.is_exporting() and batch.run is not None:
            return self.capacity if self.is_ring else batch.bound
        return min(batch.bound, self.capacity)

    def _given_back(
        self, batch: Batch, found: dict[str, Tensor], places: Tensor, run: Tensor
    ) -> tuple[Any, ...]:
        """Return what is held by name, where its keys stand, and of which sequences they are."""
        if "positions" in found:
            places = found.pop("positions")[..., 0]
        return (*found.values(), places, None if batch.run is None else run)

    @property
    def rows(self) -> int:
        """How many rows it is for."""
        return next(iter(self.kept.values())).shape[0]

    def _note_positions(self) -> None:
        """Make room for the positions of keys, where they are not their numbers."""
        if "positions" not in self.kept:
            slot = torch.arange(self.capacity, device=next(iter(self.kept.values())).device)
            self.kept["positions"] = slot.repeat(self.rows, 1)[..., None]

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
            assert source is not None
            to, of = (by_token(at, held).expand(each.shape) for at in (slot, source))
            values = torch.where(by_row(any_, held), values.gather(-2, of), held.gather(-2, to))
            put = held.scatter if learns else held.scatter_
            done[name] = put(held.ndim - 2, to, values)
        if learns:  # what a later call writes leaves alone what this one has read
            self.kept = {name: each.detach().clone() for name, each in done.items()}
        return done

    def _slots_of_all(self, batch: Batch) -> tuple[Tensor, Tensor | None, None]:
        """Return the slots [t] that are written and, where not all tokens are kept, by which."""
        place = batch.place
        if not self.is_ring:
            return place, None, None
        ring = self.capacity - self.prefix
        stays = (place < self.prefix) | (place >= batch.bound + place.shape[0] - ring)
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

    def _as_they_came(
        self, found: dict[str, Tensor], places: Tensor, run: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return what slots hold, their numbers and runs [(b,) held], in the order of tokens."""
        if not self.ordered:
            return found, places, run
        order = places.argsort(-1)
        found = {
            name: x[..., order, :]
            if order.ndim == 1
            else x.gather(-2, by_token(order, x).expand(x.shape))
            for name, x in found.items()
        }
        return found, places.gather(-1, order), run.expand(places.shape).gather(-1, order)

    def reset(self, rows: Tensor) -> None:  # noqa: ARG002  slots past a row's length are not read
        if self.marked:
            self._apart()

    def _apart(self) -> None:
        self.kept = {name: each.clone() for name, each in self.kept.items()}
        self.marked = False

    def mark(self) -> dict[str, Tensor]:
        """Return what brings back what is held now: what may change is copied."""
        if self.changes:
            return {name: each.clone() for name, each in self.kept.items()}
        self.marked = True
        return dict(self.kept)

    def restore(self, kept: dict[str, Tensor]) -> None:
        if self.changes:
            kept = {name: each.clone() for name, each in kept.items()}
        self.kept, self.marked = dict(kept), not self.changes
        self.capacity = next(iter(kept.values())).shape[-2]

    def state(self, count: int) -> dict[str, Tensor]:
        return {name: each[..., : min(count, self.capacity), :].clone()
                for name, each in self.kept.items()}  # fmt: skip

    def load(self, kept: dict[str, Tensor], rows: int) -> None:  # noqa: ARG002  they broadcast
        held = next(iter(kept.values())).shape[-2]
        self._make_room(held)
        if "positions" in kept:
            self._note_positions()
        for name, each in kept.items():
            self.kept[name][..., :held, :] = each.to(self.kept[name])


class ContextCache(Part):
    """What is made of a context, computed once."""

    shrinks = True

    def serves(self, context: Tensor | None) -> bool:
        """Say whether what is kept is all that is needed."""
        return context is None and bool(self.kept) and self.missing is None

    def keep(self, run: Tensor | None, **made: Tensor) -> tuple[Any, ...]:
        """Keep what was made of a context, of the rows that lack it; return what serves now.

        `run` [b, m] is -1 at padding, or None where there is none.
        """
        if self.missing is not None:
            like = next(iter(made.values()))
            batch, tokens = like.shape[0], like.shape[-2]
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
        known = back <= torch.as_tensor(batch.before, device=x.device).expand(x.shape[0])[:, None]
        return old, torch.cat([torch.where(known, 0, -2), batch.run], 1)

    def past(self, name: str) -> Tensor | None:
        """Return what a stage made of the tokens so far [b, (heads,) 1, d], if there were any."""
        return self.kept.get(name)

    def carry(self, name: str, made: Tensor, batch: Batch) -> None:
        """Keep what a stage made of all tokens up to the last one of each row."""
        self.before(name, made, 1, batch)


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
