"""A mask at points: over numpy arrays of queries, keys and heads, plainly and exactly.

visible(causal, 0..2, 0..2)     █··
                                ██·
                                ███
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...grammar.domain import Domain, interpret
from ...grammar.functions import FUNCTIONS
from ...grammar.syntax import Expr, Index, Name, walk
from ...ops.shape import axis_size, pooling
from ..model import Mixing, Pairwise

Array = NDArray[Any]


def numbers(expr: Expr, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression over arrays; what `doc[i]` is stands under that name."""

    def named(leaf: Expr) -> Any:
        match leaf:
            case Name(id):
                return values[id]
            case Index(Name(id), (Name(at),)):
                return values[f"{id}[{at}]"]
        raise TypeError(f"{type(leaf).__name__} has no numbers")

    return interpret(expr, Domain(lambda each: each, named, _applied))


def visible(
    mask: Expr,
    i: Array,
    j: Array,
    n: int,
    m: int,
    heads: int = 1,
    documents: ArrayLike | None = None,
) -> Array:
    """Return bool [rows, heads, queries, keys] for queries at i [queries] and keys at j [keys].

    `documents` are segment ids, [rows, tokens]; without them there is one row.
    """
    at = {"i": i[:, None], "j": j, "h": np.arange(heads)[:, None, None], "n": n, "m": m}
    rows = 1
    if documents is not None:
        ids = np.asarray(documents)
        at["doc[i]"] = ids[:, None, i, None]
        if j.max(initial=-1) < ids.shape[1]:  # tokens of a context have no segments
            at["doc[j]"] = ids[:, None, None, j]
        rows = len(ids)
    with np.errstate(all="ignore"):  # a root of a distance that is negative sees nothing
        seen = np.asarray(numbers(mask, at))
    return np.broadcast_to(seen.astype(bool), (rows, heads, len(i), len(j)))


def visible_pairs(
    mixing: Mixing, n: int, m: int, documents: ArrayLike | None = None
) -> Array | None:
    """Return bool [rows, queries, keys]: does any head see the key; None if streams decide."""
    assert isinstance(mixing.mix, Pairwise)
    mask = mixing.mix.mask
    if any(isinstance(node, Index) and node.base != Name("doc") for node in walk(mask)):
        return None
    sizes = {"n": n, "m": m}
    axes = (mixing.queries, mixing.keys)
    i, j = (np.arange(axis_size(axis, sizes.get(pooling(axis)[0], 0))) for axis in axes)
    seen = visible(mask, i, j, len(i), len(j), mixing.heads, documents)
    return np.asarray(seen.any(1))


def _applied(op: str, values: tuple[Any, ...], _: Expr) -> Any:
    if op not in _OPERATIONS:
        return np.vectorize(FUNCTIONS[op].value)(*values)
    return _OPERATIONS[op](*values)


def _is_power(value: Any) -> Any:
    whole = np.asarray(value)
    return (whole > 0) & ((whole & (whole - 1)) == 0)


_OPERATIONS: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.true_divide, "//": np.floor_divide,
    "%": np.mod, "**": np.power, "negative": np.negative, "and": np.logical_and,
    "or": np.logical_or, "not": np.logical_not, "<": np.less, "<=": np.less_equal,
    ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal, "abs": np.abs,
    "min": np.minimum, "max": np.maximum, "floor": np.floor, "exp": np.exp, "log": np.log,
    "log2": np.log2, "sqrt": np.sqrt, "where": np.where, "ispow2": _is_power,
}  # fmt: skip
