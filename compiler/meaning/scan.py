"""The meaning of a recurrent mixer (DESIGN 2.5): token by token, statement by statement.

    S <- S + outer(k, v)          [b, H, d, e] + [b, H, d, 1] · [b, H, 1, e]
    o <- q @ S                    [b, H, d] @ [b, H, d, e] → [b, H, e]

Every value is a tensor [b, H], [b, H, d] or [b, H, d, e]: a number, a vector or a matrix for
each batch element and query head. Where two meet elementwise, the smaller is constant along
the dimensions it lacks at the end, so a vector scales the rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ...grammar.syntax import Expr, Index, Name
from ..model import Mixing, Recurrence, State, Update
from . import values as values
from .attend import Given, wide
from .values import Value, per_head

Scope = Mapping[str, Value]
States = dict[str, Tensor]


def scan(mixing: Mixing, given: Given) -> Tensor:
    """Return the mixed heads [b, heads, n, value_dim].

    Where the mixer resets, every state starts anew at a token whose document is not that of
    the token before. Half precision is mixed in float32.
    """
    x, mix = given.streams["x"], mixing.mix
    assert isinstance(mix, Recurrence)
    if 0 in x.shape[:2]:  # no token at all
        return x.new_zeros(x.shape[0], mixing.heads, x.shape[1], mixing.shape.dim)
    streams = {
        each.name: per_head(wide(given.streams[each.name]), mixing.heads) for each in mixing.inputs
    }
    fixed = {name: wide(each) for name, each in given.tensors.items()}
    head = wide(x).new_zeros(x.shape[0], mixing.heads)  # what every value begins like
    start = {each.name: _filled(value(each.init, fixed), head, each.kept) for each in mix.states}
    resets = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if mix.resets and given.segments is not None:
        resets[:, 1:] = given.segments[:, 1:] != given.segments[:, :-1]
    run = _forward if mix.causal else _bidirectional
    outputs = run(mix, fixed, streams, start, resets)
    o = [_filled(each, head, (mixing.shape.dim,)) for each in outputs]
    return torch.stack(o, dim=2).to(x.dtype)


def _forward(
    mix: Recurrence, fixed: Scope, streams: Mapping[str, Tensor], start: States, resets: Tensor
) -> Iterable[Value]:
    """Yield each token's output, carrying the states along."""
    states, number = start, torch.zeros_like(resets[:, 0], dtype=torch.int64)
    for t in range(resets.shape[1]):
        states = _restarted(states, start, resets[:, t])
        number = number.masked_fill(resets[:, t], 0)
        token = {**fixed, **_at(streams, t)}
        sets = {
            each.name: _Levels(each, states[each.name], number.tolist(), token)
            for each in mix.leveled
        }
        now = _run(mix.updates, {**token, **states}, start, sets)
        states = {**_states(now, start), **{name: each.levels for name, each in sets.items()}}
        number = number + 1
        yield now["o"]


def _bidirectional(
    mix: Recurrence, fixed: Scope, streams: Mapping[str, Tensor], start: States, resets: Tensor
) -> Iterable[Value]:
    """Yield each token's output from the states after the last token of its document."""
    batch, tokens = resets.shape
    states, history = start, []
    for t in range(tokens):
        states = _restarted(states, start, resets[:, t])
        now = _run(
            [each for each in mix.updates if each.name != "o"],
            {**fixed, **_at(streams, t), **states},
            start,
        )
        states = _states(now, start)
        history.append(states)
    ends = [[_end(row, t) for t in range(tokens)] for row in resets.tolist()]
    outputs = [each for each in mix.updates if each.name not in start]
    for t in range(tokens):
        final = {
            name: torch.stack([history[ends[b][t]][name][b] for b in range(batch)])
            for name in start
        }
        yield _run(outputs, {**fixed, **_at(streams, t), **final}, start)["o"]


