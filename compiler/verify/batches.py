"""Proving that a batch is what its sequences are alone, and that rows of a cache go their own way.

    padding      left, right, inside, NaN in it; of the context too
    packing      segments in a row, with padding between; one row by `cu_seqlens`
    rows         prompts of different lengths prefilled together and decoded together,
                 reordered, taken back, copied, stored, ended and begun anew

The meaning runs every sequence alone (`reference_batch`), so the module is compared with it,
forward and every gradient; decoding is compared with the module run on each row alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...grammar.expr import names
from ..model import Model
from .cases import TOLERANCE, Case, Subject, compare, gradients, weighing


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences lie in a batch; `noise` puts NaN where nothing is."""

    name: str
    given: dict[str, Tensor]
    noise: bool = False


# What kernels, which run in an interpreter, and long sequences are tried with.
_SOME = ("padding left", "padding of the context", "packing and padding")


def layouts(subject: Subject, case: Case) -> Iterator[Layout]:
    """Yield the batches a subject is tried with, of the size of a case."""
    b, n = case.batch, case.tokens
    step = torch.arange(n)
    lengths = torch.tensor([max(1, n - 1 - 3 * row) if row else n for row in range(b)])[:, None]
    right = step < lengths
    inside = torch.ones(b, n, dtype=torch.bool)
    inside[:, n // 3] = inside[-1, n // 2 : n // 2 + 2] = False
    yield Layout("padding left", {"attention_mask": step >= n - lengths}, noise=True)
    yield Layout("padding right", {"attention_mask": right.long()})
    yield Layout("padding inside", {"attention_mask": inside}, noise=True)
    if subject.crosses:
        keys = torch.arange(case.context) < max(1, case.context - 2)
        keys = keys.repeat(b, 1)
        keys[0] = True
        yield Layout("padding of the context", {"context_mask": keys}, noise=True)
    if not subject.packs:
        return
    segments = (step * 3 // n + torch.arange(b)[:, None]).clamp(max=2)
    yield Layout("packing", {"segments": segments})
    yield Layout(
        "packing and padding", {"segments": segments, "attention_mask": inside}, noise=True
    )


def as_if_alone(
    subject: Subject, dtype: torch.dtype = torch.float64, tokens: int = 11
) -> tuple[int, float]:
    """Compare batches with their sequences run alone, the output and every gradient.

    The oracle computes in float64, the module in `dtype`: kernels, which take only some batches.
    """
    worst, count = 0.0, 0
    case = subject.fitting(Case(2, tokens, 5, dtype, seed=2))
    for layout in layouts(subject, case):
        if (dtype != torch.float64 or tokens > 11) and layout.name not in _SOME:
            continue
        error, cases = _compared(subject, case, layout)
        worst, count = max(worst, error), count + cases
    if subject.packs and dtype == torch.float64:
        one = replace(case, batch=1)
        ends = sorted({0, 1, one.tokens // 2, one.tokens // 2, max(1, one.tokens - 2)})
        layout = Layout("cu_seqlens", {"cu_seqlens": torch.tensor(ends)}, noise=True)
        error, cases = _compared(subject, one, layout)
        worst, count = max(worst, error), count + cases
    return count, worst


def _compared(subject: Subject, case: Case, layout: Layout) -> tuple[float, int]:
    x, given = subject.inputs(case)
    if "cu_seqlens" in layout.given:
        given.pop("segments", None)
    given = {**given, **layout.given}
    noisy, context = x, given.get("context")
    wide = {k: each.double() if each.is_floating_point() else each for k, each in given.items()}
    wide_x = x.double() if x.is_floating_point() else x
    if layout.noise:
        noisy = _with_noise(x, _live(layout.given, x))
        if context is not None:
            context = _with_noise(context, layout.given.get("context_mask"))
    with torch.no_grad():
        weigh = weighing(subject.oracle(wide_x, **wide))
    y, expected = gradients(subject.oracle, wide_x, wide, weigh)
    more = {} if context is None else {"context": context}
    z, got = gradients(subject.module, noisy, {**given, **more}, weigh)
    where = f"{case}, {layout.name}"
    worst, count = compare("the output", where, z, y, TOLERANCE[case.dtype]), 0
    for name, grad in expected.items():
        error = compare(f"the gradient of {name}", where, got[name], grad, TOLERANCE[case.dtype])
        worst, count = max(worst, error), count + 1
    return worst, count


def _live(given: dict[str, Tensor], x: Tensor) -> Tensor | None:
    if "cu_seqlens" in given:
        return torch.arange(x.shape[1])[None] < given["cu_seqlens"][-1]
    return given.get("attention_mask")


def _with_noise(x: Tensor, live: Tensor | None) -> Tensor:
    """Return x with NaN, or tokens that there are not, where nothing is."""
    if live is None:
        return x
    if x.is_floating_point():
        return torch.where(live.bool()[..., None], x, torch.nan)
    return torch.where(live.bool(), x, 10**9)


# ── rows of a cache ──────────────────────────────────────────────────────────────────────


def rows_of_a_cache(subject: Subject) -> str | tuple[int, float]:
    """Compare rows that are decoded together with each row alone."""
    if subject.obstacle is not None:
        return f"it cannot decode: {subject.obstacle}"
    if isinstance(subject.what, Model) and subject.what.classifies:
        return "a classifier has one answer for the whole sequence"
    mixes = [each.mix for block in subject.blocks for each in block.mixings.values()]
    if any({"n", "m"} & names(expr) for mix in mixes for expr in mix.exprs):
        return "it depends on how many tokens there are"
    longest = subject.fitting(Case(3, 17, 4)).tokens
    with torch.no_grad():
        tried = _Rows(subject, longest)
        for each in (
            tried.prefilled,
            tried.reordered,
            tried.stored,
            tried.taken_back,
            tried.packed,
            tried.begun_anew,
        ):
            each()
    return tried.count, tried.worst


class _Rows:
    """Rows of one batch of tokens, decoded with a cache and compared with each alone."""

    def __init__(self, subject: Subject, longest: int) -> None:
        self.subject, self.worst, self.count = subject, 0.0, 0
        self.case = Case(3, longest, 4, seed=11)
        self.x, self.given = subject.inputs(self.case)
        self.segments = self.given.pop("segments", None)
        self.condition = self.given.pop("condition", None)  # given at every call
        half = max(1, longest // 2)
        self.lengths = [1, half, max(1, half - 2)]
        self.whole = self._alone(self.x)

    @property
    def module(self) -> Any:
        return self.subject.module

    def _alone(self, x: Tensor) -> Tensor:
        rows = range(len(x))
        return torch.cat([self.module(x[row : row + 1], **self._of(row)) for row in rows])

    def _of(self, row: int) -> dict[str, Tensor]:
        given = {name: each[row : row + 1] for name, each in self.given.items()}
        return {**given, **self._each([row])}

    def _each(self, rows: list[int] | None = None) -> dict[str, Tensor]:
        """Return what some rows are given at every call."""
        if self.condition is None:
            return {}
        return {"condition": self.condition if rows is None else self.condition[rows]}

    def _start(self, length: int | None) -> tuple[Any, Tensor]:
        """Prefill prompts of different lengths, padding left; return the cache and what came."""
        longest = max(self.lengths)
        prompts = torch.zeros_like(self.x[:, :longest])
        mask = torch.zeros(len(self.x), longest, dtype=torch.int64)
        for row, count in enumerate(self.lengths):
            prompts[row, longest - count :] = self.x[row, :count]
            mask[row, longest - count :] = 1
        cache = self.module.init_cache(len(self.x), length)
        given = {**self.given, **self._each()}
        y = self.module(_filled(prompts, mask), attention_mask=mask, cache=cache, **given)
        for row, count in enumerate(self.lengths):
            self._same("prefill", y[row, longest - count :], self.whole[row, :count])
        return cache, torch.tensor(self.lengths)

    def _steps(self, cache: Any, at: Tensor, count: int, rows: list[int] | None = None) -> Tensor:
        """Decode `count` tokens a row, first some at once, then one by one."""
        rows = list(range(len(self.x))) if rows is None else rows
        sizes = [2] * (count // 3) + [1] * (count - 2 * (count // 3))
        for size in sizes:
            part = torch.stack(
                [self.x[row, t : t + size] for row, t in zip(rows, at.tolist(), strict=True)]
            )
            y = self.module(part, cache=cache, **self._each(rows))
            for own, row, t in zip(y, rows, at.tolist(), strict=True):
                self._same(f"row {row} decoded with others", own, self.whole[row, t : t + size])
            at = at + size
        return at

    def _same(self, name: str, got: Tensor, expected: Tensor) -> None:
        self.worst = max(self.worst, compare(name, self.case, got, expected, 1e-8))
        self.count += 1

    @property
    def _left(self) -> int:
        return self.case.tokens - max(self.lengths)

    # what is done with rows

    def prefilled(self) -> None:
        for length in (self.case.tokens + 2, None):
            cache, at = self._start(length)
            self._steps(cache, at, self._left)

    def reordered(self) -> None:
        cache, at = self._start(None)
        rows = [2, 0, 0, 1]
        cache.reorder(torch.tensor(rows))
        self._steps(cache, at[rows], min(3, self._left), rows)

    def stored(self) -> None:
        cache, at = self._start(None)
        other = cache.copy()
        state = cache.state_dict()
        self._steps(cache, at, min(2, self._left))
        self._steps(other, at, min(3, self._left))
        again = self.module.init_cache(len(self.x), self.case.tokens + 2)
        if "context" not in self.given:
            again.load_state_dict({name: each.clone() for name, each in state.items()})
            self._steps(again, at, min(3, self._left))

    def taken_back(self) -> None:
        cache, at = self._start(self.case.tokens + 4)
        mark = cache.mark()
        wrong = self.x.flip(0)[:, : min(3, self._left)]
        if not wrong.shape[1]:
            return
        self.module(wrong, cache=cache, **self._each())
        cache.restore(mark)
        at = self._steps(cache, at, 1)
        cache.mark()
        count = self.case.tokens - int(at.max())
        if not count:
            return
        part = torch.stack([self.x[row, t : t + count] for row, t in enumerate(at.tolist())])
        part[:, 1:] = wrong[:, :1] if count > 1 else part[:, 1:]
        self.module(part, cache=cache, **self._each())
        cache.crop(at + 1)  # the first of them was accepted
        self._steps(cache, at + 1, count - 1)

    def packed(self) -> None:
        if "context" in self.given or self.condition is not None:
            return  # one row has one of them
        cache = self.module.init_cache(len(self.x), None)
        parts = [self.x[row, :count] for row, count in enumerate(self.lengths)]
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        y = self.module(torch.cat(parts)[None], cu_seqlens=ends, cache=cache)[0]
        for row, count in enumerate(self.lengths):
            self._same("packed prefill", y[ends[row] : ends[row + 1]], self.whole[row, :count])
        self._steps(cache, torch.tensor(self.lengths), min(3, self._left))

    def begun_anew(self) -> None:
        if "context" in self.given:
            return
        cache, at = self._start(self.case.tokens + 2)
        cache.reset([1])
        at[1] = 0
        at = self._steps(cache, at, min(2, self._left))
        if not self.subject.packs or self.subject.whole_rows or self.subject.what.marks:
            return
        # a new sequence in each row, in the middle of a step
        left = min(2, self._left - 2)
        if left < 1:
            return
        both = torch.stack(
            [
                torch.cat([self.x[row, t : t + left], self.x[row, :3]])
                for row, t in enumerate(at.tolist())
            ]
        )
        marks = torch.tensor([0] * left + [1] * 3).repeat(len(both), 1)
        y = self.module(both, segments=marks, cache=cache, **self._each())
        for row, t in enumerate(at.tolist()):
            expected = torch.cat([self.whole[row, t : t + left], self.whole[row, :3]])
            self._same("a new sequence in a row", y[row], expected)
        self._steps(cache, torch.full_like(at, 3), 2)


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool()[..., None], x, torch.nan) if x.is_floating_point() else x
