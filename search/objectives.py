"""What a search wants: measured on the task, or known from the architecture before training.

    maximize = accuracy                             measured
    minimize = [cache_bytes(tokens = 4096), params] static
    require  = params < 2M and flops(tokens = 4096) <= 1G

`require` reads static ones only, so it is decided before a weight exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..grammar import syntax
from ..grammar.diagnostics import did_you_mean, error
from ..grammar.expr import NotConstant, evaluate, number, rebuild
from ..grammar.show import show
from ..grammar.syntax import Binary, Call, Compare, Expr, Name, Number
from .calls import read


class Costs(Protocol):
    """What `compiler.facts.cost` says of a model."""

    @property
    def params(self) -> int: ...

    def flops(self, tokens: int) -> int: ...

    def cache_bytes(self, tokens: int) -> int: ...

    def activation_bytes(self, tokens: int) -> int: ...


METRICS = ("accuracy",)
STATIC: dict[str, dict[str, type]] = {
    "params": {},
    "flops": {"tokens": int},
    "cache_bytes": {"tokens": int},
    "activation_bytes": {"tokens": int},
}


@dataclass(frozen=True, slots=True)
class Objective:
    """One number a trial ends with; `label` is how the spec writes it."""

    name: str
    label: str
    maximize: bool
    tokens: int = 0

    @property
    def measured(self) -> bool:
        """Whether it takes training to know it."""
        return self.name in METRICS

    def of(self, costs: Costs, metrics: dict[str, float]) -> float:
        return metrics[self.name] if self.measured else static(self.name, self.tokens, costs)


def static(name: str, tokens: int, costs: Costs) -> float:
    """Return a static quantity of a model."""
    match name:
        case "params":
            return costs.params
        case "flops":
            return costs.flops(tokens)
        case "cache_bytes":
            return costs.cache_bytes(tokens)
        case _:
            return costs.activation_bytes(tokens)


def read_objectives(expr: Expr, maximize: bool) -> tuple[Objective, ...]:
    """Return the objectives of `maximize = …` or `minimize = …`, one or a list of them.

    Raises `LoomError` (L526 unknown, L527 wrong arguments).
    """
    items = expr.items if isinstance(expr, syntax.ListOf) else (expr,)
    return tuple(_objective(each, maximize) for each in items)


def _objective(expr: Expr, maximize: bool) -> Objective:
    name = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if name in METRICS:
        read(expr, {}, "L527")
        return Objective(name, show(expr), maximize)
    return Objective(name, show(expr), maximize, _tokens(name, expr, (*METRICS, *STATIC)))


def _tokens(name: str, expr: Expr, known: tuple[str, ...]) -> int:
    if name not in STATIC:
        have = ", ".join(f"`{each}`" for each in known)
        raise error(
            "L526",
            f"there is no objective `{name or show(expr)}`",
            expr.span,
            "",
            did_you_mean(name, known, f"there are {have}"),
        )
    tokens: int = read(expr, STATIC[name], "L527").get("tokens", 0)
    if tokens < 0 or (not tokens and STATIC[name]):
        raise error("L527", "`tokens` must be 1 or more", expr.span, f"tokens = {tokens}")
    return tokens


# ── require ──────────────────────────────────────────────────────────────────────────────


class _Ones:
    """Stands for a model when only the form of a requirement is in question."""

    params = 1

    def flops(self, tokens: int) -> int:  # noqa: ARG002
        return 1

    cache_bytes = activation_bytes = flops


def read_requirement(expr: Expr) -> Expr:
    """Return the expression if it reads static quantities only. Raises `LoomError` (L528)."""
    for node in syntax.walk(expr):
        name = node.id if isinstance(node, Name) else getattr(node, "function", "")
        if name in METRICS:
            raise error(
                "L528",
                f"`require` cannot read `{name}`",
                node.span,
                "only training tells it",
                "make it an objective",
            )
        if isinstance(node, Name) and name not in (*STATIC, "true", "false"):
            raise error(
                "L528",
                f"`require` cannot read `{name}`",
                node.span,
                "",
                did_you_mean(name, STATIC, f"it reads {', '.join(STATIC)}"),
            )
    try:
        value = evaluate(_measured(expr, _Ones()), {})
    except NotConstant as problem:
        raise error("L528", "`require` has no value", expr.span, problem.reason) from None
    if not isinstance(value, bool):
        raise error(
            "L528",
            "`require` must be true or false",
            expr.span,
            "this is a number",
            "compare it: `params < 2M`",
        )
    return expr


def _measured(expr: Expr, costs: Costs) -> Expr:
    """Put numbers in place of `params`, `flops(tokens = …)` and the others."""
    if isinstance(expr, Name) and expr.id in STATIC and not STATIC[expr.id]:
        return number(static(expr.id, 0, costs), expr)
    if isinstance(expr, Call) and expr.function in STATIC:
        return number(
            static(expr.function, _tokens(expr.function, expr, tuple(STATIC)), costs), expr
        )
    return rebuild(expr, lambda each: _measured(each, costs))


@dataclass(frozen=True, slots=True)
class Violation:
    """Why a draw is refused; `by` grows with the distance from what is required."""

    reason: str
    by: float


def violation(requirement: Expr, costs: Costs) -> Violation | None:
    """Return what an architecture breaks of a requirement, None where it keeps all of it."""
    parts = _parts(requirement)
    broken = [each for each in parts if not evaluate(_measured(each, costs), {})]
    if not broken:
        return None
    reasons = [f"{show(each)} does not hold: {_values(each, costs)}" for each in broken]
    return Violation("; ".join(reasons), sum(_excess(each, costs) for each in broken))


def _parts(expr: Expr) -> list[Expr]:
    if isinstance(expr, Binary) and expr.op == "and":
        return [*_parts(expr.left), *_parts(expr.right)]
    return [expr]


def _values(expr: Expr, costs: Costs) -> str:
    found: dict[str, str] = {}
    for node in syntax.walk(expr):
        name = node.id if isinstance(node, Name) else getattr(node, "function", "")
        if name in STATIC:
            value = evaluate(_measured(node, costs), {})
            found[show(node)] = f"{value:,}"
    return ", ".join(f"{text} = {value}" for text, value in found.items())


def _excess(expr: Expr, costs: Costs) -> float:
    """How far a comparison is from holding, relative to its bound; 1 for other forms."""
    match _measured(expr, costs):
        case Compare((left, right), (op,)) if op in ("<", "<=", ">", ">="):
            a, b = float(evaluate(left, {})), float(evaluate(right, {}))
            low, high = (a, b) if op in (">", ">=") else (b, a)
            return (high - low) / max(abs(low), 1.0) + 1e-6
        case Number() | _:
            return 1.0