class _Levels:
    """A state that is kept in levels, [b, H, levels, …], while one token is taken up."""

    def __init__(self, state: State, levels: Tensor, numbers: list[int], token: Scope) -> None:
        assert state.weights is not None
        rows = zip(levels, numbers, strict=True)
        self.name, self.levels = state.name, torch.stack([self._merged(*row) for row in rows])
        head = levels.flatten(2)[..., 0]
        self.weights = _filled(value(state.weights, token), head, (state.levels,))

    @staticmethod
    def _merged(levels: Tensor, number: int) -> Tensor:
        """Merge the levels [H, levels, …] that are full before a token with this number."""
        if number == 0:
            return levels
        zeros = next(at for at in range(number.bit_length()) if number >> at & 1)
        into = min(zeros + 1, levels.shape[1] - 1)
        parts = list(levels.unbind(1))
        parts[into] = torch.stack(parts[: into + 1]).sum(0)
        parts[:into] = [torch.zeros_like(parts[0])] * into
        return torch.stack(parts, 1)

    def read(self) -> Tensor:
        """Return what the state is to whoever reads it: the weighed sum of its levels."""
        lifted = [1] * (self.levels.ndim - 3)
        return (self.weights.reshape(*self.weights.shape, *lifted) * self.levels).sum(2)

    def write(self, expr: Expr, scope: Scope) -> None:
        """Write f(level) into the first level and f(level) - f(0), linear in it, into others."""

        def f(level: Tensor) -> Tensor:
            new = value(expr, {**scope, self.name: level})
            return _filled(
                new, level.flatten(2)[..., 0] if level.ndim > 2 else level, level.shape[2:]
            )

        first, *others = self.levels.unbind(2)
        added = f(torch.zeros_like(first))
        self.levels = torch.stack([f(first), *(f(each) - added for each in others)], 2)


def _run(
    updates: Iterable[Update],
    scope: dict[str, Value],
    start: States,
    sets: Mapping[str, _Levels] = MappingProxyType({}),
) -> dict[str, Value]:
    """Run statements top to bottom; a state keeps the shape it started with."""
    scope |= {name: each.read() for name, each in sets.items()}
    for update in updates:
        if update.name in sets:
            sets[update.name].write(update.value, scope)
            scope[update.name] = sets[update.name].read()
            continue
        new = value(update.value, scope)
        if update.name in start:
            like = start[update.name]
            new = _filled(new, like.flatten(2)[..., 0] if like.ndim > 2 else like, like.shape[2:])
        scope[update.name] = new
    return scope


def _states(scope: Scope, start: States) -> States:
    return {name: torch.as_tensor(scope[name]) for name in start}


def _restarted(states: States, start: States, reset: Tensor) -> States:
    if not reset.any():
        return states
    return {
        name: torch.where(reset.reshape(-1, *[1] * (each.ndim - 1)), start[name], each)
        for name, each in states.items()
    }


def _end(resets: list[bool], t: int) -> int:
    """Return the last token of the document that token t lies in."""
    return next((at - 1 for at in range(t + 1, len(resets)) if resets[at]), len(resets) - 1)


# ── values for each head ─────────────────────────────────────────────────────────────────


def _at(streams: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: x[:, :, t] for name, x in streams.items()}


def _filled(x: Value, head: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a value as a tensor [b, H, *shape]."""
    size = (*head.shape, *shape)
    x = x.to(head) if isinstance(x, Tensor) else head.new_tensor(x)
    return x.reshape(*x.shape, *[1] * (len(size) - x.ndim)).expand(size)


# ── statements ───────────────────────────────────────────────────────────────────────────


def value(expr: Expr, scope: Scope) -> Value:
    """Return the value of a mixer's expression.

    `t[h]` is a tensor's slice for the head, `t[]` a tensor that all heads share.
    """

    def leaf(node: Expr) -> Value | None:
        match node:
            case Name(id) if id not in ("true", "false"):
                return scope[id]
            case Index(Name(id), items):
                tensor = scope[id]
                assert isinstance(tensor, Tensor)
                return tensor[None] if items else tensor[None, None]
        return None

    return values.value(expr, leaf, lead=2)
