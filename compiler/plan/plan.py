"""A graph with the path that each of its attentions and recurrences takes.

plan.graph.node("o")     o = attend(q, k, v)
plan.lowerings["o"]      path `sdpa`: softmax of plain logits under a mask
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..graph.graph import AnyNode, Graph
from ..model import Block
from .attention import Attention
from .recurrences import Chunked


@dataclass(frozen=True, slots=True)
class Target:
    """What a module is compiled for: PyTorch operations, or Triton kernels beside them.

    With a `lowering`, all attentions take that one, by its name. `optimize` is "default", or "max":
    what can be compiled by `torch.compile` is, at the module's first call.
    """

    backend: str = "torch"
    lowering: str | None = None
    optimize: str = "default"


@dataclass(frozen=True, slots=True)
class Lowering:
    """The path a node takes, why, and what stood in the way of the others.

    Where something must hold of a call for the path to take it, `needs` says what, () for all
    calls, and `beside` is the path of the others (`lowerings/calls.py`, `lowerings/way.py`).
    """

    node: str
    path: str  # triton, sdpa, keyed, faded, tiles, dense, chunkwise, sequential, grouped, taken
    reason: str
    obstacles: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] | None = None
    beside: tuple[str, str] | None = None  # the path, and which calls it takes


@dataclass(frozen=True, slots=True)
class Plan:
    """What is computed, and how: `lowerings` are by the node's name, in the order of the nodes.

    With them goes what they were chosen by: the facts of each attention, and how each recurrence
    runs in chunks, or why it does not.
    """

    graph: Graph
    target: Target
    lowerings: Mapping[str, Lowering]
    attentions: Mapping[str, Attention] = field(default_factory=dict)
    recurrences: Mapping[str, Chunked | str] = field(default_factory=dict)

    @property
    def block(self) -> Block:
        return self.graph.block

    def path(self, node: AnyNode) -> str | None:
        """Return the path of an attention or recurrence; None for other nodes."""
        chosen = self.lowerings.get(node.name)
        return None if chosen is None else chosen.path
