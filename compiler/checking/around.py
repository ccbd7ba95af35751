"""What the parts of a model are told: where they stand, and what its settings mean in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...grammar.syntax import Expr, Name
from ...ops import Shape
from ..model import Block
from .depth import Depth

NONE = Name("none")
MakeBlock = Callable[[Expr, int], Block]  # the block of a call, at a width


@dataclass(frozen=True, slots=True)
class Around:
    """What is around a part; `block` makes the blocks among its own parts."""

    width: int
    block: MakeBlock
    layer: int = 0
    depth: int = 1
    lanes: int | None = None  # of the stream between layers
    offered: Mapping[str, Shape] = field(default_factory=dict)  # what a model gives beside x
    norm: Expr = NONE  # the stage that `norm` is
    dropout: float = 0.0  # of what every part gives
    vocab: int | None = None
    below: Depth | None = None  # the layers below, in a model

    def taken(self, kind: str) -> Shape:
        """Return the shape of what a layer or another part takes, and gives."""
        return Shape("n", self.width, self.lanes if kind == "layer" else None)
