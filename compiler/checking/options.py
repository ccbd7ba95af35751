"""What was written for the arguments of a stage, read as numbers, flags, words and calls.

    rope(theta = 1e6, scaling = yarn(4, 2048))

`scaling` takes a number or one of some calls, which have arguments of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...grammar import syntax
from ...grammar.diagnostics import LoomError, did_you_mean, error
from ...grammar.expr import Value
from ...grammar.source import Span
from ...grammar.syntax import Call, Expr, Name
from ...ops import Chosen, Option
from .library import bind
from .scope import Scope


def bound(name: str, options: Iterable[Option], call: Expr) -> dict[str, Expr]:
    """Match a call with options; what was left out, or is not required, may be `none` (L209)."""
    params = tuple(
        syntax.Parameter(each.name, None if each.required else Name("none")) for each in options
    )
    return bind(name, params, call, call.span)


def option_value(
    scope: Scope, owner: str, option: Option, expr: Expr, places: dict[str, Span], at: str = ""
) -> Any:
    """Return the value of an option of `owner`; where it was written goes into `places`.

    Raises L203 (a size), L219 (a number) and L222 (all else that does not fit).
    """
    what, kind = f"`{option.name}` of `{owner}`", option.kind
    at = f"{at}{option.name}"
    places[at] = expr.span
    if isinstance(kind, Mapping):
        return _chosen(scope, what, kind, expr, places, at)
    if isinstance(kind, tuple):
        return _word(what, kind, expr)
    match kind:
        case "size":
            return scope.size(expr, what)
        case "number":
            return scope.number(expr, what)
        case "positive":
            return _positive(scope, what, expr)
        case "positives":
            if not isinstance(expr, syntax.ListOf):
                raise error(
                    "L222", f"{what} is a list of numbers", expr.span, "", "write `[1, 1.5, …]`"
                )
            return tuple(_positive(scope, f"an item of {what}", each) for each in expr.items)
        case "flag":
            if expr not in (Name("true"), Name("false")):
                raise error("L222", f"{what} is true or false", expr.span)
            return expr == Name("true")
    raise ValueError(f"`{kind}` is no kind of option")


def _positive(scope: Scope, what: str, expr: Expr) -> Value:
    value = scope.number(expr, what)
    if value <= 0:
        raise error("L219", f"{what} must be positive", expr.span, f"it is {value}")
    return value


def _word(what: str, words: tuple[str, ...], expr: Expr) -> Any:
    word = expr.id if isinstance(expr, Name) else getattr(expr, "value", None)
    if word not in words:
        raise error(
            "L222",
            f"{what} is one of {', '.join(f'`{each}`' for each in words)}",
            expr.span,
            "",
            did_you_mean(str(word), words),
        )
    return word


def _chosen(
    scope: Scope,
    what: str,
    calls: Mapping[str, tuple[Option, ...]],
    expr: Expr,
    places: dict[str, Span],
    at: str,
) -> Any:
    """Return a number, or the call that stands in its place (L222)."""
    name = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if name not in calls:
        try:
            return scope.number(expr, what)
        except LoomError:
            forms = ", ".join(f"`{each}(…)`" for each in calls)
            raise error(
                "L222",
                f"{what} is a number or one of {forms}",
                expr.span,
                "",
                did_you_mean(name, calls),
            ) from None
    values = bound(name, calls[name], expr)
    return Chosen(
        name,
        tuple(
            (each.name, _argument(scope, name, each, values[each.name], places, f"{at}."))
            for each in calls[name]
        ),
    )


def _argument(
    scope: Scope, owner: str, option: Option, expr: Expr, places: dict[str, Span], at: str
) -> Any:
    if expr == Name("none") and not option.required:
        return option.default
    return option_value(scope, owner, option, expr, places, at)
