"""The meaning of a recurrent mixer (DESIGN 2.5): token by token, statement by statement.

    S <- S + outer(k, v)          [b, H, d, e] + [b, H, d, 1] · [b, H, 1, e]
    o <- q @ S                    [b, H, d] @ [b, H, d, e] → [b, H, e]

Every value is a tensor [b, H], [b, H, d] or [b, H, d, e]: a number, a vector or a matrix for
each batch element and query head. Where two meet elementwise, the smaller is constant along
the dimensions it lacks at the end, so a vector scales the rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..grammar.expr import rebuild
from ..grammar.functions import VECTOR_FUNCTIONS
from ..grammar.syntax import Binary, Call, Expr, Index, Name, Number, children
from ..ops.pointwise import evaluate
from .model import Block, Recurrence, Update
from .reference_attend import Given, _wide

Value = Tensor | int | float
Scope = Mapping[str, Value]


def scan(block: Block, mix: Recurrence, given: Given) -> Tensor:
    """Return the mixed heads [b, heads, n, value_dim].

    With segments, every state starts anew where a token's document is not the one before.
    Half precision is mixed in float32.
    """
    heads = {name: _per_head(x, block.heads) for name, x in given.streams.items()
             if _fits(x, block.heads)}  # fmt: skip
    fixed: dict[str, Value] = {
        name: _tensor_per_head(_wide(x), block.heads) for name, x in given.tensors.items()
    }
    q = given.streams["q"]
    batch = q.shape[0]
    zero = _wide(q).new_zeros(batch, block.heads)
    fixed["h"] = torch.arange(block.heads, device=q.device)[None].to(zero)
    start = {
        state.name: _filled(value(state.init, fixed), zero, state.shape) for state in mix.states
    }
    resets = _resets(given.segments, batch, q.shape[2], q.device)
    if mix.causal:
        outputs = _forward(mix.updates, fixed, heads, start, resets)
    else:
        outputs = _bidirectional(block, mix, fixed, heads, start, resets)
    o = [_filled(each, zero, (block.value_dim,)) for each in outputs]
    return torch.stack(o, dim=2).to(q.dtype)


def _forward(
    updates: tuple[Update, ...], fixed: Scope, streams: Mapping[str, Tensor],
    start: Mapping[str, Tensor], resets: Tensor,
) -> Iterable[Value]:  # fmt: skip
    """Yield each token's output, carrying the states along."""
    states = dict(start)
    for t in range(resets.shape[1]):
        states = _restarted(states, start, resets[:, t])
        now = {**fixed, **_at(streams, t), **states}
        for update in updates:
            now[update.name] = _kept(update, value(update.value, now), start)
        states = {name: torch.as_tensor(now[name]) for name in states}
        yield now["o"]


def _bidirectional(
    block: Block, mix: Recurrence, fixed: Scope, streams: Mapping[str, Tensor],
    start: Mapping[str, Tensor], resets: Tensor,
) -> Iterable[Value]:  # fmt: skip
    """Yield each token's output from the state after the last token of its document.

    The updates run over the keys' tokens; the other statements then over the queries'.
    """
    keys = {name: x for name, x in streams.items() if _axis(block, name) == _axis(block, "k")}
    queries = {name: x for name, x in streams.items() if _axis(block, name) == "n"}
    count = keys["k"].shape[2]
    if block.crosses:  # a context is one document
        resets = resets.new_zeros(resets.shape[0], max(count, resets.shape[1]))
    writes = [update for update in mix.updates if update.name != "o"]
    reads = [update for update in mix.updates if update.name not in start]

    history, states = [], dict(start)
    for t in range(count):
        states = _restarted(states, start, resets[:, t])
        now = {**fixed, **_at(keys, t), **states}
        for update in writes:
            now[update.name] = _kept(update, value(update.value, now), start)
        states = {name: torch.as_tensor(now[name]) for name in states}
        history.append(states)

    for t in range(queries["q"].shape[2]):
        ends = [_end(row, count - 1 if block.crosses else t, count) for row in resets.tolist()]
        final = {
            name: torch.stack([history[end][name][b] for b, end in enumerate(ends)])
            for name in start
        }
        now = {**fixed, **_at(queries, t), **final}
        for update in reads:
            now[update.name] = value(update.value, now)
        yield now["o"]


