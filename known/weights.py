"""Which tensor of theirs is which of ours, both ways.

Rules are lines, of which the first that fits a name counts:

    model.layers.{i}.self_attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
    model.layers.{i}.self_attn.qkv_proj.weight -> layers.{i}.attn.(q|k|v)_proj.weight
    gpt_neox.layers.{i}.attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} in 4
    transformer.h.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t} across
    {any}rotary_emb.inv_freq -> - it follows from the configuration

An arrow may begin the next line. `{i}`, `{j}` are numbers, `{any}` is anything, any other name a
word; in ours `{2i}` and `{2i+1}` are two layers that one of theirs is, `{last}` is the highest.
Several of ours in brackets are the rows of theirs one after the other, with `in 4` (or `in` a
field) in each of so many groups; the rows of experts are the second dimension. `across` is a
transposed matrix, `beside` columns one after the other, `stacked` a row (or an expert) of ours,
`after 2` leaves out the first rows of theirs. `-` is what has no place in ours, and why. Where
several of theirs make one of ours they are joined in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..grammar.diagnostics import Diagnostic, LoomError
from ..grammar.source import Source, Span

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
_WORDS = {"i": r"\d+", "j": r"\d+", "any": r".*"}  # what a name in a line stands for
_WORD = r"\w+"
TIED = "the head is the embedding"


@dataclass(frozen=True)
class Rule:
    """A line: a pattern of theirs, the patterns of ours, how the one is laid in the other."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    across: bool = False
    stacked: bool = False
    beside: bool = False
    after: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A tensor of theirs: its shape, the tensors of ours it holds (none, for a reason)."""

    theirs: str
    shape: Shape
    ours: tuple[str, ...]
    rule: Rule
    reason: str = ""


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", text)
    kinds = [f"(?P<{each}>{_WORDS.get(each, _WORD)})" for each in parts[1::2]]
    fixed = [re.escape(each) for each in parts[::2]]
    return re.compile("".join(a + b for a, b in zip(fixed, [*kinds, ""], strict=True)))


def rule(line: str, sizes: Mapping[str, int]) -> Rule:
    """Read a line; `sizes` are the numbers that its words after `in` stand for."""
    theirs, ours = (each.strip() for each in line.split(" -> "))
    if ours.startswith("-"):
        return Rule(theirs, (), reason=ours.removeprefix("-").strip())
    pattern, *words = ours.split()
    before, *names, after = re.split(r"[(|)]", pattern) if "(" in pattern else (pattern, "", "")
    groups = words[words.index("in") + 1] if "in" in words else "1"
    count = int(groups) if groups.isdecimal() else sizes[groups]
    several = tuple(f"{before}{name}{after}" for name in names)
    after = int(words[words.index("after") + 1]) if "after" in words else 0
    across, stacked, beside = (it in words for it in ("across", "stacked", "beside"))
    return Rule(theirs, several, count, across, stacked, beside, after)


def groups_of(text: str) -> set[str]:
    """Return the words after `in` in some lines."""
    return set(re.findall(r" in ([a-z]\w*)", text))


def rules(text: str, sizes: Mapping[str, int]) -> tuple[Rule, ...]:
    """Read lines; `sizes` are what the words after `in` stand for."""
    lines = re.sub(r"\n +->", " ->", text).splitlines()
    return tuple(rule(line, sizes) for line in lines if line.strip())


@dataclass(frozen=True)
class Weights:
    """The tensors of a model of theirs and of ours: `rows` say which is which.

    `shapes` are those of ours. Moves are exact: numbers change places, none is changed.
    """

    rows: tuple[Row, ...]
    shapes: Mapping[str, Shape]

    @property
    def unused(self) -> dict[str, str]:
        """The tensors of theirs that have no place in ours, and why."""
        return {row.theirs: row.reason for row in self.rows if not row.ours}

    def ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of theirs (weights or gradients) as ours; those that lack are left out."""
        import torch

        found: dict[str, list[Tensor]] = {}
        for row in self.rows:
            if row.ours and row.theirs in theirs:
                parts = apart(row, theirs[row.theirs], self.shapes)
                for name, part in zip(row.ours, parts, strict=True):
                    found.setdefault(name, []).append(part)
        return {
            name: torch.cat(parts, _seam(parts[0].shape, self.shapes[name])).reshape(
                self.shapes[name]
            )
            for name, parts in found.items()
        }

    def theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of ours as theirs, but for those that have no place in ours."""
        import torch

        pieces: dict[str, list[Shape]] = {}
        for row in self.rows:
            for name, shape in zip(row.ours, self._parts(row), strict=True):
                pieces.setdefault(name, []).append(shape)
        cut: dict[str, list[Tensor]] = {}
        for name, shapes in pieces.items():
            seam = _seam(shapes[0], self.shapes[name])
            whole = list(shapes[0])
            whole[seam] = sum(each[seam] for each in shapes)
            cut[name] = list(
                torch.split(ours[name].reshape(whole), [it[seam] for it in shapes], seam)
            )
        done: dict[str, Tensor] = {}
        for row in self.rows:
            if row.ours:
                parts = [cut[name].pop(0) for name in row.ours]
                done[row.theirs] = together(row, parts).contiguous()
            elif row.reason == TIED:
                done[row.theirs] = ours["embed_tokens.weight"]
        assert torch.is_tensor(next(iter(done.values())))
        return done

    def _parts(self, row: Row) -> list[Shape]:
        import torch

        if not row.ours:
            return []
        empty = torch.empty(row.shape, device="meta")
        return [tuple(each.shape) for each in apart(row, empty, self.shapes)]


def resolved(
    rules: Iterable[Rule], theirs: Mapping[str, Shape], ours: Mapping[str, Shape]
) -> Weights:
    """Find the place of every tensor.

    Raises `LoomError` (L606) with every tensor of theirs that no rule names or that does not fit,
    and every one of ours that none of theirs fills.
    """
    rows, wrong = [], []
    lines = tuple(rules)
    for name in sorted(theirs, key=_natural):
        row = _row(lines, name, theirs[name], ours)
        if row is None:
            wrong.append(f"`{name}` {list(theirs[name])} has no place in ours")
        else:
            rows.append(row)
    found = Weights(tuple(rows), ours)
    wrong += _misfits(found)
    if wrong:
        nowhere = Span(Source("weights", ""), 0, 0)
        raise LoomError([Diagnostic("L606", each, nowhere) for each in wrong])
    return found


def _row(rules: tuple[Rule, ...], name: str, shape: Shape, ours: Mapping[str, Shape]) -> Row | None:
    for each in rules:
        if found := _pattern(each.theirs).fullmatch(name):
            names = tuple(_named(it, found.groupdict(), ours) for it in each.ours)
            if names == ("lm_head.weight",) and "lm_head.weight" not in ours:
                return Row(name, shape, (), each, TIED)
            if not each.reason and not all(it in ours for it in names):
                continue
            return Row(name, shape, names, each, each.reason)
    return None


def _named(ours: str, said: Mapping[str, str], known: Mapping[str, Shape]) -> str:
    """Fill a pattern; `{2i}` and `{2i+1}` are two layers of one of theirs, `{last}` the highest."""
    if "{last}" in ours:
        layers = (re.match(r"layers\.(\d+)\.", name) for name in known)
        ours = ours.replace("{last}", str(max(int(each[1]) for each in layers if each)))
    if "i" in said:
        for each, more in (("{2i}", 0), ("{2i+1}", 1)):
            ours = ours.replace(each, str(2 * int(said["i"]) + more))
    return ours.format(**said)


def _misfits(weights: Weights) -> list[str]:
    """Say which tensors of ours are not filled, or by as many numbers as they hold."""
    filled = dict.fromkeys(weights.shapes, 0)
    wrong = []
    for row in weights.rows:
        try:
            parts = weights._parts(row)
        except (RuntimeError, ValueError) as problem:
            names = ", ".join(row.ours)
            wrong.append(f"`{row.theirs}` {list(row.shape)} is not {names}: {problem}")
            continue
        for name, shape in zip(row.ours, parts, strict=True):
            filled[name] += math.prod(shape)
    for name, count in filled.items():
        wanted = math.prod(weights.shapes[name])
        if count != wanted:
            have = f"{count} numbers of theirs" if count else "no tensor of theirs"
            wrong.append(f"`{name}` {list(weights.shapes[name])} has {have}")
    return wrong


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort `layers.10` after `layers.9`."""
    return [(int(it), "") if it.isdecimal() else (-1, it) for it in re.split(r"(\d+)", name)]


