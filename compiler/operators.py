"""The kernels that a graph asks for: one operator for each attention, one for each form of
recurrence.

    for each in operators(graph, "hybrid"):
        print(each.render("headloom"))       # def hybrid_attention(q, k, v): …
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..kernels import recurrence, render
from ..kernels.recurrence import Recurrence
from ..kernels.spec import Attend
from .choose import kernel_spec
from .graph import Graph, Node, shape_of
from .recurrences import Chunked, Memory, kernel_of, of_node


class Operator(NamedTuple):
    """A kernel's function by its name, and the node that calls it first."""

    name: str
    node: Node
    spec: Attend | Recurrence

    @property
    def family(self) -> str:
        return "pairwise" if isinstance(self.spec, Attend) else "chunked"

    def render(self, namespace: str) -> str:
        """Return the text of its function and of the operators behind it."""
        if isinstance(self.spec, Attend):
            return render.render(self.spec, self.name, namespace)
        return recurrence.render(self.spec, self.name, namespace)

    def sizes(self, graph: Graph) -> dict[str, int]:
        """Return the sizes its tensors have in the graph, as `compile_ahead` calls them."""
        if isinstance(self.spec, Attend):
            q, k, v = (shape_of(graph.node(name).dims) for name in self.node.inputs[:3])
            return {"head_dim": q.dim, "value_dim": v.dim, "heads": q.heads or 1,
                    "kv_heads": max(k.heads or 1, v.heads or 1)}  # fmt: skip
        states = {each.name: each.shape for each in self.node.get("recurrence").states}
        for step, spec in _readings(graph, self.node):
            if spec == self.spec:
                d, e = reversed(states[step.state]) if step.turned else states[step.state]
                return {"head_dim": d, "value_dim": e, "heads": int(self.node.dims[1])}
        raise LookupError(f"`{self.node.name}` has no such recurrence")


def operators(graph: Graph, name: str) -> tuple[Operator, ...]:
    """Return the operators of a block of this name, in the order of its nodes."""
    found: list[Operator] = []
    forms: dict[Recurrence, None] = {}
    for node in graph.nodes:
        if node.get("lowering") is None or node.get("lowering").path != "triton":
            continue
        own = name if node.name == "o" else f"{name}_{node.name}"
        if node.op == "attend":
            found.append(Operator(f"{own}_attention", node, kernel_spec(graph, node)))
            continue
        for _, spec in _readings(graph, node):
            if spec not in forms:
                number = "" if not forms else f"_{len(forms) + 1}"
                forms[spec] = None
                found.append(Operator(f"{name}_recurrence{number}", node, spec))
    return tuple(found)


def _readings(graph: Graph, node: Node) -> Iterable[tuple[Memory, Recurrence]]:
    """Return the matrices of a recurrence, and the kernel of each of their readings."""
    form = of_node(graph, node)
    assert isinstance(form, Chunked)
    resets = node.get("recurrence").resets
    for step in form.steps:
        if isinstance(step, Memory):
            for reading in step.readings:
                yield step, kernel_of(step, reading, resets)
