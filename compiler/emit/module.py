"""A whole file: header, pieces, kernels, blocks, model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..graph.passes import simplest
from ..lowerings.operators import operators
from ..model import Block, Model
from ..plan.plan import Plan, Target
from ..text.lines import wrap
from ..text.text import (
    INSTALLED,
    STANDARD,
    class_name,
    imports,
    names_read,
    needed_pieces,
    pieces,
    read_by_piece,
)
from .block import block_class
from .layers import KINDS, called, is_local, local_class, wholes
from .model import model_class

_HASH = "@@HASH@@"
_CLASS = "Unnamed_"  # the name of a class that may yet be another's


@dataclass(frozen=True, slots=True)
class Code:
    """An emitted file: its text, and the name of the class that is the module."""

    text: str
    name: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def emit(what: Block | Model, plans: Sequence[Plan]) -> Code:
    """Return the file of a block, or of a model whose different blocks have these plans."""
    file = _File()
    named = [(plan, file.named(plan.block.name, plan.block)) for plan in plans]
    for whole in wholes(_tops(what)):
        if whole != what:
            file.whole(whole)
    for plan, name in named:
        file.block(plan, name)
    if isinstance(what, Model):
        main = file.model(what)
    elif what.kind == "block":
        main = file.classes[what]
    else:  # alone, it makes its blocks itself
        main = file.taking(class_name(what.name))
        alone = Plan(simplest(what), Target(), {})
        file.add(block_class(alone, main, (), file.classes, alone=True))
    return file.code(what, main)


def _tops(what: Block | Model) -> list[Block]:
    """Return what a file's classes are found in."""
    if isinstance(what, Block):
        return [what]
    encoder = [] if what.encoder is None else _tops(what.encoder)
    return [*what.blocks, *encoder, *what.layers, *what.ends]


class _File:
    """A file in the making: its classes and kernels, and the names that are taken."""

    def __init__(self) -> None:
        self.classes: dict[Block, str] = {}
        self._taken: set[str] = set()
        self._texts: dict[str, str] = {}  # of layers and their like, without the name → the name
        self._bodies: list[str] = []
        self._sections: list[str] = []
        self._families: dict[str, None] = {}

    def taking(self, name: str) -> str:
        """Return the name of a class, with `Model` behind it where it is taken."""
        while name in self._taken:
            name = f"{name}Model"
        self._taken.add(name)
        return name

    def named(self, name: str, block: Block) -> str:
        """Give a block a class of its own, numbered where another has its name; return its name."""
        own, at = name, 2
        while class_name(own) in self._taken:
            own, at = f"{name}_{at}", at + 1
        self._taken.add(class_name(own))
        self.classes[block] = class_name(own)
        return own

    def add(self, lines: list[str]) -> None:
        """Add a class."""
        self._bodies.append("\n".join(wrap(lines)))

    def whole(self, block: Block) -> None:
        """Add the class of a layer, feed-forward or stage, or find the one with its text."""
        if is_local(block):
            lines = local_class(block, _CLASS, self.classes)
        else:
            lines = block_class(Plan(simplest(block), Target(), {}), _CLASS, (), self.classes)
        text = "\n".join(lines)
        if text in self._texts:
            self.classes[block] = self._texts[text]
            return
        self.named(called(block), block)
        name = self._texts[text] = self.classes[block]
        self.add([line.replace(_CLASS, name) for line in lines])

    def block(self, plan: Plan, name: str) -> None:
        """Add the class of a block, and its kernels."""
        kernels = operators(plan, name)
        self._families |= {each.family: None for each in kernels}
        self._sections += [each.render(f"headloom_{_HASH}") for each in kernels]
        self.add(block_class(plan, self.classes[plan.block], kernels, self.classes))

    def model(self, model: Model) -> str:
        """Add the class of a model, that of its encoder first; return its name."""
        main = self.taking(class_name(model.name))
        encoder = "" if model.encoder is None else self.model(model.encoder)
        self.add(model_class(model, main, self.classes, encoder))
        return main

    def code(self, what: Block | Model, main: str) -> Code:
        """Return the file with the pieces that its classes and kernels call."""
        body = "\n\n\n".join(self._bodies)
        sections = self._sections
        if sections:
            from ...kernels import render

            sections = [render.skeleton_text(*self._families), *sections]
        read = names_read([body])
        copied = needed_pieces(read)
        read = read.union(names_read(sections), *map(read_by_piece, copied))
        header = _header(what, bool(sections), read)
        parts = [header, *(pieces()[name] for name in copied), *sections, body]
        text = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Code(text.replace(_HASH, digest), main)


def _header(what: Block | Model, kernels: bool, read: Collection[str]) -> str:
    kind = "model" if isinstance(what, Model) else KINDS.get(what.kind, what.kind)
    needs = "PyTorch and Triton" if kernels else "PyTorch alone; edit freely"
    lines = [f'"""The {kind} `{what.name}`, generated by Headloom. It needs {needs}."""', ""]
    standard = imports(STANDARD, read)
    lines += [*standard, ""] if standard else []
    return "\n".join([*lines, *imports(INSTALLED, read)])