def _resets(segments: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Return where a document begins that is not the first, [b, n]."""
    resets = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    if segments is not None:
        resets[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return resets


def _end(resets: list[bool], t: int, count: int) -> int:
    """Return the last token of the document that token t lies in."""
    return next((later - 1 for later in range(t + 1, count) if resets[later]), count - 1)


def _restarted(
    states: dict[str, Tensor], start: Mapping[str, Tensor], reset: Tensor
) -> dict[str, Tensor]:
    if not reset.any():
        return states
    return {name: torch.where(reset.reshape(-1, *[1] * (each.ndim - 1)), start[name], each)
            for name, each in states.items()}  # fmt: skip


def _kept(update: Update, new: Value, start: Mapping[str, Tensor]) -> Value:
    """Return a statement's value, a state's in the shape of the state."""
    if update.name not in start:
        return new
    return _filled(new, start[update.name][..., 0], start[update.name].shape[2:])


# ── values for each head ─────────────────────────────────────────────────────────────────


def _axis(block: Block, name: str) -> str:
    stream = block.stream(name)
    return stream.shape.tokens if stream else "m" if name == "context" else "n"


def _fits(x: Tensor, heads: int) -> bool:
    return x.ndim == 4 or x.shape[-1] % heads == 0


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Return a stream as [b, H, tokens, d], or [b, H, tokens] for one feature a head."""
    if x.ndim == 4:
        return _wide(x).repeat_interleave(heads // x.shape[1], dim=1)
    x = _wide(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    return x.squeeze(-1)


def _tensor_per_head(x: Tensor, heads: int) -> Tensor:
    """Return a tensor whose first dimension is the heads as [1, H, …], another as [1, 1, …]."""
    return x[None] if x.ndim and x.shape[0] == heads else x[None, None]


def _at(streams: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: x[:, :, t] for name, x in streams.items()}


def _filled(x: Value, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a value as a tensor [b, H, *shape]."""
    x = torch.as_tensor(x).to(zero)
    size = (*zero.shape[:2], *shape)
    if x.ndim == 0:
        return x.expand(size)
    return x.reshape(*x.shape, *[1] * (len(size) - x.ndim)).expand(size)


# ── statements ───────────────────────────────────────────────────────────────────────────


def value(expr: Expr, scope: Scope) -> Value:
    """Return the value of a mixer's expression."""
    match expr:
        case Number(number):
            return number
        case Name(id):
            return scope[id]
        case Index(Name(id), items) if all(item == Name("h") for item in items):
            return scope[id]  # values are those of the head already
        case Binary("@", left, right):
            return _matmul(_tensor(value(left, scope)), _tensor(value(right, scope)))
        case Call(name, args, ()) if name in VECTOR_FUNCTIONS:
            return _vector_function(name, [_tensor(value(arg, scope)) for arg in args])
    parts = _aligned([value(each, scope) for each in children(expr)])
    names = [f"part {at}" for at in range(len(parts))]
    unread = iter(names)
    elementwise = rebuild(expr, lambda _: Name(next(unread)))
    result: Value = evaluate(elementwise, dict(zip(names, parts, strict=True)))
    return result


def _aligned(parts: list[Value]) -> list[Value]:
    """Give tensors the same number of dimensions, new ones at the end."""
    most = max((x.ndim for x in parts if isinstance(x, Tensor)), default=0)
    return [
        x.reshape(*x.shape, *[1] * (most - x.ndim)) if isinstance(x, Tensor) else x for x in parts
    ]


def _tensor(x: Value) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{x} is a number where a vector or matrix is needed")
    return x


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    match a.ndim - 2, b.ndim - 2:
        case 1, 1:
            return (a * b).sum(-1)
        case 1, 2:
            return (a[..., None, :] @ b)[..., 0, :]
        case 2, 1:
            return (a @ b[..., None])[..., 0]
        case 2, 2:
            return a @ b
        case _:
            raise TypeError("`@` needs vectors or matrices on both sides")


def _vector_function(name: str, args: list[Tensor]) -> Tensor:
    """Apply `sum`, `mean`, `norm` (over all dimensions there are), `outer` or `dot`."""
    match name, args:
        case "outer", [a, b] if a.ndim == b.ndim == 3:
            return a[..., :, None] * b[..., None, :]
        case "dot", [a, b] if a.ndim == b.ndim == 3:
            return (a * b).sum(-1)
        case "sum", [a] if a.ndim > 2:
            return a.flatten(2).sum(-1)
        case "mean", [a] if a.ndim > 2:
            return a.flatten(2).mean(-1)
        case "norm", [a] if a.ndim > 2:
            return torch.linalg.vector_norm(a.flatten(2), dim=-1)
    raise TypeError(f"`{name}` needs vectors")
