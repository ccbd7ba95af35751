"""What each node of a graph depends on.

q = x | linear; o mixes q, k, v     roots of o: x, q, k, v, o; it is late: it is mixed
k = context | linear                far: of the context, and of no token of the call
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..model import OFFERED, elsewhere
from .graph import Graph, made_by
from .operations import Stage, Whole


@dataclass(frozen=True)
class Roots:
    """Everything that each node of a graph depends on."""

    graph: Graph

    @cached_property
    def of(self) -> dict[str, frozenset[str]]:
        """The names that a node depends on, and its own.

        A stage that starts from nothing reads its input only for how large the batch is.
        """
        found: dict[str, frozenset[str]] = {}
        for node in self.graph.nodes:
            starts = made_by(node, Stage) and node.op.definition.starts
            read = () if starts else node.inputs
            found[node.name] = frozenset({node.name}).union(*(found[name] for name in read))
        return found

    @cached_property
    def _mixed(self) -> frozenset[str]:
        wholes = (each for each in self.graph.of(Whole) if each.op.what.uses)
        return frozenset(each.name for each in (*self.graph.mixings(), *wholes))

    @cached_property
    def _tokens(self) -> frozenset[str]:
        """The arguments that stand for the tokens of a call."""
        return frozenset(
            node.name
            for node in self.graph.nodes
            if node.name in ("x", "doc")
            or ("n" in node.dims and (node.name in OFFERED or elsewhere(node.name) is not None))
        )

    def late(self, name: str) -> bool:
        """Say whether a node depends on what was mixed, or is mixed itself."""
        return not self._mixed.isdisjoint(self.of[name])

    def far(self, name: str) -> bool:
        """Say whether a node depends on the context and not on the tokens."""
        return "context" in self.of[name] and self._tokens.isdisjoint(self.of[name])
