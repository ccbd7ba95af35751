"""A figure of a model or a layer as boxes and arrows, in Mermaid's words.

flowchart TD
  x([x]) --> attn_norm[attn_norm] --> attn[[attn: local]] --> y
  x --> y(("x + attn"))

Pages on GitHub and notebooks draw such text in a block marked `mermaid`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ...grammar.expr import substitute
from ...grammar.show import show
from ...grammar.syntax import Name
from ..model import Apply, Block, Flow, Mixing, Model, Part, Read, Statistic
from .show import layer_name


def figure(what: Block | Model) -> str:
    """Return the figure of a model, a layer or a block."""
    if isinstance(what, Block):
        return "\n".join(["flowchart TD", *_indented(_Drawing("").of(what))])
    given = "tokens" if what.vocab is not None else "images" if what.patches else "features"
    lines = [f'{given}(["{given}"]) --> embed["embed: {_end(what.embed)}"]']
    above = "embed"
    drawn: set[Block] = set()
    for at, (layer, same) in enumerate(groupby(what.run)):
        times = len(list(same))
        title = f"{layer_name(layer)}{f', {times} times' if times > 1 else ''}"
        if layer in drawn:
            lines.append(f'{above} --> again{at}["{title}, as above"]')
            above = f"again{at}"
            continue
        drawn.add(layer)
        inside = _Drawing(f"l{at}_")
        lines += [f'subgraph layer{at} ["{title}"]', *_indented(inside.of(layer)), "end"]
        lines.append(f"{above} --> {inside.entry}")
        above = inside.exit
    lines.append(f'{above} --> head["head: {_end(what.head)}"]')
    return "\n".join(["flowchart TD", *_indented(lines)])


def _end(block: Block) -> str:
    """Return what one of a model's ends does, stage after stage."""
    return " | ".join(_steps(block.out)) or "x"


def _steps(flow: Flow) -> Iterator[str]:
    if isinstance(flow, Apply | Part):
        yield from _steps(flow.inputs[0])
        yield _label(flow, [_short(each) for each in flow.inputs])


def _label(flow: Apply | Part, read: list[str]) -> str:
    if isinstance(flow, Part):
        own = flow.what.name
        if flow.what.experts is not None:
            own = f"{flow.what.experts.count} × {own}, by {read[1]}"
        if flow.taken is not None:
            own = f"{own}, of tokens by {read[1]}"
        return own if flow.module == own else f"{flow.module}: {own}"
    options: dict[str, Any] = dict(flow.options)
    if flow.op == "pointwise":
        named = {f"a{at}": Name(each) for at, each in enumerate(read)}
        return show(substitute(options["expr"], named))
    return flow.module or flow.op


def _short(flow: Flow) -> str:
    """Return what a flow is called in a formula that reads it."""
    match flow:
        case Read(name):
            return name
        case Apply() | Part():
            return flow.module or _unnamed(flow)
    return "o"


def _unnamed(flow: Apply | Part) -> str:
    """Return what stands for a step that has no name."""
    op = flow.op if isinstance(flow, Apply) else flow.what.name
    if op == "dropout":
        return _short(flow.inputs[0])
    return "…" if op == "pointwise" else op


class _Drawing:
    """The boxes and arrows of one layer; their ids begin with a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.lines, self.count = prefix, list[str](), 0
        self.entry, self.exit = f"{prefix}x", ""
        self.known = {self.entry}

    def of(self, block: Block) -> list[str]:
        """Draw the streams that reach the output, and the output."""
        self.lines.append(f'{self.entry}(["x {block.x}"])')
        self.known |= {self.prefix + stream.name for stream in block.streams}
        for stream in block.streams:
            self._named(stream.flow, self.prefix + stream.name, stream.name)
        self.exit = f"{self.prefix}out"
        self._named(block.out, self.exit, "out")
        return self.lines

    def _named(self, flow: Flow, own: str, name: str) -> None:
        """Draw a flow whose last box is that of a stream."""
        if isinstance(flow, Read):
            self.lines.append(f'{self._of(flow)} --> {own}(["{name}"])')
        elif isinstance(flow, Mixing | Statistic):
            kind = "attend" if isinstance(flow, Mixing) else flow.kind
            self.lines.append(f'{own}[["{name}: {kind}"]]')
            for each in dict.fromkeys(map(self._of, flow.inputs)):
                self.lines.append(f"{each} --> {own}")
        else:
            self._box(flow, own, f"{name} = " if name != "out" else "")

    def _of(self, flow: Flow) -> str:
        """Return the id of what a flow gives, drawn where it is not there yet."""
        if isinstance(flow, Read):
            return self._read(flow.name)
        if isinstance(flow, Apply) and flow.op == "dropout":
            return self._of(flow.inputs[0])  # in training alone
        self.count += 1
        own = f"{self.prefix}_{self.count}"
        assert isinstance(flow, Apply | Part)
        self._box(flow, own, "")
        return own

    def _read(self, name: str) -> str:
        """Return the id of a stream, or of a tensor or what a model gives, drawn once."""
        own = self.prefix + re.sub(r"\W", "_", name)
        if own not in self.known:
            self.known.add(own)
            self.lines.append(f'{own}(["{name}"])')
        return own

    def _box(self, flow: Apply | Part, own: str, name: str) -> None:
        read = [self._of(each) for each in flow.inputs]
        label = name + _label(flow, [_short(each) for each in flow.inputs])
        left, right = ("[[", "]]") if isinstance(flow, Part) else ("[", "]")
        if not flow.module:
            left, right = ("([", "])")
        self.lines.append(f'{own}{left}"{label}"{right}')
        self.lines += [f"{each} --> {own}" for each in dict.fromkeys(read)]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