def _axis(row: Row, rank: int, rows: int) -> int:
    """Return where rows are: each expert has its own."""
    lists = rank == 3 and rows > 1  # which a convolution is not
    return int(lists or (".experts." in row.ours[0] and rank > 1))


def apart(row: Row, tensor: Tensor, shapes: Mapping[str, Shape]) -> list[Tensor]:
    """Take a tensor of theirs apart: one part for each of ours."""
    import torch

    rule = row.rule
    if rule.across and tensor.ndim > 1:
        tensor = tensor.mT
    if rule.stacked:
        tensor = tensor[None]
    tensor = tensor[rule.after :]
    if len(row.ours) == 1:
        return [tensor]
    if rule.beside:
        sizes = [shapes[each][1] for each in row.ours]
        return list(torch.split(tensor, _shared(tensor.shape[1], sizes), 1))
    at = _axis(row, tensor.ndim, tensor.shape[1] if tensor.ndim > 1 else 1)
    sizes = [
        math.prod(shapes[it]) if tensor.ndim == 1 else shapes[it][at if not rule.stacked else 1]
        for it in row.ours
    ]
    sizes = _shared(tensor.shape[at] // rule.groups, sizes)
    parts = torch.split(torch.unflatten(tensor, at, (rule.groups, -1)), sizes, at + 1)
    return [part.flatten(at, at + 1) for part in parts]


def together(row: Row, parts: list[Tensor]) -> Tensor:
    """Put parts of ours together again, as `apart` takes them apart."""
    import torch

    rule = row.rule
    if len(parts) == 1:
        whole = parts[0]
    elif rule.beside:
        whole = torch.cat(parts, 1)
    else:
        at = _axis(row, parts[0].ndim, parts[0].shape[1] if parts[0].ndim > 1 else 1)
        lists = [torch.unflatten(part, at, (rule.groups, -1)) for part in parts]
        whole = torch.cat(lists, at + 1).flatten(at, at + 1)
    if rule.stacked:
        whole = whole[0]
    if rule.across and whole.ndim > 1:
        whole = whole.mT
    if rule.after:  # rows that nothing reads
        whole = torch.cat([torch.zeros_like(whole[: rule.after]), whole])
    return whole.reshape(row.shape)


def _shared(total: int, sizes: list[int]) -> list[int]:
    """Return how much each gets, where all together need as much, or have the rest from others."""
    return [each * total // sum(sizes) for each in sizes]


def _seam(part: Iterable[int], whole: Shape) -> int:
    """Return along which dimension parts are joined: columns where the rows are there."""
    part = tuple(part)
    return int(len(part) > 1 and len(whole) > 1 and part[:1] == whole[:1] and part != whole)
