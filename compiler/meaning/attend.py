"""The meaning of `mix = attend` (DESIGN 2.4), over the list of visible pairs.

    s[h,i,j] = scale · similarity(q[h,i], k[g,j])  g = h // (heads / kv_heads)
    s        = score(s, h, i, j)
    p        = normalize(s) over visible j;       p = 0 elsewhere
    p        = weights(p, h, i, j)
    o[h,i]   = Σ_j p[h,i,j] · v[g,j]

Where v reads o itself, as  v + again · o  in place of v.

The mask picks pairs (batch, head, query, key) out of the dense s; score, normaliser and
weights are then evaluated on the vector of these pairs alone. What a row may not see is thus
never computed with: it cannot make a NaN, and a row that sees nothing has no pairs, hence
o = 0 and zero gradients. This costs memory, and buys a text that says what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...grammar.expr import names as names_of
from ...grammar.functions import GROUPED, MAP_FUNCTIONS
from ...grammar.syntax import POOLED, Binary, Call, Compare, Expr, Index, Name, Unary, walk
from ...ops.shape import pooling
from ..model import Keep, Mixing, Normalizer, Pairwise, Select, Statistic, is_map_elsewhere
from .carry import carried_logits
from .pairs import Groups, Map, Pairs
from .select import kept, selected
from .values import Value, value


class Places(dict[str, Tensor]):
    """The position of every token, by what the tokens are: n, m, or a fixed number of them."""

    def __missing__(self, tokens: str) -> Tensor:
        of, stride = pooling(tokens)
        if stride > 1:
            count = -(-self[of].shape[1] // stride)
            return torch.arange(count, device=self["n"].device).expand(len(self["n"]), -1)
        return torch.arange(int(tokens), device=self["n"].device).expand(len(self["n"]), -1)


class Given(NamedTuple):
    """What a block was called with, and the streams it made of that."""

    streams: Mapping[str, Tensor]  # [b, heads, tokens, d] or [b, tokens, d]
    tensors: Mapping[str, Tensor]  # params and consts
    positions: Places  # tokens axis → [b, tokens]
    segments: Tensor | None  # [b, n]; None: one document
    training: bool
    mixed: dict[str, Mixed]  # what has been attended to so far
    below: Mapping[str, Tensor] = MappingProxyType({})  # maps of other layers [b, heads, n, m]


def attend(mixing: Mixing, given: Given) -> Mixed:
    """Return the mixed heads [b, heads, queries, value_dim], and what can be asked of the map.

    Half precision is mixed in float32, for then no finite q and k give an infinite logit.
    """
    mix = mixing.mix
    assert isinstance(mix, Pairwise)
    q, k, v = (wide(given.streams[each.name]) for each in mixing.inputs[:3])
    scope = _Scope(mixing, given, torch.Size((*q.shape[:3], k.shape[2])))
    visible = scope.dense(mix.mask)
    if mix.select is not None:
        visible = _read_of(mix.select, mix, scope, visible, (q, k), mixing.heads // k.shape[1])
    if mix.keep is not None:
        visible = _still_held(mix.keep, mix, scope, visible, (q, k), given)
    pairs, rows, names = _placed(scope, visible)

    def read(expr: Expr, more: Mapping[str, Value]) -> Value:
        return scope.evaluate(expr, pairs, {**names, **more})

    def column(expr: Expr, more: Mapping[str, Value]) -> Tensor:
        """One number a pair, in the precision of q."""
        return torch.as_tensor(read(expr, more)).to(q).expand(pairs.key.shape)

    names |= _maps_below(mix, given, visible)
    s = _met(mix, scope, visible, (q, k), given, column)
    logits = column(mix.score, {"s": mix.scale * s})
    plain = normalize(mix.normalize, logits, rows, read).to(q).expand(pairs.key.shape)
    weight = column(mix.weights, {"s": logits, "p": plain})
    map_s, map_p = (
        q.new_zeros(scope.shape).index_put(tuple(pairs), each) for each in (logits, weight)
    )
    p = functional.dropout(map_p, mix.dropout, given.training)
    values = v.repeat_interleave(mixing.heads // v.shape[1], dim=1)
    o = p @ values
    if mix.again is not None:  # after a round for each query nothing changes: the mask is strict
        dense = q.new_zeros(scope.shape).index_put(tuple(pairs), column(mix.again, {}))
        first, again = o, p * dense
        for _ in range(scope.shape[2]):
            o = first + again @ o
    o = o.to(given.streams[mixing.inputs[2].name].dtype)

    def statistic(asked: Statistic) -> Tensor:
        """Return a number for every row or column of the map, [b, heads, tokens, 1]."""
        kind, expr = asked.kind, asked.expr
        if kind == "map":
            return map_p.detach()
        scope.axes |= {each.name: each.shape for each in asked.inputs}
        if kind in ("lse", "joint"):
            nothing = 0 if kind == "lse" else -torch.inf
            log = log_denominator(mix.normalize, logits, scope, pairs, nothing)
            return log[..., None].to(o.dtype)
        x = -plain * torch.where(plain > 0, plain, 1).log()  # the terms of the entropy
        if expr is not None:
            x = column(expr, {"p": plain})
        dense = q.new_zeros(scope.shape).index_put(tuple(pairs), x)
        return dense.sum(-2 if kind == "columns" else -1)[..., None].to(o.dtype)

    return Mixed(o, map_s, map_p, statistic)


def _placed(scope: _Scope, visible: Tensor) -> tuple[Pairs, Groups, dict[str, Value]]:
    """Return the visible pairs, of which the scope's map is then, their rows, and their names."""
    pairs = Pairs(*visible.nonzero(as_tuple=True))
    scope.map = Map(pairs, scope.shape)
    rows = scope.map.rows
    return pairs, rows, scope.names(pairs) | {"seen": rows.sizes[rows.of].double()}


