"""What a lowering of attentions is: when it fits, why it is taken, and its text.

Each is the constant `WAY` of a module of its own; `choose.WAYS` is the list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..plan.attention import Attention


class Call(NamedTuple):
    """What a forward pass has at hand where it attends: the texts of variables."""

    target: str
    q: str
    k: str
    v: str
    operand: Callable[[str], str]  # of any input of the node, by its name
    function: str  # the kernel's, "" where there is none
    asked: Mapping[str, str]  # variables of what is asked of the map, by kind
    general: Mapping[str, str]  # what the general text is given, by the names it has for it


@dataclass(frozen=True)
class Way:
    """A lowering: `obstacle` says why it does not fit, `slow` why only who asks for it has it.

    `invoke` writes a call of it, into calls of which `needs` hold, () for all of them, None where
    it is the general text that carries it; `methods` writes what `invoke` calls on the module.
    """

    name: str
    obstacle: Callable[[Attention], str | None]
    reason: Callable[[Attention], str]
    slow: Callable[[Attention], str | None] = lambda _: None
    needs: Callable[[Attention], tuple[str, ...] | None] = lambda _: None
    invoke: Callable[[Attention, Call], list[str]] = lambda _, __: []
    methods: Callable[[Attention], list[str]] = lambda _: []
