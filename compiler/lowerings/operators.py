"""The kernels that a plan asks for.

Each attention has an operator of its own, and each recurrence that runs token by token; those
that run in chunks share one for each form.

    for each in operators(plan, "hybrid"):
        print(each.render("headloom"))       # def hybrid_attention(q, k, v): …
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ...kernels.recurrence import Recurrence
from ...kernels.sequential import Scan
from ...kernels.spec import Attend
from ..graph import operations
from ..graph.graph import Node, made_by
from ..plan.plan import Plan
from ..plan.recurrences import Chunked, Memory, kernels_of
from ..plan.sequential_form import scan_of
from .kernel import kernel_spec


class Operator(NamedTuple):
    """A kernel's function by its name, and the node that calls it first."""

    name: str
    node: Node[operations.Attend] | Node[operations.Scan]
    spec: Attend | Recurrence | Scan

    @property
    def family(self) -> str:
        """The skeletons that its text needs."""
        return {Attend: "pairwise", Recurrence: "chunked", Scan: "sequential"}[type(self.spec)]

    def render(self, namespace: str) -> str:
        """Return the text of its function and of the operators behind it."""
        from ...kernels import recurrence, render, sequential_render

        if isinstance(self.spec, Attend):
            return render.render(self.spec, self.name, namespace)
        if isinstance(self.spec, Scan):
            return sequential_render.render_scan(self.spec, self.name, namespace)
        return recurrence.render(self.spec, self.name, namespace)


def operators(plan: Plan, name: str) -> tuple[Operator, ...]:
    """Return the operators of a block of this name, in the order of its nodes."""
    graph = plan.graph
    found: list[Operator] = []
    forms: dict[Recurrence, None] = {}
    for node in graph.mixings():
        if plan.path(node) != "triton":
            continue
        own = name if node.name == "o" else f"{name}_{node.name.replace('.', '_')}"
        if made_by(node, operations.Attend):
            found.append(
                Operator(f"{own}_attention", node, kernel_spec(plan.attentions[node.name]))
            )
        elif made_by(node, operations.Scan):
            form = plan.recurrences[node.name]
            if isinstance(form, str):
                found.append(Operator(f"{own}_scan", node, scan_of(graph, node)))
                continue
            for _, spec in readings(form):
                if spec not in forms:
                    number = "" if not forms else f"_{len(forms) + 1}"
                    forms[spec] = None
                    found.append(Operator(f"{name}_recurrence{number}", node, spec))
    return tuple(found)


def readings(form: Chunked) -> Iterable[tuple[Memory, Recurrence]]:
    """Return the matrices of a recurrence, and the kernel of each of their readings."""
    for step in form.steps:
        if isinstance(step, Memory):
            for reading in step.readings:
                yield from ((step, each) for each in kernels_of(step, reading))
