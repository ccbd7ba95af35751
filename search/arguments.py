"""What a definition is called with where a hole of its kind becomes it.

    mask window(w) = …                  window(pow2(1..64))
    layer pre(attn, ffn) { … }          pre(any(block), any(ffn))

A parameter with a default keeps it: to say what is drawn for one, make a hole its default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from ..compiler.checking.library import parsed
from ..grammar import syntax
from ..grammar.syntax import Call, Expr, Name, Pipe

# by the definition and the parameter, or by how the text uses it
GIVEN: Mapping[tuple[str, str], str] = {
    ("softcap", "c"): "pow2(1..64)",
    ("entmax", "a"): "uniform(1.1..2)",
}
USED: Mapping[str, str] = {
    "mask": "pow2(1..64)",
    "size": "pow2(2..16)",
    "number": "uniform(0.5..2)",
    "activation": "any(activation)",
    "ffn": "any(ffn)",
    "stage": "choose(silu, tanh, relu)",
    "block": "any(block)",
}


def called(item: syntax.Block | syntax.Definition) -> Expr:
    """Return the name of an item, called where parameters of it have no default."""
    args = tuple(_given(item.name, each.name, _use(item, each.name)) for each in _needed(item))
    if not args:
        return Name(item.name)
    return Call(item.name, args)


def _needed(item: syntax.Block | syntax.Definition) -> list[syntax.Parameter]:
    return [each for each in item.params if each.default is None]


def _use(item: syntax.Block | syntax.Definition, name: str) -> str:
    """Say what a parameter is for, by where the text reads it."""
    if any(Name(name) in node.stages for node in _pipes(item)):
        if item.kind == "layer":
            return "ffn" if name == "ffn" else "block"
        return "activation" if item.kind == "ffn" else "stage"
    for owner, expr in syntax.expressions(item):
        if Name(name) not in list(syntax.walk(expr)):
            continue
        match owner:
            case syntax.Param(_, dims) | syntax.State(_, dims) if expr in dims:
                return "size"
            case syntax.Setting("heads" | "kv_heads" | "value_heads" | "head_dim" | "value_dim"):
                return "size"
            case syntax.Setting("mask"):
                return "mask"
    return "mask" if item.kind == "mask" else "number"


def _pipes(item: syntax.Block | syntax.Definition) -> Iterator[Pipe]:
    for _, expr in syntax.expressions(item):
        yield from (node for node in syntax.walk(expr) if isinstance(node, Pipe))


def _given(owner: str, name: str, use: str) -> Expr:
    return _texts()[f"{owner}.{name}" if (owner, name) in GIVEN else use]


@cache
def _texts() -> dict[str, Expr]:
    named = {f"{owner}.{name}": text for (owner, name), text in GIVEN.items()}
    return parsed("arguments", {**named, **USED})
