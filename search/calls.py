"""Reading `name(a, k = v)` as settings with known names and types.

    adamw(lr = 1e-3, steps = 400)   →   Training(lr=0.001, steps=400)

The defaults of a Python signature say what a call knows; so a task or a trainer is declared
once, as a function or a dataclass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..grammar.diagnostics import Diagnostic, LoomError, did_you_mean
from ..grammar.expr import NotConstant, evaluate
from ..grammar.show import show
from ..grammar.source import Span
from ..grammar.syntax import Call, Expr, Name, String

REQUIRED = inspect.Parameter.empty
Known = Mapping[str, Any]  # name → default, or the type of a setting that has none


def known_of(function: Callable[..., Any], leave: Iterable[str] = ()) -> Known:
    """Return the settings of a Python callable whose parameters all have defaults."""
    parameters = inspect.signature(function).parameters.items()
    return {name: each.default for name, each in parameters if name not in set(leave)}


def read(expr: Expr, known: Known, code: str) -> dict[str, Any]:
    """Return the settings a call gives. Raises `LoomError` with every misfit, under `code`."""
    call = expr if isinstance(expr, Call) else Call(getattr(expr, "id", ""), span=expr.span)
    found: list[Diagnostic] = []
    names = list(known)
    if len(call.args) > len(names):
        label = f"{len(call.args)} given, {len(names)} known"
        found.append(
            Diagnostic(code, f"`{call.function}` has too many arguments", call.span, label)
        )
    given = dict(zip(names, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.name not in known:
            have = ", ".join(f"`{name}`" for name in names) or "none"
            message = f"`{call.function}` has no setting `{keyword.name}`"
            help = did_you_mean(keyword.name, names, f"it knows {have}")
            found.append(Diagnostic(code, message, keyword.span, "", help))
        elif keyword.name in given:
            found.append(Diagnostic(code, f"`{keyword.name}` is given twice", keyword.span))
        else:
            given[keyword.name] = keyword.value
    for name, default in known.items():
        if isinstance(default, type) and name not in given:
            found.append(
                Diagnostic(
                    code,
                    f"`{call.function}` needs `{name}`",
                    call.span,
                    "",
                    f"write `{call.function}({name} = …)`",
                )
            )
    values: dict[str, Any] = {}
    for name, value in given.items():
        try:
            kind = known[name]
            values[name] = convert(
                value, kind if isinstance(kind, type) else type(kind), name, code
            )
        except LoomError as problem:
            found.extend(problem.diagnostics)
    if found:
        raise LoomError(found)
    return values


def convert(expr: Expr, kind: type, name: str, code: str) -> Any:
    """Return an expression's value as an int, float, bool or word. Raises `LoomError`."""
    if kind is str and isinstance(expr, Name | String):
        return expr.id if isinstance(expr, Name) else expr.value
    try:
        value = evaluate(expr, {})
    except NotConstant as problem:
        raise _misfit(name, kind, expr.span, code, problem.reason) from None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        return float(value)
    if kind is int and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    raise _misfit(name, kind, expr.span, code, show(expr))


_KINDS = {int: "a whole number", float: "a number", bool: "`true` or `false`", str: "a word"}


def _misfit(name: str, kind: type, span: Span, code: str, label: str) -> LoomError:
    return LoomError([Diagnostic(code, f"`{name}` must be {_KINDS[kind]}", span, label)])
