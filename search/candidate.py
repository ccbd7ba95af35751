"""From a drawn file to something that can be trained: the one place that knows the compiler.

model   = elaborate(draw(file, chooser), "probe")
key     = fingerprint(model, training)     the same for what means the same
network = build(model, seed=0)
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from ..compiler.checking.check import check
from ..compiler.model import Block, Model, Normalizer, Recurrence
from ..grammar import syntax
from ..grammar.expr import fold
from .objectives import Costs

if TYPE_CHECKING:
    from torch import nn

_NAMED_FOR_PEOPLE = (Block, Model, Normalizer, Recurrence)


def elaborate(file: syntax.File, name: str) -> Model:
    """Return the checked model of a plain file. Raises `LoomError`."""
    return check(file).models[name]


def costs(model: Model) -> Costs:
    from ..compiler.facts.cost import cost  # here, so that checking a search does not load it

    return cost(model)


def build(model: Model, seed: int) -> nn.Module:
    """Return a network with seeded weights, from tokens [b, n] to logits [b, n, vocab].

    It stands on a GPU where there is one.
    """
    import torch

    from ..compiler.api import build_module, target

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return build_module(model, target(device=device), device=device, seed=seed)


def emit(model: Model) -> str:
    """Return the standalone Python text of a model's module, for any machine."""
    from ..compiler.api import target
    from ..compiler.pipeline import generate

    return generate(model, target("torch")).text


def fingerprint(model: Model, *settings: object) -> str:
    """Return a hash of what a model computes and how it is trained.

    Names that only people read, spans and the order of writing do not count, and scalar
    expressions count as folded: `window(2 * 8)` is `window(16)`.
    """
    text = repr((_plain(model), *(repr(each) for each in settings)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, syntax.Expr):
        return repr(fold(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        skip = {"name"} if isinstance(value, _NAMED_FOR_PEOPLE) else set()
        return (
            type(value).__name__,
            *(
                _plain(getattr(value, each.name))
                for each in dataclasses.fields(value)
                if each.compare and each.name not in skip
            ),
        )
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
