"""The scalar functions of the language, each defined once: value, derivative, texts.

A row says how many arguments a function takes, its value on Python numbers, its partial
derivatives (written in Loom, over the arguments a, b, c), and how it is written in the two
dialects the compiler prints: PyTorch (tensors; `hard_step`, `elu` and `tanh` are of
`compiler.pieces`, since their operand must be written once) and Triton (register tiles).
Derivatives of None are zero almost everywhere. Two functions change the gradient and not the
slope: `detach` stops it, `step` lets it straight through.

    tanh:  d/da = 1 - tanh(a) ** 2      tanh(a)      2 * tl.sigmoid(2 * a) - 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    arity: int
    value: Callable[..., float | int | bool]
    partials: tuple[str | None, ...]
    torch: str
    triton: str
    boolean: bool = False


def _log(a: float) -> float:
    return math.log(a) if a else -math.inf


def _log2(a: float) -> float:
    return math.log2(a) if a else -math.inf


def _sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a)) if a >= 0 else math.exp(a) / (1 + math.exp(a))


def _softplus(a: float) -> float:
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


def _sign(a: float) -> int:
    return (a > 0) - (a < 0)


def _ispow2(a: float) -> bool:
    return a > 0 and int(a) == a and int(a) & (int(a) - 1) == 0


_R2 = "0.7071067811865476"  # 1 / √2
_RPI = "0.3989422804014327"  # 1 / √(2π)

FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("min", 2, min, ("where(a <= b, 1, 0)", "where(a <= b, 0, 1)"),
                 "torch.minimum({0}, {1})", "tl.minimum({0}, {1})"),
        Function("max", 2, max, ("where(a >= b, 1, 0)", "where(a >= b, 0, 1)"),
                 "torch.maximum({0}, {1})", "tl.maximum({0}, {1})"),
        Function("abs", 1, abs, ("where(a > 0, 1, where(a < 0, -1, 0))",),
                 "({0}).abs()", "tl.abs({0})"),
        Function("sign", 1, _sign, (None,), "torch.sign({0})",
                 "tl.where(({0}) > 0, 1.0, 0.0) - tl.where(({0}) < 0, 1.0, 0.0)"),
        Function("exp", 1, math.exp, ("exp(a)",), "torch.exp({0})", "tl.exp({0})"),
        Function("log", 1, _log, ("1 / a",), "torch.log({0})", "tl.log({0})"),
        Function("log2", 1, _log2, (f"{1 / math.log(2)!r} / a",),
                 "torch.log2({0})", "tl.log2({0})"),
        Function("sqrt", 1, math.sqrt, ("0.5 / sqrt(a)",), "torch.sqrt({0})", "tl.sqrt({0})"),
        Function("tanh", 1, math.tanh, ("1 - tanh(a) ** 2",),
                 "tanh({0})", "2 * tl.sigmoid(2 * ({0})) - 1"),
        Function("sigmoid", 1, _sigmoid, ("sigmoid(a) * (1 - sigmoid(a))",),
                 "torch.sigmoid({0})", "tl.sigmoid({0})"),
        Function("log_sigmoid", 1, lambda a: -_softplus(-a), ("sigmoid(-a)",),
                 "F.logsigmoid({0})",
                 "tl.minimum({0}, 0) - tl.log(1 + tl.exp(-tl.abs({0})))"),
        Function("relu", 1, lambda a: max(a, 0), ("where(a > 0, 1, 0)",),
                 "F.relu({0})", "tl.maximum({0}, 0)"),
        Function("gelu", 1, lambda a: a * 0.5 * (1 + math.erf(a * float(_R2))),
                 (f"0.5 * (1 + erf(a * {_R2})) + a * {_RPI} * exp(-0.5 * a * a)",),
                 "F.gelu({0})", f"({{0}}) * 0.5 * (1 + tl.erf(({{0}}) * {_R2}))"),
        Function("silu", 1, lambda a: a * _sigmoid(a),
                 ("sigmoid(a) * (1 + a * (1 - sigmoid(a)))",),
                 "F.silu({0})", "({0}) * tl.sigmoid({0})"),
        Function("softplus", 1, _softplus, ("sigmoid(a)",),
                 "-F.logsigmoid(-({0}))", "tl.maximum({0}, 0) + tl.log(1 + tl.exp(-tl.abs({0})))"),
        Function("elu", 1, lambda a: a if a > 0 else math.expm1(a), ("where(a > 0, 1, exp(a))",),
                 "elu({0})", "tl.where(({0}) > 0, {0}, tl.exp(tl.minimum({0}, 0)) - 1)"),
        Function("erf", 1, math.erf, (f"{2 / math.sqrt(math.pi)!r} * exp(-a * a)",),
                 "torch.erf({0})", "tl.erf({0})"),
        Function("sin", 1, math.sin, ("cos(a)",), "torch.sin({0})", "tl.sin({0})"),
        Function("cos", 1, math.cos, ("-sin(a)",), "torch.cos({0})", "tl.cos({0})"),
        Function("floor", 1, math.floor, (None,), "torch.floor({0})", "tl.floor({0})"),
        Function("clip", 3, lambda a, b, c: min(max(a, b), c),
                 ("where(b <= a <= c, 1, 0)", "where(a < b, 1, 0)", "where(a > c, 1, 0)"),
                 "torch.clamp({0}, {1}, {2})", "tl.minimum(tl.maximum({0}, {1}), {2})"),
        Function("where", 3, lambda a, b, c: b if a else c,
                 (None, "where(a, 1, 0)", "where(a, 0, 1)"),
                 "torch.where({0}, {1}, {2})", "tl.where({0}, {1}, {2})"),
        Function("detach", 1, lambda a: a, (None,), "({0}).detach()", "({0})"),
        Function("step", 1, lambda a: 1 if a > 0 else 0, ("1",),
                 "hard_step({0})", "tl.where(({0}) > 0, 1.0, 0.0)"),
        Function("ispow2", 1, _ispow2, (None,),
                 "(({0}) > 0) & ((({0}) & (({0}) - 1)) == 0)",
                 "(({0}) > 0) & ((({0}) & (({0}) - 1)) == 0)", boolean=True),
    )
}  # fmt: skip

# Functions over whole vectors and matrices: name → number of arguments.
VECTOR_FUNCTIONS = {"sum": 1, "mean": 1, "norm": 1, "outer": 2, "dot": 2}

# Functions of vectors and matrices that only mixers have: name → number of arguments.
MIXER_FUNCTIONS = {"diag": 1, "solve": 2, "softmax": 1}

# Functions that look at other pairs than their own, in scores and weights: over the visible keys
# of a query, the queries that see a key (all of them, or those up to its own), the heads, the
# neighbours; and a coin for each pair.
MAP_FUNCTIONS = {
    "sum_keys": 1, "mean_keys": 1, "max_keys": 1, "rank_keys": 1,
    "sum_queries": 1, "mean_queries": 1, "max_queries": 1,
    "running_keys": 1, "running_queries": 1,
    "sum_group": 2, "max_group": 2,
    "mix_heads": 2, "convolve": 2, "coin": 1,
}  # fmt: skip

# Those over keys that stand together; the second argument says where.
GROUPED = ("sum_group", "max_group")

# Numbers of every row or column of a map, in pipelines: name → number of arguments.
STATISTICS = {"lse": 1, "entropy": 1, "rows": 2, "columns": 2}

# Calls that leave something open: a description with any of them is a space to search.
RANGES = ("integer", "pow2", "uniform", "loguniform")
HOLES = ("choose", *RANGES, "maybe", "any")
