"""How an architecture is trained, as a spec says it; `trainer` does it.

train = adamw(lr = 1e-3, steps = 400)   →   Training(lr=0.001, steps=400)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..grammar.diagnostics import Diagnostic, LoomError, did_you_mean, error
from ..grammar.syntax import Call, Expr
from .calls import known_of, read


@dataclass(frozen=True, slots=True)
class Training:
    """The settings of `adamw(…)`; `warmup` in steps, `timeout` in seconds (0 for none)."""

    lr: float = 1e-3
    steps: int = 400
    batch: int = 64
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: str = "cosine"
    clip: float = 1.0
    seed: int = 0
    examples: int = 1024
    timeout: float = 0.0

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step: warm-up, then the schedule."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


def read_training(expr: Expr, seed: int = 0) -> Training:
    """Return the settings of a drawn `train`; `seed` holds where it says none.

    Raises `LoomError` (L529).
    """
    name = expr.function if isinstance(expr, Call) else getattr(expr, "id", "")
    if name != "adamw":
        raise error(
            "L529",
            f"there is no trainer `{name or 'like this'}`",
            expr.span,
            "",
            did_you_mean(name, ["adamw"], "write `adamw(lr = …, steps = …)`"),
        )
    training = Training(**{"seed": seed, **read(expr, known_of(Training), "L529")})
    wrong = [
        Diagnostic(
            "L529", f"`{name}` must be {what}", expr.span, f"{name} = {getattr(training, name)}"
        )
        for name, ok, what in (
            ("lr", training.lr > 0, "more than 0"),
            ("steps", training.steps >= 1, "1 or more"),
            ("batch", training.batch >= 1, "1 or more"),
            ("examples", training.examples >= 1, "1 or more"),
            ("weight_decay", training.weight_decay >= 0, "0 or more"),
            ("warmup", 0 <= training.warmup < training.steps, "0 or more, and less than `steps`"),
            ("clip", training.clip > 0, "more than 0"),
            ("seed", training.seed >= 0, "0 or more"),
            ("timeout", training.timeout >= 0, "0 (no limit) or a number of seconds"),
            ("schedule", training.schedule in ("cosine", "constant"), "`cosine` or `constant`"),
        )
        if not ok
    ]
    if wrong:
        raise LoomError(wrong)
    return training
