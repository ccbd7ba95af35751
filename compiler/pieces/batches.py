"""How the tokens of a call make sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Past(NamedTuple):
    """How far the rows of a cache are, before a call."""

    since: int | Tensor  # how many tokens of its sequence each row has had: one number, or [b]
    bound: int  # no row has had more
    doc: Tensor | None  # the segment of the last token of each row [b], where some were given

    def before(self, doc: Tensor) -> Tensor:
        """Return the segment of the token before the first of doc [b, n], as [b, 1]."""
        if self.doc is not None:
            return self.doc[:, None]
        none_yet = torch.as_tensor(self.since, device=doc.device).expand(doc.shape[0]) == 0
        return torch.where(none_yet[:, None], doc[:, :1], 0)


class Batch:
    """Where the tokens of a call stand: in each row one sequence after the other, then padding.

    x [b, n, …] is what is given; `take` lays it out like this and `give` lays the result out as
    x is. `run` [rows, tokens] numbers the sequences of a row, from 0 for the one that a cache
    goes on with, -1 for padding; it is None where every row is one sequence and full. Padding
    repeats the last token of its row, so that whatever is made of it is as finite; `own` has the
    number of that one's sequence there. `place` counts the tokens of each sequence; `positions`
    are those that were given, or the same.
    With `cuts`, segments are sequences, else they only mark tokens. With `rows`, each sequence
    is laid into a row of its own: what mixes all tokens of a row then meets no others. `most`
    tokens of a row at most are no padding; it is made no longer.
    """

    def __init__(
        self,
        x: Tensor,
        past: Past | None = None,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cuts: bool = True,
        rows: bool = False,
        most: int | None = None,
    ) -> None:
        b, n = self.shape = x.shape[:2]
        self.past, self.cuts = past, cuts
        self.slack = 0  # so much less than `bound` and these tokens any row has in all
        live = per_token("attention_mask", attention_mask, x)
        doc = per_token("segments", segments, x)
        self.given = per_token("positions", positions, x)
        if cu_seqlens is not None:
            if b != 1 or live is not None or doc is not None:
                raise ValueError("`cu_seqlens` goes with one row (b = 1), and with neither "
                                 "`attention_mask` nor `segments`")  # fmt: skip
            cu_seqlens = torch.as_tensor(cu_seqlens, device=x.device)
            live, doc = packed(cu_seqlens, x)
        live = None if live is None else live.bool()
        self.index: Tensor | None = None  # where each token is among the b · n, [rows, tokens]
        self.back: Tensor | None = None  # where the b · n tokens are now
        self.owner: Tensor | None = None  # the row that each row was in
        self.live: Tensor | None = None  # what is no padding, None for all [rows, tokens]
        self.padded, self.cut = live, cuts and doc is not None
        if cu_seqlens is not None and past is not None:
            assert doc is not None
            self._in_rows(doc[0], len(cu_seqlens) - 1, live)
            live, doc, self.cut = self.live, None, False
        elif rows and self.cut:
            assert doc is not None
            self._in_rows(*numbered(doc, live), live)
            live, doc, self.cut = self.live, None, False
        elif live is not None:
            order = live.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
            row = torch.arange(b, device=x.device)[:, None]
            tokens = n if most is None else most
            self.back = order.argsort(-1).clamp(max=max(0, tokens - 1)) + tokens * row
            step, count = torch.arange(tokens, device=x.device), live.sum(1, keepdim=True)
            live, order = step < count, filled(order, count)[:, :tokens]
            self.index = order + n * row
            doc = None if doc is None else doc.gather(1, order)
            self.given = None if self.given is None else self.given.expand(b, n).gather(1, order)
        self.live, self.segments = live, doc
        self._count(past, x)

    def _in_rows(self, number: Tensor, count: int, live: Tensor | None) -> None:
        """Lay the tokens of each sequence, of which `number` [b · n] is given, into a row."""
        b, n = self.shape
        every = torch.arange(b * n, device=number.device)
        at = every if live is None else every[live.flatten()]
        number = number.flatten()[at]
        first = torch.full((count,), b * n, device=at.device).scatter_reduce(
            0, number, torch.arange(len(at), device=at.device), "amin"
        )
        place = torch.arange(len(at), device=at.device) - first[number]
        longest = int(place.max()) + 1 if len(at) else 0
        index = at.new_zeros(count, longest)
        self.live = index.index_put((number, place), torch.ones_like(at)).bool()
        self.index = filled(index.index_put((number, place), at), self.live.sum(1, keepdim=True))
        self.back = torch.zeros_like(every).index_put((at,), number * longest + place).view(b, n)
        begun = first.clamp(max=max(0, len(at) - 1))
        self.owner = at[begun] // n if len(at) else first.new_zeros(count)
        if self.given is not None:
            self.given = self.given.expand(b, n).flatten()[self.index]

    def _count(self, past: Past | None, x: Tensor) -> None:
        """Number the sequences, and count the tokens of each."""
        live, doc = self.live, self.segments
        rows, tokens = self.shape if self.index is None else self.index.shape
        before = 0 if past is None else past.since
        self.before: int | Tensor = before
        self.bound = 0 if past is None else past.bound
        self.last = None if past is None else past.doc
        step = torch.arange(tokens, device=x.device)
        self.changed: Tensor | None = None
        self.run: Tensor | None = None
        if doc is not None:
            last = doc[:, :1] if past is None else past.before(doc)
            self.changed = doc != torch.cat([last, doc], 1)[:, :-1]
        if self.cut and self.changed is not None:
            self.run = self.changed.cumsum(1)
            behind = torch.as_tensor(before, device=x.device).expand(rows)
            self.place = step - torch.where(self.changed, step, -behind[:, None]).cummax(1)[0]
        elif isinstance(before, Tensor):
            self.run = before.new_zeros(rows, tokens)
            self.place = before[:, None] + step
        else:
            self.place = before + step
        self.own = self.run
        if live is not None:
            count = live.sum(1, keepdim=True)
            self.place = filled(self.place.expand(rows, tokens), count)
            run = torch.zeros_like(self.place) if self.run is None else self.run
            self.run = run.masked_fill(~live, -1)
            self.own = filled(self.run, count)
        self.positions = self.place if self.given is None else self.given
        self.counted = self.bound == 0 and self.given is None
        self.plain = self.counted and not self.cut

    @property
    def start(self) -> int | None:
        """The number of the first token in its sequence, where it is the same in all rows.

        None where it is not, or where positions are given.
        """
        return self.before if isinstance(self.before, int) and self.given is None else None

    @property
    def after(self) -> int | Tensor:
        """How many tokens the last sequence of each row has had: a number, or [rows]."""
        if self.run is None:
            assert isinstance(self.before, int)
            return self.before + self.place.shape[-1]
        last = (self.run >= 0).sum(1, keepdim=True) - 1
        before = torch.as_tensor(self.before, device=last.device).expand(last.shape[0])
        if not self.place.shape[-1]:
            return before
        place = self.place.expand(self.run.shape).gather(1, last.clamp(min=0))
        return torch.where(last < 0, before[:, None], place + 1)[:, 0]

    @property
    def doc(self) -> Tensor:
        """The segment of every token: as given, or that of the token before, or 0."""
        if self.segments is not None:
            return self.segments
        rows, tokens = self.shape if self.index is None else self.index.shape
        if self.last is not None:
            return self.last[:, None].expand(rows, tokens)
        return torch.zeros_like(self.place).expand(rows, tokens)

    @property
    def number(self) -> Tensor:
        """The number of each token's sequence in its row, -1 for padding."""
        rows, tokens = self.shape if self.index is None else self.index.shape
        return torch.zeros_like(self.place).expand(rows, tokens) if self.run is None else self.run

    @property
    def fresh(self) -> Tensor | None:
        """Which tokens [rows, 1, tokens, 1] begin a sequence, where one begins in a row."""
        return self.begun if self.cut else None

    @property
    def begun(self) -> Tensor | None:
        """Which tokens [rows, 1, tokens, 1] are the first of a segment, where some are given."""
        return None if self.changed is None else self.changed[:, None, :, None]

    @property
    def idle(self) -> Tensor | None:
        """Which tokens [rows, 1, tokens, 1] are padding, where some may be."""
        return None if self.live is None else ~self.live[:, None, :, None]

    @property
    def counts(self) -> Tensor:
        """How many tokens [rows] are no padding."""
        assert self.live is not None
        return self.live.sum(1)

    def take(self, x: Tensor) -> Tensor:
        """Lay x [b, n, …] out in rows of sequences; a row that is padding alone is 0."""
        if self.index is None:
            return x
        assert self.live is not None
        y = x.new_zeros(*self.index.shape, *x.shape[2:])
        y = x.flatten(0, 1)[self.index] if x.numel() else y
        return y.masked_fill(~self.live.any(1).reshape(-1, *[1] * (x.ndim - 1)), 0)

    def clean(self, x: Tensor, causal: bool) -> tuple[Tensor, Tensor | None]:
        """Return x [rows, tokens, d] without NaN and infinity, and what they would have reached.

        Where a row holds several sequences, one that is not finite would else reach the others
        through products with zero. It reaches all that comes after in its own, or all of it.
        """
        if not self.cut or self.run is None or self.changed is None or self.bound:
            return x, None
        bad = ~torch.isfinite(x).all(-1)
        count = bad.cumsum(1)
        first = torch.where(self.changed, count - bad.long(), 0).cummax(1)[0]
        if not causal:
            own = self.run.clamp(min=0)
            count = torch.zeros_like(count).scatter_reduce(1, own, count, "amax").gather(1, own)
        return x.masked_fill(bad[..., None], 0), (count > first)[..., None]

    def give(self, y: Tensor) -> Tensor:
        """Lay y [rows, tokens, d] out as x was, 0 at padding."""
        if self.back is None:
            return y
        y = y.flatten(0, 1)[self.back] if y.numel() else y.new_zeros(*self.shape, y.shape[-1])
        return y if self.padded is None else y.masked_fill(~self.padded[..., None], 0)

    def of_context(self, context: Tensor, mask: Tensor | None) -> Any:
        """Return how the tokens of a context [b, m, …] stand; a mask says which are any."""
        if context.shape[0] != self.shape[0]:
            raise ValueError(f"`context` has {context.shape[0]} rows, the batch {self.shape[0]}")
        return Batch(context, None, per_token("context_mask", mask, context))

    def of_rows(self, context: Tensor) -> Tensor:
        """Return the context of every row, where sequences have rows of their own."""
        return context if self.owner is None else context[self.owner]


