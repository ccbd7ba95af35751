"""The README of an export: what it is, how to load it, how it is called."""

from __future__ import annotations

from collections.abc import Iterable

from ..compiler.model import Block, Model
from .request import Request


def readme(request: Request, *parts: str) -> str:
    """Return the text of a README: a title, some paragraphs, where the weights are from."""
    kind = "model" if isinstance(request.what, Model) else "block"
    head = f"# `{request.what.name}`\n\nThe {kind} `{request.what.name}`, exported by Headloom."
    weights = f"Weights: {request.weights}."
    return "\n\n".join([head, *parts, called(request.what), weights]) + "\n"


def fenced(kind: str, lines: Iterable[str]) -> str:
    """Return lines as a block of code."""
    return "\n".join([f"```{kind}", *lines, "```"])


def called(what: Block | Model) -> str:
    """Say what it takes and gives."""
    if isinstance(what, Model):
        takes = "tokens [b, n]" if what.vocab is not None else f"features [b, n, {what.taken}]"
    else:
        takes = f"features [b, n, {what.width}]"
    return f"It is called with {takes}."