def _maps_below(mix: Pairwise, given: Given, visible: Tensor) -> dict[str, Value]:
    """Return what expressions read of the maps of other layers, at every pair."""
    return {
        node.id: given.below[node.id][visible]
        for expr in (mix.score, mix.weights)
        for node in walk(expr)
        if isinstance(node, Name) and is_map_elsewhere(node.id)
    }


def _met(
    mix: Pairwise,
    scope: _Scope,
    visible: Tensor,
    met: tuple[Tensor, Tensor],
    given: Given,
    column: Callable[[Expr, Mapping[str, Value]], Tensor],
) -> Tensor:
    """Return the similarity of every visible pair."""
    q, k = met
    if mix.carry is not None:
        mixing = scope.mixing
        carriers = {each.name for each in mixing.inputs[3:]} & names_of(mix.carry) - {"k"}
        streams = {name: wide(given.streams[name]) for name in carriers}
        return carried_logits(mix.carry, q, k, streams, given.tensors)[visible]
    if mix.similarity is None:
        return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT)[visible]
    return column(mix.similarity, {})


def _still_held(
    keep: Keep,
    mix: Pairwise,
    scope: _Scope,
    shown: Tensor,
    met: tuple[Tensor, Tensor],
    given: Given,
) -> Tensor:
    """Return which of the pairs that a mask shows are read [b, heads, n, m], query by query.

    The weights of all queries so far are made anew for each. No gradient comes of it.
    """
    b, heads, queries, keys = shown.shape
    seen = torch.zeros_like(shown)
    held = shown.new_zeros(b, heads // keep.share, keys)
    for i in range(queries):
        held[..., i] = True  # its own key
        seen[:, :, i] = shown[:, :, i] & held.repeat_interleave(keep.share, 1)
        with torch.no_grad():
            score = _score_of_held(keep, mix, scope, seen, met, given)[:, :, i]
        row, always = seen[:, :, i], scope.dense(keep.always)[:, :, i]
        held = kept(keep, row, score, always)
    return seen


def _score_of_held(
    keep: Keep,
    mix: Pairwise,
    scope: _Scope,
    seen: Tensor,
    met: tuple[Tensor, Tensor],
    given: Given,
) -> Tensor:
    """Return by what keys stay held [b, heads, n, m], of the pairs that are read so far."""
    pairs, rows, names = _placed(scope, seen)
    names |= _maps_below(mix, given, seen)

    def read(expr: Expr, more: Mapping[str, Value]) -> Value:
        return scope.evaluate(expr, pairs, {**names, **more})

    def column(expr: Expr, more: Mapping[str, Value]) -> Tensor:
        return torch.as_tensor(read(expr, more)).to(met[0]).expand(pairs.key.shape)

    s = mix.scale * _met(mix, scope, seen, met, given, column)
    logits = column(mix.score, {"s": s})
    p = normalize(mix.normalize, logits, rows, read).to(met[0]).expand(pairs.key.shape)
    every = met[0].new_zeros(scope.shape).index_put(tuple(pairs), p)
    v = wide(given.streams[scope.mixing.inputs[2].name])
    o = (every @ v.repeat_interleave(scope.shape[1] // v.shape[1], 1))[pairs[:3]]
    score = column(keep.score, {"s": s, "p": p, "o": o})
    return met[0].new_zeros(scope.shape).index_put(tuple(pairs), score)


def _read_of(
    select: Select,
    mix: Pairwise,
    scope: _Scope,
    visible: Tensor,
    met: tuple[Tensor, Tensor],
    group: int,
) -> Tensor:
    """Return which of the visible pairs are read. No gradient comes of it."""
    with torch.no_grad():
        pairs = Pairs(*visible.nonzero(as_tuple=True))
        scope.map, names = Map(pairs, scope.shape), scope.names(pairs)
        if "s" in names_of(select.score):
            q, k = met
            s = (q @ k.repeat_interleave(group, dim=1).mT)[visible]
            if mix.similarity is not None:
                s = torch.as_tensor(scope.evaluate(mix.similarity, pairs, names))
            names["s"] = mix.scale * s
        score = torch.as_tensor(scope.evaluate(select.score, pairs, names)).to(met[0])
        dense = met[0].new_zeros(scope.shape)
        dense = dense.index_put(tuple(pairs), score.expand(pairs.key.shape))
        always, among = scope.dense(select.always), scope.dense(select.among)
        return selected(select, visible, dense, always, among, select.by_heads)


class Mixed(NamedTuple):
    """What attention gives: the mixed heads, its map, and numbers of its rows or columns."""

    o: Tensor
    s: Tensor  # the logits [b, heads, queries, keys], zero where nothing is seen
    p: Tensor  # the weights, likewise
    statistic: Callable[[Statistic], Tensor]


def wide(x: Tensor) -> Tensor:
    """Return half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ── who stands where ─────────────────────────────────────────────────────────────────────


class _Scope:
    """What the names in an expression mean at some pairs."""

    map: Map  # once it is known who is visible

    def __init__(self, mixing: Mixing, given: Given, shape: torch.Size) -> None:
        self.mixing, self.given, self.shape = mixing, given, shape
        self.axes = {each.name: each.shape for each in mixing.inputs}

    def dense(self, mask: Expr) -> Tensor:
        """Return a mask at every pair there is, [b, H, n, m]."""
        device = self.given.positions["n"].device
        axes = (torch.arange(size, device=device) for size in self.shape)
        places = Pairs(*(at.reshape(*[1] * d, -1, *[1] * (3 - d)) for d, at in enumerate(axes)))
        seen = self.evaluate(mask, places, self.names(places))
        return torch.as_tensor(seen, dtype=torch.bool, device=device).expand(self.shape)

    def names(self, pairs: Pairs) -> dict[str, Value]:
        """Whole numbers are float64: exact up to 2**53, and they round nothing they meet."""
        positions = self.given.positions
        keys = positions[self.mixing.keys]
        keys = keys if self.shape[3] else keys.new_zeros(len(keys), 1)  # of rows without any
        return {
            "i": positions[self.mixing.queries][pairs.batch, pairs.query].double(),
            "j": keys[pairs.batch, pairs.key].double(),
            "h": pairs.head.double(),
            "n": self.shape[2],
            "m": self.shape[3],
        }

    def evaluate(self, expr: Expr, pairs: Pairs, names: Mapping[str, Value]) -> Value:
        """Return the expression's value at each pair, or its one value."""

        def leaf(node: Expr) -> Value | None:
            match node:
                case Name(id) if id not in ("true", "false"):
                    return names[id]
                case Index():
                    return self._lookup(node, pairs, names)
                case Call(name, (arg, *rest)) if name in MAP_FUNCTIONS:
                    x = torch.as_tensor(self.evaluate(arg, pairs, names))
                    x = x if x.is_floating_point() else x.double()  # of a number as it is
                    tensor = self._whole(rest[0]) if rest and name not in GROUPED else None
                    if name in GROUPED:
                        tensor = torch.as_tensor(self.evaluate(rest[0], pairs, names))
                    return self.map.of(name, x, tensor, self.given.training)
            return None

        return value(expr, leaf, lead=pairs.batch.ndim)

    def _whole(self, node: Expr) -> Tensor:
        assert isinstance(node, Index)
        assert isinstance(node.base, Name)
        return wide(self.given.tensors[node.base.id])

    def _lookup(self, node: Index, pairs: Pairs, names: Mapping[str, Value]) -> Tensor:
        """Return t[…]. What points past an end reads the element at that end."""
        assert isinstance(node.base, Name)
        name = node.base.id
        pooled = [isinstance(each, Call) and each.function == POOLED for each in node.items]
        items = [
            self.evaluate(each.args[0] if isinstance(each, Call) and found else each, pairs, names)
            for each, found in zip(node.items, pooled, strict=True)
        ]
        if name in self.given.tensors:
            found = _take(self.given.tensors[name], (), items)
            if any(isinstance(item, Tensor) and item.ndim for item in items) or not found.ndim:
                return found
            return found.reshape(*[1] * pairs.batch.ndim, *found.shape)  # alike for every pair
        if name == "doc":
            segments = self.given.segments
            if segments is None:
                segments = torch.zeros_like(self.given.positions["n"])
            own = pairs.query if node.items[0] == Name("i") else pairs.key
            return _take(segments, (pairs.batch,), [own])
        shape = self.axes[name]
        at = 0 if shape.heads is None else 1
        if any(pooled):
            if not pooled[at := len(items) - 2] and node.items[at] == Name("i"):
                items[at] = pairs.query  # of a map beside
            return _take(self.given.streams[name], (pairs.batch,), items)
        places = names["i"] if node.items[at] == Name("i") else names["j"]
        own = pairs.query if node.items[at] == Name("i") else pairs.key
        items[at] = own + (items[at] - places)  # so many tokens from its own
        return _take(self.given.streams[name], (pairs.batch,), items)


def _take(table: Tensor, batch: tuple[Tensor, ...], items: list[Value]) -> Tensor:
    """Return table[batch, items…]."""
    sizes = table.shape[len(batch) :]
    where = [
        torch.as_tensor(item, device=table.device).floor().long().clamp(0, size - 1)
        for item, size in zip(items, sizes, strict=False)
    ]
    return wide(table[(*batch, *where)])


# ── scores to weights ────────────────────────────────────────────────────────────────────

Read = Callable[[Expr, Mapping[str, Value]], Value]


def normalize(normalizer: Normalizer, s: Tensor, rows: Groups, read: Read) -> Tensor:
    """Return p at every pair: numerator / denominator, or the numerator at its threshold."""
    if normalizer.where is not None:
        s = s.double()  # a threshold next to logits of 1e4 needs more than seven digits
        tau = _threshold(normalizer, s, rows, read)
        return _stable(normalizer.numerator, {"s": s, "tau": tau[rows.of]}, rows, read).plain()
    numerator = _stable(normalizer.numerator, {"s": s}, rows, read)
    if normalizer.denominator is None:
        return numerator.plain()
    total = _Scaled(rows.sum(numerator.value), numerator.exponent)
    return _divide(numerator, _stable(normalizer.denominator, {"s": s}, rows, read, total)).plain()


def log_denominator(
    normalizer: Normalizer, s: Tensor, scope: _Scope, pairs: Pairs, nothing: float
) -> Tensor:
    """Return the logarithm of every row's denominator, [b, heads, queries]; of zero, `nothing`."""
    assert normalizer.denominator is not None
    rows, size = scope.map.rows, scope.shape[:3]
    first = rows.first
    seen = (pairs.batch[first], pairs.head[first], pairs.query[first])
    batch, head, query = torch.ones(size, device=s.device).nonzero(as_tuple=True)
    every = Pairs(batch, head, query, torch.zeros_like(query))
    alone = Groups(torch.arange(len(every.key), device=s.device))

    def spread(x: Tensor) -> Tensor:
        """Lay a number of the rows that see something along all rows, 0 where nothing is seen."""
        one = x.expand(pairs.key.shape)[first]
        return x.new_zeros(size).index_put(seen, one).flatten()

    names = {**scope.names(every), "seen": spread(rows.sizes[rows.of].double())}
    numerator = _stable(
        normalizer.numerator,
        {"s": s},
        rows,
        lambda expr, more: scope.evaluate(
            expr, pairs, {**scope.names(pairs), "seen": rows.sizes[rows.of].double(), **more}
        ),
    )
    total = _Scaled(spread(rows.sum(numerator.value)), spread(numerator.exponent))
    below = _stable(
        normalizer.denominator,
        {},
        alone,
        lambda expr, more: scope.evaluate(expr, every, {**names, **more}),
        total,
    )
    empty = below.value == 0
    log = torch.where(empty, 1, below.value).log() + below.exponent
    return torch.where(empty, nothing, log).reshape(size).to(s)


class _Scaled(NamedTuple):
    """The number value · e**exponent, one a pair.

    The exponent is the same along a row and a constant to autograd. exp(x) is held as
    exp(x − M) · e**M, M the row's maximum of x over visible keys; a sum takes the larger of
    its terms' exponents; products add them. Nothing overflows that is finite in the end, and
    as no step is approximate, neither is the gradient. So exp(s) / (exp(z) + sum) becomes

        exp(s − M) e**(M − T) / (exp(0) e**(z − T) + Σ exp(s − M) e**(M − T)),  T = max(z, M)
    """

    value: Tensor
    exponent: Tensor

    def plain(self) -> Tensor:
        return self.value * self.exponent.exp()


def _stable(
    expr: Expr, names: Mapping[str, Value], rows: Groups, read: Read, total: _Scaled | None = None
) -> _Scaled:
    """Evaluate arithmetic over exponentials (and over `sum`) in scaled numbers."""

    def go(node: Expr) -> _Scaled:
        match node:
            case Name("sum") if total is not None:
                return total
            case Call("exp", (power,), ()):
                return _exponential(read(power, names), rows)
            case Unary("-", operand):
                x = go(operand)
                return _Scaled(-x.value, x.exponent)
            case Binary("+" | "-" | "*" | "/" as op, left, right):
                return _ARITHMETIC[op](go(left), go(right))
            case Binary("**", left, right):
                base, exponent = read(left, names), read(right, names)
                if isinstance(exponent, int | float):
                    return _power(go(left), exponent)
                if isinstance(base, int | float) and base > 0:
                    return _exponential(exponent * math.log(base), rows)
            case Call("sqrt", (operand,), ()):
                return _power(go(operand), 0.5)
            case Call("log", (operand,), ()):
                x = go(operand)
                return _plain(x.value.log() + x.exponent)
            case Call("max" | "min" as name, (left, right), ()):
                a, b, top = _aligned(go(left), go(right))
                return _Scaled(torch.maximum(a, b) if name == "max" else torch.minimum(a, b), top)
        return _plain(read(node, names))

    if total is not None:
        names = {**names, "sum": total.plain()}
    return go(expr)


def _plain(x: Value) -> _Scaled:
    value = x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    return _Scaled(value, torch.zeros_like(value))


def _exponential(exponent: Value, rows: Groups) -> _Scaled:
    power = _plain(exponent).value
    top = rows.max(power.detach())
    top = torch.where(top == -torch.inf, 0, top)  # a row of exp(−inf) is a row of zeros
    return _Scaled((power - top).exp(), top)


def _aligned(a: _Scaled, b: _Scaled) -> tuple[Tensor, Tensor, Tensor]:
    top = torch.maximum(a.exponent, b.exponent)
    return a.value * (a.exponent - top).exp(), b.value * (b.exponent - top).exp(), top


def _add(a: _Scaled, b: _Scaled) -> _Scaled:
    x, y, top = _aligned(a, b)
    return _Scaled(x + y, top)


def _subtract(a: _Scaled, b: _Scaled) -> _Scaled:
    return _add(a, _Scaled(-b.value, b.exponent))


def _multiply(a: _Scaled, b: _Scaled) -> _Scaled:
    return _Scaled(a.value * b.value, a.exponent + b.exponent)


def _divide(a: _Scaled, b: _Scaled) -> _Scaled:
    """0 / 0 is 0, with no gradient: a row without any weight gives none."""
    nothing = (a.value == 0) & (b.value == 0)
    value = torch.where(nothing, 0, a.value / torch.where(nothing, 1, b.value))
    return _Scaled(value, a.exponent - b.exponent)


def _power(a: _Scaled, power: float) -> _Scaled:
    """0 ** c has no gradient for 0 < c < 1, though the slope there is infinite."""
    if not 0 < power < 1:
        return _Scaled(a.value**power, a.exponent * power)
    zero = a.value == 0
    value = torch.where(zero, 0, torch.where(zero, 1, a.value) ** power)
    return _Scaled(value, a.exponent * power)


_ARITHMETIC: dict[str, Callable[[_Scaled, _Scaled], _Scaled]] = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
}


def _threshold(normalizer: Normalizer, s: Tensor, rows: Groups, read: Read) -> Tensor:
    """Return the tau of each row that makes `where left == right` true.

    Bisection on F(tau) = left − right, which has to be monotone, down to float64's precision.
    Newton steps, tau − F(tau) / F'(tau) with F' held constant, move it by nothing; the first
    gives it the gradient of the implicit function, −(∂F/∂s) / F', the next its derivative.
    """
    where = normalizer.where
    if not (isinstance(where, Compare) and where.ops == ("==",)):
        raise TypeError("`where` fixes the threshold by an equation, `where sum == 1`")
    left, right = where.operands

    def excess(tau: Tensor, s: Tensor) -> Tensor:
        names: dict[str, Value] = {"s": s, "tau": tau[rows.of]}
        names["sum"] = rows.sum(_stable(normalizer.numerator, names, rows, read).plain())
        return torch.as_tensor(read(left, names) - read(right, names))[rows.first]

    with torch.no_grad():
        high = s.new_ones(rows.count)
        low = -high
        for _ in range(1000):
            open_ = excess(low, s).sign() * excess(high, s).sign() > 0
            if not open_.any():
                break
            low, high = torch.where(open_, 2 * low, low), torch.where(open_, 2 * high, high)
        else:
            raise ValueError(f"no tau makes `where` true in {int(open_.sum())} rows")
        sign = excess(low, s).sign()
        for _ in range(200):
            tau = (low + high) / 2
            if (high - low <= torch.finfo(s.dtype).eps * tau.abs().clamp(min=1)).all():
                break
            before = excess(tau, s).sign() == sign
            low, high = torch.where(before, tau, low), torch.where(before, high, tau)
        tau = (low + high) / 2

    if not torch.is_grad_enabled():
        return tau
    at = tau.clone().requires_grad_()
    (slope,) = torch.autograd.grad(excess(at, s.detach()).sum(), at)
    slope = torch.where(slope == 0, 1, slope)
    for _ in range(2):
        tau = tau - excess(tau, s) / slope
    return tau