def in_front(memory: Tensor, x: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """Put learned tokens [count, d] before each sequence of x [rows, n, d] that begins.

    Each sequence has a row. Returns x and how all of it stands; `without_front` takes them away.
    """
    rows, n = x.shape[:2]
    count, since = len(memory), batch.before
    live, doc = batch.live, None if batch.cuts else batch.segments
    given = None if batch.given is None else batch.given + count
    past = batch.past
    new: Tensor | None = None  # which rows begin; None for all
    begins = bool(n)
    if isinstance(since, Tensor):
        new = since == 0 if live is None else (since == 0) & live.any(1)
        begins = begins and (torch.compiler.is_compiling() or bool(new.any()))
        since = torch.where(since > 0, since + count, 0)
    else:
        begins = begins and since == 0
        new = None if live is None else live.any(1)
        since = since + count if since else 0
    if begins:
        x = torch.cat([memory.to(x.dtype).expand(rows, -1, -1), x], 1)
        if new is not None:
            live = torch.ones_like(batch.number).bool() if live is None else live
            live = torch.cat([new[:, None].expand(-1, count), live], 1)
        doc = None if doc is None else torch.cat([doc[:, :1].expand(-1, count), doc], 1)
        if given is not None:
            first = torch.arange(count, device=x.device)
            first = first if given.ndim == 1 else first.expand(given.shape[0], -1)
            given = torch.cat([first, given], -1)
    if past is not None:
        past = Past(since, batch.bound + count if batch.bound else 0, past.doc)
    within = Batch(x, past, live, doc, None, given, cuts=False)
    within.slack = count if begins and past is not None and batch.bound else 0
    return within.take(x), within


def by_rows(context: Tensor, far: Batch, batch: Batch) -> tuple[Tensor, Batch]:
    """Return the context of each row of a batch in which sequences have rows, and how it stands."""
    if batch.owner is None or context.shape[0] == len(batch.owner):
        return context, far
    context = context[batch.owner]
    return context, Batch(context, None, None if far.live is None else far.live[batch.owner])


def without_front(y: Tensor, within: Batch, batch: Batch) -> Tensor:
    """Return y [rows, (heads,) tokens, d] without what `in_front` put before it."""
    n = batch.place.shape[-1]
    if within.back is None:
        return y[..., y.shape[-2] - n :, :]
    at = (within.back % max(1, y.shape[-2]))[:, y.shape[-2] - n :]
    at = at[:, None, :, None] if y.ndim == 4 else at[..., None]
    return y.gather(-2, at.expand(*y.shape[:-2], n, y.shape[-1]))


def at_positions(table: nn.Embedding, batch: Batch) -> Tensor:
    """Return the rows of a table where tokens stand; raise `ValueError` past its end."""
    count, needed = table.num_embeddings, batch.bound + batch.place.shape[-1]
    if batch.run is None and batch.given is None and needed > count:
        raise ValueError(f"this model has {count} positions; {needed} are needed")
    try:
        rows: Tensor = table(batch.positions)
    except IndexError:
        needed = int(batch.positions.max()) + 1
        raise ValueError(f"this model has {count} positions; {needed} are needed") from None
    return rows


def filled(index: Tensor, count: Tensor) -> Tensor:
    """Return index [rows, n] with the last of the first `count` [rows, 1] in place of the rest."""
    step = torch.arange(index.shape[1], device=index.device)
    return index.gather(1, torch.minimum(step, (count - 1).clamp(min=0)))


def per_token(name: str, given: Tensor | None, x: Tensor) -> Tensor | None:
    """Return one number for each token of x [b, n, …], given as [n] or [b, n]; or raise."""
    if given is None:
        return None
    b, n = x.shape[:2]
    rows = given.shape[:-1]  # asked for one by one: a compiler has a guard for each answer
    if given.ndim not in (1, 2) or given.shape[-1] != n or not (rows in ((), (b,)) or rows == (1,)):
        raise ValueError(f"`{name}` must be [{n}] or [{b}, {n}], it is {list(given.shape)}")
    return given if name == "positions" and given.ndim == 1 else given.expand(b, n)


def packed(cu_seqlens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens of one row are none, and the number of each one's sequence."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"`cu_seqlens` must be [count + 1], it is {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`cu_seqlens` must be whole numbers, it is {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends != sorted(ends) or ends[0] != 0 or ends[-1] > x.shape[1]:
            raise ValueError(f"`cu_seqlens` must rise from 0 to at most {x.shape[1]}, it is {ends}")
    step = torch.arange(x.shape[1], device=x.device)
    number = torch.bucketize(step, cu_seqlens[1:].contiguous(), right=True)[None]
    live = number < len(cu_seqlens) - 1
    return live, number.clamp(max=len(cu_seqlens) - 2)


def numbered(doc: Tensor, live: Tensor | None) -> tuple[Tensor, int]:
    """Return the number of each token's sequence [b · n] among all of a batch, and their count."""
    b, n = doc.shape
    row = torch.arange(b, device=doc.device)[:, None].expand(b, n).flatten()
    at = torch.arange(b * n, device=doc.device)
    at = at if live is None else at[live.flatten()]
    row, mark = row[at], doc.flatten()[at]
    new = torch.ones_like(at, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (mark[1:] != mark[:-1])
    number = torch.zeros(b * n, dtype=torch.int64, device=doc.device)
    count = new.cumsum(0)
    return number.index_put((at,), count - 1), int(count[-1]) if len(at) else 0
