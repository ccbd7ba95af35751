"""Texts with holes: a hole is filled with what a configuration says.

    {{hidden_size}}                   a field, as Loom writes its value
    {{attention_bias? (bias = true)}} what stands after `?` where the field says something
    {{norm_topk_prob! , w = score}}   what stands after `!` where it does not
    {{rope(style = interleaved)}}     what a reader of several fields makes of them

What stands after `?` and `!` may have holes again.
"""

from __future__ import annotations

import re

from .config import Config
from .readers import READERS
from .words import value

_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
_CHOICE = re.compile(r"([\w.]+)([?!])(?: |$)(.*)", re.DOTALL)


def fill(text: str, config: Config) -> str:
    """Return a text whose holes are filled. Raises `LoomError` for what cannot be said."""
    done, rest = [], text
    while (start := rest.find("{{")) >= 0:
        end = _closing(rest, start)
        done += [rest[:start], _filled(rest[start + 2 : end], config)]
        rest = rest[end + 2 :]
    return "".join([*done, rest])


def _closing(text: str, start: int) -> int:
    """Return where the hole that begins at `start` ends."""
    depth, at = 0, start
    while True:
        if text.startswith("{{", at):
            depth, at = depth + 1, at + 2
        elif text.startswith("}}", at):
            depth -= 1
            if depth == 0:
                return at
            at += 2
        else:
            at += 1


def _filled(hole: str, config: Config) -> str:
    if found := _CHOICE.fullmatch(hole):
        name, mark, text = found.groups()
        return fill(text, config) if bool(config.get(name)) == (mark == "?") else ""
    if found := _CALL.fullmatch(hole):
        name, given = found.groups()
        return READERS[name](config, **arguments(given))
    return value(config.get(hole))


def arguments(text: str) -> dict[str, str]:
    """Read `a = b, c = d`."""
    pairs = (each.partition("=") for each in text.split(",") if each.strip())
    return {name.strip(): said.strip() for name, _, said in pairs}
