"""Tokens that are taken out of their sequences: what runs on them alone, and how many they are.

x | norm | take(score > 0.5) | attn | put      `attn` meets the tokens that score more, in order,
                                               each where it stood; the others get 0
x | take(t) | norm | attn | norm | put         the three stages are one part, `taken`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...grammar.diagnostics import LoomError, error
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, Name
from ...ops import Shape
from ..model import Apply, Block, Flow, Read, Taken


def between(stages: Sequence[Expr]) -> tuple[int, int] | None:
    """Return where the first `take` of a pipeline stands, and its `put` (L243); None without."""
    named = [getattr(each, "function", getattr(each, "id", "")) for each in stages]
    for at, name in enumerate(named):
        if name == "put" or (name == "take" and "put" not in named[at:]):
            raise unpaired(stages[at])
        if name == "take":
            last = named.index("put", at)
            if last == at + 1 or "take" in named[at + 1 : last]:
                raise unpaired(stages[at])
            return at, last
    return None


def unpaired(stage: Expr) -> LoomError:
    """Return the error of a `take` without its `put`, or the other way round."""
    help = "write both in one pipeline, with stages between them: `x | take(s > 0.5) | attn | put`"
    return error("L243", "`take` and `put` go together", stage.span, "", help)


def expect_taken(part: Block, given: Shape, chosen: Shape, span: Span) -> None:
    """Raise L243 where a part cannot run on some tokens of what it is given alone."""
    if chosen != Shape("n", 1):
        label = f"it is {chosen}, needed is {Shape('n', 1)}"
        raise error("L243", "a number for each token says which are taken", span, label)
    why = ""
    if given != Shape("n", given.dim) or part.out.shape != Shape("n", part.out.shape.dim):
        why = f"it maps {given} to {part.out.shape}"
    elif part.below:
        why = "it reads layers below, at all tokens"
    elif "earlier" in part.reads:
        why = "it reads `earlier`, at all tokens"
    if why:
        help = "a part between `take` and `put` maps features of tokens, and reads no other layer"
        raise error("L243", f"`{part.name}` cannot run on some tokens alone", span, why, help)


def expect_read(layers: Sequence[Block]) -> None:
    """Raise L243 where a part runs on some tokens alone in a model whose layers read others."""
    for layer in layers:
        part = next((each for each in layer.parts if each.taken is not None), None)
        if part is not None and layer.shared is not None:
            why = "layers of this model read others, at all tokens"
            help = "leave out `at`, `previous` and `first`, or `take`"
            raise error("L243", f"`{part.what.name}` runs on some tokens", part.span, why, help)


def most_taken(flow: Flow, streams: Mapping[str, Flow]) -> Taken:
    """Return how many tokens a choice takes at most, as far as its text says it."""
    match flow:
        case Read(name) if name in streams:
            return most_taken(streams[name], streams)
        case Apply("largest_tokens", _, options):
            given: dict[str, Any] = dict(options)
            return Taken(given["count"], given["share"])
        case Apply("pointwise", inputs, options):
            given = dict(options)
            found = [most_taken(inputs[at], streams) for at in _factors(given["expr"])]
            return next((each for each in found if each != Taken()), Taken())
    return Taken()


def _factors(expr: Expr) -> list[int]:
    """Return which inputs an expression is a product of, among others."""
    match expr:
        case Name(id) if id[1:].isdigit():
            return [int(id[1:])]
        case Binary("*", left, right):
            return [*_factors(left), *_factors(right)]
        case Call("sqrt" | "abs" | "relu", (inner,)):
            return _factors(inner)
    return []
