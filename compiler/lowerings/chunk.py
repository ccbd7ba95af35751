"""A recurrence in chunks of tokens as PyTorch text: its operands, and one call for each state.

    S <- alpha * S + outer(k, v)        z <- alpha * z + k        o <- q @ S / dot(q, z)

S_read, S = chunked_linear(q_h, k_h, v_h, alpha_h[..., None], state["S"])
z = faded_sums(k_h, alpha_h[..., None], state["z"])
o = S_read / (q_h * z).sum(-1)[..., None]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...grammar.expr import evaluate, names, rebuild
from ...grammar.syntax import Expr, Index, Name, Number, walk
from ...kernels.recurrence import Recurrence
from ..algebra.affine import BEFORE, scale_apart
from ..graph.graph import Graph, Node
from ..graph.operations import Scan
from ..model import State
from ..plan.recurrences import Chunked, Memory, Sum, kernels_of, number_in_query, ranks_of
from ..text.tensors import stored
from ..text.text import atomic, call, ident, indent
from ..text.values import Text, Values, lifted
from . import scan

_PLACES = (
    "batch.before",
    "fresh",
    "None if idle is None else batch.counts",
)  # of levels: what came before


def forward(
    graph: Graph,
    node: Node[Scan],
    form: Chunked,
    cache: str,
    kernels: Mapping[Recurrence, str] | None,
) -> list[str]:
    """Return the lines that run a recurrence of this form, from the streams to its output.

    `kernels` are the functions that read matrices, where PyTorch does not.
    """
    return _Writer(graph, node, form, cache, kernels).lines()


@dataclass
class _Values(Values):
    """Expressions for all tokens at once: numbers are [b, h, n], vectors [b, h, n, d]."""

    graph: Graph
    texts: dict[str, str]
    ranks: dict[str, int]

    @property
    def typed(self) -> str:
        return "x.new_full((), {}, dtype=wide)"

    def leaf(self, expr: Name | Index) -> Text:
        match expr:
            case Name(id):
                return Text(self.texts[id], self.ranks[id])
            case Index(Name(id), items):
                along = "[:, None]" if items else ""
                rank = len(self.graph.node(id).dims) - len(items)
                return Text(f"{stored(self.graph.block, id)}.to(wide){along}", rank)
        raise TypeError(f"{type(expr).__name__} in a mixer")


@dataclass
class _Writer:
    graph: Graph
    node: Node[Scan]
    form: Chunked
    cache: str
    kernels: Mapping[Recurrence, str] | None
    known: dict[Expr, Name] = field(default_factory=dict)  # what has a variable already
    batched: set[str] = field(default_factory=set)  # names whose values differ in a batch

    def __post_init__(self) -> None:
        self.mix = self.node.op.mix
        self.form = self.form if self.kernels else number_in_query(self.form)
        self.states = {each.name: each for each in self.mix.states}
        self.values = _Values(self.graph, {}, ranks_of(self.graph, self.node))

    def lines(self) -> list[str]:
        lines = ["wide = torch.promote_types(x.dtype, torch.float32)", *self._streams()]
        lines += scan.opened(self.node, self.cache if self.mix.causal else "")
        for each in self.form.lets:
            lines += self._let(each.name, each.value) if self._reads(each.name) else []
        for step in self.form.steps:
            if isinstance(step, Memory):
                lines += self._memory(step)
            elif self.mix.causal or self._reads(step.state):
                lines += self._sum(step)
        made = scan.variable(self.node.name)
        heads, dim = self.node.dims[1], int(self.node.dims[3])
        output = atomic(self._full(self.form.output, dim))
        lines.append(f"{made} = {output}.to(x.dtype)  # [b, {heads}, n, {dim}]")
        return [*lines, *self._keep()] if self.mix.causal else lines

    def _streams(self) -> list[str]:
        lines = []
        for name in self.node.inputs:
            if self.graph.is_tensor(name) or name == "doc":
                continue
            text, rank = scan.per_head(self.graph, self.node, name)
            variable = f"{ident(name)}_h"
            lines.append(f"{variable} = {text}.to(wide)")
            self._name(name, variable, rank)
        return lines

    def _name(self, name: str, variable: str, rank: int) -> None:
        self.values.texts[name], self.values.ranks[name] = variable, rank
        self.batched.add(name)

    def _let(self, name: str, value: Expr) -> list[str]:
        value = self._short(value)
        found = self.values.value(value)
        variable = ident(name)
        self.values.texts[name], self.values.ranks[name] = variable, found.rank
        if names(value) & self.batched:
            self.batched.add(name)
        elif isinstance(value, Number):
            found = Text(f"x.new_full((), {found.text}, dtype=wide)", 0)
        self.known[value] = Name(name)
        return [f"{variable} = {found.text}"]

    def _keep(self) -> list[str]:
        kept = {ident(name): self._last(ident(name), state) for name, state in self.states.items()}
        return scan.keep(self.cache, kept)

    @staticmethod
    def _last(own: str, state: State) -> str:
        """Return what a state is after the last token."""
        if len(state.shape) == 2:
            return own
        if state.levels:
            return f"{own}_written[..., 0, {':' if state.shape else '0'}]"
        return f'last_of({own}, state["{own}"])'

    # operands

    def _short(self, expr: Expr) -> Expr:
        """Return an expression with what has a variable already under its name."""
        if isinstance(expr, Number):
            return expr
        if expr in self.known:
            return self.known[expr]
        return rebuild(expr, self._short)

    def _full(self, expr: Expr, dim: int) -> str:
        """Write a vector [b, heads, n, dim] for every token."""
        size = f"b, {self.node.dims[1]}, n, {dim}"
        expr = self._short(expr)
        if not any(isinstance(each, Name | Index) for each in walk(expr)):
            return f"x.new_full(({size}), {float(evaluate(expr, {}))!r}, dtype=wide)"
        found = self.values.value(expr)
        text = lifted(found, 1) if found.rank == 0 else found.text
        if (found.rank == 0 and dim > 1) or not names(expr) & self.batched:
            return f"{atomic(text)}.expand({size})"
        return text

    def _operand(self, name: str, expr: Expr, dim: int, lines: list[str]) -> str:
        """Write an operand of a state, a long one on a line of its own."""
        expr = self._short(expr)
        text = self._full(expr, dim)
        if isinstance(expr, Name) or len(text) < 24:
            return text
        label = f"operand {name}"
        self._name(label, name, 1)
        self.known[expr] = Name(label)
        lines.append(f"{name} = {text}")
        return name

    def _vectors(
        self, name: str, expr: Expr, dim: int, lines: list[str], scales: dict[str, str], of: str
    ) -> str:
        """Write an operand of a state; what scales its vectors is put into `scales`, if wanted."""
        if of not in scales:
            return self._operand(name, expr, dim, lines)
        scale, vector = scale_apart(self._short(expr), lambda each: self.values.value(each).rank)
        scales[of] = "None" if scale is None else self._full(scale, 1)
        return self._operand(name, vector, dim, lines)

    def _decay(self, name: str, decay: Expr | None, lines: list[str]) -> str:
        """Write what a state is multiplied by: nothing of it where a sequence begins."""
        text = "None"
        if decay is not None:
            text = self._full(decay, self._width(name, decay))
        lines += call(
            f"{ident(name)}_decay = decay_of",
            [text, "fresh", "idle", "wide"],
        )
        return f"{ident(name)}_decay"

    def _faded(self, step: Sum) -> str:
        if step.decay is None:
            return "None"
        return self._full(step.decay, self._width(step.state, step.decay))

    def _width(self, name: str, decay: Expr) -> int:
        """Return 1 for a decay that is a number, else the size of what fades."""
        return self._rows(name) if self.values.value(self._short(decay)).rank else 1

    def _rows(self, name: str) -> int:
        shape = self.states[name].shape
        return shape[0] if shape else 1

    # states

    def _sum(self, step: Sum) -> list[str]:
        if step.weights is not None:
            return self._weighed_sum(step, step.weights)
        state, own = self.states[step.state], ident(step.state)
        lines: list[str] = []
        dim, flat = self._rows(step.state), not state.shape
        start = f'state["{own}"]' + ("[..., None]" if flat else "")
        added = self._operand(f"{own}_added", step.added, dim, lines)
        anew = float(evaluate(state.init, {}))
        added = f"zeroed({added}, idle)"
        if not self.mix.causal:
            lines += call(f"{own} = whole_sums", [added, start, "fresh"])
        else:
            if anew:
                added = f"begun_at({added}, {anew!r}, {self._faded(step)}, fresh)"
            decay = self._decay(step.state, step.decay, lines)
            lines += call(f"{own} = faded_sums", [added, decay, start])
        self._name(step.state, own, len(state.shape))
        if self._reads(f"{BEFORE}{step.state}"):
            lines += call(f"{own}_before = one_before", [own, start, "fresh", repr(anew)])
            self._name(f"{BEFORE}{step.state}", f"{own}_before", len(state.shape))
            lines += [f"{own}_before = {own}_before[..., 0]"] if flat else []
        return [*lines, f"{own} = {own}[..., 0]"] if flat else lines

    def _weighed_sum(self, step: Sum, weights: Expr) -> list[str]:
        """Write a vector that is kept in levels: a matrix of one row, which every key is 1 for."""
        state, own = self.states[step.state], ident(step.state)
        lines: list[str] = []
        added = self._operand(f"{own}_added", step.added, self._rows(step.state), lines)
        one = f"{own}_key"
        lines.append(f"{one} = x.new_ones((b, {self.node.dims[1]}, n, 1), dtype=wide)")
        start = f'state["{own}"][..., None, {":" if state.shape else "None"}]'
        args = [
            one,
            one,
            added,
            "None",
            self._decay(step.state, step.decay, lines),
            self._operand(f"{own}_levels", weights, state.levels, lines),
            start,
            *_PLACES,
        ]
        lines += call(f"{own}, {own}_written = leveled_linear", args)
        made = {step.state: own}
        if self._reads(f"{BEFORE}{step.state}"):
            lines += call(f"{own}_before, _ = leveled_linear", [*args, "before=True"])
            made[f"{BEFORE}{step.state}"] = f"{own}_before"
        for name, variable in made.items():
            self._name(name, variable, len(state.shape))
            lines += [] if state.shape else [f"{variable} = {variable}[..., 0]"]
        return lines

    def _reads(self, name: str) -> bool:
        """Say whether a name is read by a statement, a step or the output."""
        exprs: list[Expr | None] = [self.form.output, *(each.value for each in self.form.lets)]
        for step in self.form.steps:
            exprs.append(step.decay)
            if isinstance(step, Sum):
                exprs.append(step.added)
                continue
            exprs += [each.query for each in step.readings]
            exprs += [part for each in step.writes for part in (each.key, each.value, each.query)]
        return any(name in names(each) for each in exprs if each is not None)

    def _memory(self, step: Memory) -> list[str]:
        lines: list[str] = []
        own = ident(step.state)
        shape = self.states[step.state].shape
        d, e = reversed(shape) if step.turned else shape
        start = f'state["{own}"]' + (".mT" if step.turned else "")
        weights = ""
        if step.weights is not None:
            levels = self.states[step.state].levels
            weights = self._operand(f"{own}_levels", step.weights, levels, lines)
        decay = self._decay(step.state, step.decay, lines) if self.mix.causal else "None"
        count = len(step.writes)
        apart = self.mix.causal and self.kernels is None and count == 1 and not weights
        scales = dict.fromkeys(("q_scale", "v_scale", "w_scale"), "None") if apart else {}
        parts = [self._write(step, at, (d, e), lines, scales) for at in range(count)]
        key, value, query = (self._woven([each[at] for each in parts]) for at in range(3))
        if count > 1 and decay != "None":
            woven = self._woven([decay, *[f"torch.ones_like({decay})"] * (count - 1)])
            lines.append(f"{decay} = None if {decay} is None else {woven}")
        for at, (name, text) in enumerate((("key", key), ("value", value))):
            if count > 1:
                lines.append(f"{own}_{name}s = {text}")
                key, value = (f"{own}_keys", value) if at == 0 else (key, f"{own}_values")
        corrected = [query] if any(asked for _, _, asked in parts) else []
        for at, reading in enumerate(step.readings):
            variable = f"{own}_read" if at == 0 else f"{own}_read_{at + 1}"
            name = f"{own}_query" if at == 0 else f"{own}_query_{at + 1}"
            asked = self._vectors(name, reading.query, d, lines, scales, "q_scale")
            if not reading.after and self.mix.causal:
                asked = f"zeroed({asked}, fresh)"
            if count > 1:
                others = [f"torch.zeros_like({asked})"] * (count - 1)
                asked = self._woven([*others, asked] if reading.after else [asked, *others])
            args = [asked, key, value, decay, start, *corrected]
            if weights:
                args = [
                    asked,
                    key,
                    value,
                    *(corrected or ["None"]),
                    decay,
                    weights,
                    start,
                    *_PLACES,
                ]
                lines += self._weighed(step, variable, args, at)
            else:
                lines += self._asked(step, variable, args, at, scales)
            if count > 1:
                first = count - 1 if reading.after else 0
                lines.append(f"{variable} = {variable}[:, :, {first}::{count}]")
            self._name(reading.name, variable, 1)
        if step.turned and self.mix.causal:
            lines.append(f"{own} = {own}.mT")
        return lines

    def _asked(
        self, step: Memory, variable: str, args: list[str], at: int, scales: Mapping[str, str]
    ) -> list[str]:
        if not self.mix.causal:
            zeros = ["torch.zeros_like(fresh)"] * (len(step.writes) - 1)
            fresh = self._woven(["fresh", *zeros])
            fresh = f"None if fresh is None else {fresh}" if zeros else fresh
            query, key, value, _, start = args
            return call(f"{variable} = whole_linear", [query, key, value, start, fresh])
        targets = f"{variable}, {ident(step.state) if at == 0 else '_'}"
        reading = step.readings[at]
        if self.kernels is not None:
            query, key, value, decay, start, *corrected = args
            dtype = f"{self._like}.dtype"
            vectors = [f"{atomic(each)}.to({dtype})" for each in (query, key, value, *corrected)]
            plain, faded = (self.kernels[each] for each in kernels_of(step, reading))
            fades = f"{decay}.expand(b, {self.node.dims[1]}, -1, -1)"
            lines = call(f"{targets} = {faded}", [*vectors, fades, start])
            if plain == faded:
                return lines
            undecayed = call(f"{targets} = {plain}", [*vectors, start])
            return [f"if {decay} is None:", *indent(undecayed), "else:", *indent(lines)]
        before = [] if reading.after else ["before=True"]
        given = [f"{of}={scale}" for of, scale in scales.items() if scale != "None"]
        return call(f"{targets} = chunked_linear", [*args, *before, *given])

    @staticmethod
    def _weighed(step: Memory, variable: str, args: list[str], at: int) -> list[str]:
        """Write how a state that is kept in levels is read."""
        before = [] if step.readings[at].after else ["before=True"]
        own = ident(step.state) if at == 0 else "_"
        return call(f"{variable}, {own} = leveled_linear", [*args, *before])

    @property
    def _like(self) -> str:
        """A stream whose dtype the kernels take: autocast makes it another than that of x."""
        streams = (
            name
            for name in self.node.inputs
            if len(self.graph.node(name).dims) == 4 and not self.graph.is_tensor(name)
        )
        return scan.variable(next(streams, "x"))

    def _write(
        self, step: Memory, at: int, size: tuple[int, int], lines: list[str], scales: dict[str, str]
    ) -> tuple[str, str, str]:
        """Write the key, value and query of an outer product; zeros for what it has not.

        A query that is the key, but for its scale, is not written again.
        """
        each, own, (d, e) = step.writes[at], ident(step.state), size
        number = "" if at == 0 else f"_{at + 1}"
        nothing = Number(0, "0")
        plain = self._operand(f"{own}_key{number}", each.key, d, lines)
        key = f"zeroed({plain}, idle)"
        values = f"{own}_value{number}"
        value = self._vectors(values, each.value or nothing, e, lines, scales, "v_scale")
        if not any(each.query is not None for each in step.writes):
            return key, value, ""
        asked = f"{own}_asked{number}"
        query = self._vectors(asked, each.query or nothing, d, lines, scales, "w_scale")
        if each.query is None:
            return key, value, query
        if scales.get("w_scale", "None") != "None":  # fewer numbers than vectors
            scales["w_scale"] = f"zeroed({scales['w_scale']}, fresh)"
            return key, value, "" if query == plain else query
        return key, value, f"zeroed({query}, fresh)"

    @staticmethod
    def _woven(parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else f"interleaved({', '.join(parts)})"
