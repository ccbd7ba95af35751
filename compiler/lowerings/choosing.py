"""Which of the visible keys a query reads, as lines of PyTorch text: no gradient reaches them.

select = top(8, dot(q[h, i], kb[h, j // 64]), size = 64, always = blocks(64))

with torch.no_grad():
    always = visible & (i // 64 == j // 64)
    group, first = groups_of_keys(j, 64)
    def score(j: Tensor) -> Tensor:
        return q @ rows_at(kb_g, j // 64).mT
    free = any_of_groups(visible & ~always, group, first.shape[-1])
    chosen = top_groups(score(first), free, 8)
    visible = always | (visible & at_groups(chosen, group))

A score that is the same all over a group is made once for each of them.
"""

from __future__ import annotations

from dataclasses import replace

from ...grammar.expr import FALSE, TRUE
from ...grammar.syntax import Number
from ..model import Select
from ..plan.attention import Attention
from ..text.pairs import Pairs
from ..text.text import atomic, indent

CHOOSERS = {"top": "top_groups", "above": "groups_above", "mass": "groups_of_mass"}


ZEROS = "torch.zeros(pairs, dtype=wide, device=q.device)"  # of every pair


def lines(attention: Attention, pairs: Pairs, made: list[str]) -> list[str]:
    """Return the lines that leave in `visible` what is chosen; `made` are those of its maps."""
    select = attention.mix.select
    assert select is not None
    writer = _Writer(attention, pairs, select)
    shape = "pairs = (*q.shape[:3], k.shape[-2])"
    return ["with torch.no_grad():", *indent([shape, *made, *writer.lines()])]


def by_those_who_share(select: Select, heads: int) -> list[str]:
    """Write what heads share: the sum of their scores, and what any of them is free to choose."""
    share = select.share
    if share == 1:
        return []
    given = f"{share}, {heads}"
    if select.by_heads:
        made = [f"e = of_heads(e.masked_fill(~free, 0), {given}).sum(2)"]
    else:
        made = [f"e = of_heads(e, {given})[:, :, 0]"]
    spread = "free.expand((*pairs[:3], free.shape[-1]))"
    return [*made, f"free = of_heads({spread}, {given}).any(2)"]


class _Writer:
    def __init__(self, attention: Attention, pairs: Pairs, select: Select) -> None:
        self.attention, self.select = attention, select
        self.pairs = pairs
        self.grouped = select.size > 1 or select.rows > 1

    def lines(self) -> list[str]:
        """Return all of them."""
        select = self.select
        done, free = [], "visible"
        if select.always != FALSE:
            done.append(f"always = visible & {atomic(self._truth('always'))}")
            free += " & ~always"
        if select.among != TRUE:
            free += f" & {atomic(self._truth('among'))}"
        done.append(f"free = {free}")
        if select.rows > 1 and "own" in self.attention.sequences:  # padding chooses with nobody
            done += ["if own is not None:", "    free = free & (own >= 0)"]
        done += self._grouped() if self.grouped else self._single()
        done += by_those_who_share(select, self.attention.heads)
        if select.rows > 1:
            done.append("free = any_of_rows(free, rows)")
        count = self._count()
        done += count
        number = "count" if count else repr(select.amount)
        done.append(f"chosen = {CHOOSERS[select.kind]}(e, free, {number})")
        if select.share > 1:
            done.append(f"chosen = chosen.repeat_interleave({select.share}, dim=1)")
        text = "at_groups(chosen, group)" if self.grouped else "chosen"
        read = f"visible & {text}"
        done.append(f"visible = {read if select.always == FALSE else f'always | ({read})'}")
        return done

    def _truth(self, name: str) -> str:
        return replace(self.pairs, wide=".double()").value(getattr(self.select, name)).text

    def _score(self) -> str:
        if isinstance(self.select.score, Number):  # all groups are as good
            return self.pairs.typed.format(self.select.score.value)
        return self.pairs.value(self.select.score).text

    def _rows(self) -> list[str]:
        if self.select.rows == 1:
            return []
        return [
            f"row, begun = groups_of_keys(i.mT, {self.select.rows})",
            "rows = row, begun.shape[-1]",
        ]

    def _single(self) -> list[str]:
        return [f"e = {atomic(self._score())}.to(wide).expand(pairs)"]

    def _grouped(self) -> list[str]:
        """Write the scores of groups, and which are free."""
        select = self.select
        done = [
            f"group, first = groups_of_keys(j, {select.size})",
            "count = first.shape[-1]",
            *self._rows(),
        ]
        every = "free.expand(pairs)"
        if select.within or select.size == 1:
            rows = "rows" if select.rows > 1 else "None"
            within = select.within or "max"
            done += [
                f"e = {atomic(self._score())}.to(wide).expand(pairs)",
                f'e = score_within(e, {every}, group, count, "{within}", {rows})',
            ]
        else:
            done += [
                "",
                "def score(j: Tensor) -> Tensor:",
                f"    return {atomic(self._score())}.to(wide)",
                "",
                "e = score(first).expand(*pairs[:3], count)",
            ]
        return [*done, f"free = any_of_groups({every}, group, count)"]

    def _count(self) -> list[str]:
        """Write how many are still to choose, where what is always read counts."""
        select = self.select
        if not select.counted or select.always == FALSE:
            return []
        forced = "always.expand(pairs)"
        if select.rows > 1 and "own" in self.attention.sequences:
            forced = "(always if own is None else always & (own >= 0)).expand(pairs)"
        if self.grouped:
            forced = f"any_of_groups({forced}, group, first.shape[-1])"
        if select.share > 1:
            forced = f"of_heads({forced}, {select.share}, {self.attention.heads}).any(2)"
        if select.rows > 1:
            forced = f"any_of_rows({forced}, rows)"
        return [f"count = ({select.amount} - {forced}.sum(-1, keepdim=True)).clamp(min=0)"]
