"""What depends on i - j alone, made once of every distance and not of every pair.

    score = alibi; mask = causal       line[d] = -slope * |d|, minus infinity where d < 0

Each tile adds a view of the line, whose rows are one distance apart, to its products.
"""

from __future__ import annotations

from dataclasses import replace

from ...grammar.expr import TRUE
from ...grammar.syntax import Number
from ..plan.attention import Attention
from ..text.text import indent
from .weights import Writer, method_name, signature


def obstacle(attention: Attention) -> str | None:
    """Return why a tile cannot be given a view of one line."""
    found = attention.distance
    return found if isinstance(found, str) else None


def method(attention: Attention) -> list[str]:
    """Return the method that gives the line [heads or 1, d] of distances i - j [d]."""
    found = attention.distance
    assert not isinstance(found, str)
    added, mask = found.added, found.mask
    writer = Writer(attention)
    pairs = replace(writer.pairs, local=False)
    text = "torch.zeros_like(i, dtype=wide)"
    writer.lines.append(f"line = {text if added == Number(0) else pairs.value(added).text}")
    if mask != TRUE:
        visible = replace(pairs, wide=".double()").value(mask).text
        writer.lines.append(f"line = line.masked_fill(~({visible}), -torch.inf)")
    writer.lines.append("return line.to(wide)")
    head = signature(f"{method_name(attention)}_line", ["q", "i", "j"], "Tensor")
    return [*head, *indent(writer.sized())]
