"""The tasks a search can train on, by the name a spec calls them.

task = mqar(vocab = 512, pairs = 8, length = 128)
"""

from __future__ import annotations

from collections.abc import Callable

from ...grammar.diagnostics import did_you_mean, error
from ...grammar.syntax import Call, Expr, Name
from ..calls import known_of, read
from .mqar import mqar
from .task import IGNORED, Split, Task

TASKS: dict[str, Callable[..., Task]] = {"mqar": mqar}

__all__ = ["IGNORED", "TASKS", "Split", "Task", "read_task"]


def read_task(expr: Expr, seed: int = 0) -> Task:
    """Return the task an expression names, seeded with `seed` where it says none itself.

    Raises `LoomError` (L524 unknown, L525 misfit).
    """
    name = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if not isinstance(expr, Call | Name) or name not in TASKS:
        have = ", ".join(f"`{each}`" for each in TASKS)
        raise error(
            "L524",
            f"there is no task `{name or 'like this'}`",
            expr.span,
            "",
            did_you_mean(name, TASKS, f"there is {have}"),
        )
    settings = read(expr, known_of(TASKS[name]), "L525")
    try:
        return TASKS[name](**{"seed": seed, **settings})
    except ValueError as problem:
        message, _, label = str(problem).partition("; ")
        raise error("L525", message, expr.span, label) from None
