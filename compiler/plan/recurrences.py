"""Which recurrences run in chunks of tokens: algebra on their statements, nothing emitted.

    S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)        o <- q @ S

is  Memory("S", decay=alpha, writes=(Write(key=k, value=beta * v, query=-alpha * beta * k),),
           readings=(Reading("q @ S", "S", query=q),))

A matrix may fade by a number or by its rows, be written by outer products, and be corrected by
one outer product of what it holds itself; it is read by products with vectors alone. Vectors and
numbers may fade and be added to; as all their values are at hand, they are read in any way.
However it is written, the same update gives the same `Memory`; of anything else, `recognised`
says which term of which statement is in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ...grammar.expr import evaluate, names
from ...grammar.show import show
from ...grammar.syntax import Binary, Expr, Name, Number
from ...kernels import recurrence as kernel
from ..algebra.affine import (
    BEFORE,
    Affine,
    Factors,
    Held,
    Read,
    RefusedError,
    Term,
    canonical,
    flipped,
    inlined,
    product_of,
    total_of,
)
from ..graph.graph import Graph, Node
from ..graph.operations import Scan
from ..model import Recurrence, State, Update


@dataclass(frozen=True, slots=True)
class Reading:
    """`query @ S` for all tokens; `after` says whether the token itself has been written."""

    name: str
    query: Expr
    after: bool


@dataclass(frozen=True, slots=True)
class Write:
    """S <- S + outer(key, value + query @ S), either of the two summands may be missing."""

    key: Expr
    value: Expr | None
    query: Expr | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """A matrix: S <- decay * S, and its writes; `decay` None for 1, a number, or one for each row.

    At most the first write has a query, which meets S as the token before left it. Where
    `turned`, all is said of the transposed matrix: it is read by `S @ query`. With `weights` it is
    kept in levels: it fades, is corrected and read level by level, and has one write.
    """

    state: str
    decay: Expr | None
    writes: tuple[Write, ...]
    readings: tuple[Reading, ...]
    turned: bool = False
    by_rows: bool = False  # whether it fades by a number for each row
    weights: Expr | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """A vector or a number: z <- decay * z + added; with `weights`, kept in levels."""

    state: str
    decay: Expr | None
    added: Expr
    weights: Expr | None = None


@dataclass(frozen=True, slots=True)
class Chunked:
    """A recurrence in an order in which everything can be computed for all tokens at once.

    `lets` are the statements that read no state, and are no matrices.
    """

    lets: tuple[Update, ...]
    steps: tuple[Memory | Sum, ...]
    output: Expr


def recognised(mix: Recurrence, ranks: Mapping[str, int]) -> Chunked | str:
    """Return the chunked form of a recurrence, or why it has none.

    `ranks` says of every stream how many dimensions it has per head (0 number, 1 vector), of
    every tensor how many it has at all.
    """
    try:
        return _Analysis(mix, dict(ranks)).chunked()
    except RefusedError as refused:
        return str(refused)


def of_node(graph: Graph, node: Node[Scan]) -> Chunked | str:
    """Return the chunked form of a node's recurrence, or why it has none."""
    return recognised(node.op.mix, ranks_of(graph, node))


def number_in_query(form: Chunked) -> Chunked:
    """Return a form that reads what it gives: a number that scales it scales the query instead.

    Where something else reads the same, nothing is changed.
    """
    match form.output:
        case Binary("*", Number() as number, Name(made)):
            pass
        case _:
            return form
    if any(made in _read(step) for step in form.steps):
        return form
    steps: list[Memory | Sum] = []
    for step in form.steps:
        if isinstance(step, Memory):
            readings = tuple(
                replace(each, query=Binary("*", number, each.query)) if each.name == made else each
                for each in step.readings
            )
            step = replace(step, readings=readings)
        steps.append(step)
    return replace(form, steps=tuple(steps), output=Name(made))


def ranks_of(graph: Graph, node: Node[Scan]) -> dict[str, int]:
    """Return the ranks of what a recurrence reads."""
    ranks = {}
    for name in node.inputs:
        dims = graph.node(name).dims
        if graph.is_tensor(name):
            ranks[name] = len(dims)
        elif name != "doc":
            ranks[name] = 0 if len(dims) == 3 and dims[2] == node.dims[1] else 1
    return ranks


def kernels_of(step: Memory, reading: Reading) -> tuple[kernel.Recurrence, kernel.Recurrence]:
    """Return the kernels that a reading takes: of full rows of one sequence, and of all others.

    Where a sequence begins, a state fades to nothing.
    """
    corrected = any(each.query is not None for each in step.writes)
    plain = None if step.decay is None else "rows" if step.by_rows else "number"
    forms = (plain, plain or "number")
    found = [kernel.Recurrence(each, corrected, not reading.after) for each in forms]
    return found[0], found[1]


def kernel_obstacle(mix: Recurrence, form: Chunked) -> str | None:
    """Return why no kernel carries a recurrence that runs in chunks, or None."""
    if not mix.causal:
        return "a recurrence over all tokens is two products, and needs no kernel"
    states = [step.state for step in form.steps if isinstance(step, Memory)]
    if not states:
        return "no state is a matrix"
    for each in mix.states:
        if each.levels:
            return f"`{each.name}` is kept in levels, which the kernels do not do"
        if each.name in states and max(each.shape) > kernel.LARGEST:
            rows, columns = each.shape
            return f"`{each.name}` is {rows} x {columns}; the kernels hold up to {kernel.LARGEST}"
    return None


def described(form: Chunked) -> str:
    """Say in one line how the states are computed."""
    return "; ".join(_described(each) for each in form.steps) or "no state is kept"


def _described(step: Memory | Sum) -> str:
    fades = "" if step.decay is None else f" and fades by {show(step.decay)}"
    if step.weights is not None:
        fades += f", in levels weighed by {show(step.weights)}"
    if isinstance(step, Sum):
        return f"`{step.state}` only adds{fades}" if not fades else (f"`{step.state}` adds{fades}")
    if any(each.query is not None for each in step.writes):
        return f"`{step.state}` is corrected along one key{fades}: a triangular system a chunk"
    return f"`{step.state}` adds outer products{fades}: masked products within chunks of tokens"


# ── the analysis ─────────────────────────────────────────────────────────────────────────


@dataclass
class _Analysis:
    mix: Recurrence
    ranks: dict[str, int]
    states: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = {each.name: each for each in self.mix.states}
        for name, state in self.states.items():
            self.ranks[name] = self.ranks[f"{BEFORE}{name}"] = len(state.shape)
        matrices = (name for name, state in self.states.items() if len(state.shape) == 2)
        self.algebra = Affine(self.ranks, frozenset(matrices))

    def chunked(self) -> Chunked:
        lets, finals, output = self._statements()
        free = tuple(Update(name, canonical(value)) for name, value in lets.items())
        steps = {name: self._step(state, finals) for name, state in self.states.items()}
        with _statement("o"):
            output = self.algebra.extracted(output)
        return Chunked(free, self._ordered(steps), canonical(output))

    def _step(self, state: State, finals: Mapping[str, Expr]) -> Memory | Sum:
        if state.name not in finals:
            raise RefusedError(f"`{state.name}` is never written")
        value = finals[state.name]
        with _statement(state.name):
            if state.levels:
                self._in_levels(state)
            if not self.mix.causal and (others := self._others(value, state.name)):
                raise RefusedError(f"it reads `{others[0]}` before all tokens are taken up")
            return (self._memory if len(state.shape) == 2 else self._sum)(state, value)

    def _in_levels(self, state: State) -> None:
        if [each.name for each in self.mix.updates].count(state.name) > 1:
            raise RefusedError("it is kept in levels, and written more than once")

    def _others(self, value: Expr, own: str) -> list[str]:
        return [
            name for name in self.states if name != own and {name, f"{BEFORE}{name}"} & names(value)
        ]

    # statements

    def _statements(self) -> tuple[dict[str, Expr], dict[str, Expr], Expr]:
        """Return the statements without states, the value of each state, and the output.

        What reads states stands in place of its name; states are `before S`, or `S` after
        the last statement that writes it.
        """
        lets, scope = self._run({name: Name(f"{BEFORE}{name}") for name in self.states}, True)
        finals = {name: scope[f"final {name}"] for name in self.states if f"final {name}" in scope}
        if not self.mix.causal:  # what is answered is answered from all tokens
            _, scope = self._run({}, False)
        return lets, finals, scope["o"]

    def _run(
        self, scope: dict[str, Expr], writing: bool
    ) -> tuple[dict[str, Expr], dict[str, Expr]]:
        atoms = {*self.states, *(f"{BEFORE}{name}" for name in self.states)}
        written = [each.name for each in self.mix.updates]
        lets: dict[str, Expr] = {}
        for at, update in enumerate(self.mix.updates):
            value, name = inlined(update.value, scope), update.name
            if name in self.states:
                if writing and name not in written[at + 1 :]:
                    scope[f"final {name}"] = value
                    value = Name(name)
                if not writing:
                    continue
            elif name != "o" and not names(value) & atoms and written.count(name) == 1:
                rank = self.algebra.rank(value)
                if rank == 2:  # a matrix is told apart where it is read
                    scope[name] = value
                    continue
                lets[name], self.ranks[name] = value, rank
                value = Name(name)
            scope[name] = value
        return lets, scope

    # steps

    def _sum(self, state: State, value: Expr) -> Sum:
        name = state.name
        value = self.algebra.extracted(value)
        decays: list[Expr] = []
        added: list[Expr] = []
        for term in self.algebra.terms(value, name):
            factors = product_of(term.number, term.scalars, term.rows)
            (added if term.core is None else decays).append(factors)
        decay = _decay(decays)
        if state.levels and decay is not None and self.algebra.rank(decay):
            raise RefusedError(f"it is kept in levels, and fades by the vector `{show(decay)}`")
        return Sum(name, decay, total_of(added), state.weights)

    def _memory(self, state: State, value: Expr) -> Memory:
        name = state.name
        value = self.algebra.extracted(value, name)
        terms = self.algebra.terms(value, "")
        kept = [each for each in terms if isinstance(each.core, Held)]
        corrections = [each for each in terms if isinstance(each.core, Read)]
        plain = [each for each in terms if each.core is None]
        if float(evaluate(state.init, {})) != 0 and self.mix.resets:
            raise RefusedError(f"a document begins it at {show(state.init)} instead of 0")
        turned = any(isinstance(each.core, Read) and each.core.turned for each in corrections)
        if turned:
            plain, kept = ([flipped(each) for each in group] for group in (plain, kept))
            corrections = [flipped(each) for each in corrections]
        writes = _writes(plain, corrections)
        if state.levels and len(writes) > 1:
            shown = " and ".join(f"`{show(each.key)}`" for each in writes)
            raise RefusedError(f"it is kept in levels, and written along several keys, {shown}")
        by_rows = any(each.rows for each in kept)
        return Memory(name, self._decay(kept), writes, (), turned, by_rows, state.weights)

    @staticmethod
    def _decay(kept: list[Term]) -> Expr | None:
        for each in kept:
            if each.columns:
                shown = show(product_of(1, each.columns))
                raise RefusedError(f"it fades along the side that is not read, by `{shown}`")
        return _decay([product_of(each.number, each.scalars, each.rows) for each in kept])

    def _ordered(self, steps: dict[str, Memory | Sum]) -> tuple[Memory | Sum, ...]:
        """Give matrices their readings, and every step a place after what it reads."""
        for name, step in steps.items():
            if isinstance(step, Memory):
                steps[name] = self._with_readings(step)
        of = {made: state.name for (state, _, _), made in self.algebra.readings.items()}
        of |= {each: each for each in steps} | {f"{BEFORE}{each}": each for each in steps}
        waits = {
            name: {of[each] for each in _read(step) if each in of} for name, step in steps.items()
        }
        for name, step in steps.items():  # a reading may ask for what an earlier one has read
            if isinstance(step, Memory) and step.readings:
                updated = {of[each] for each in _read(replace(step, readings=())) if each in of}
                waits[name] -= {name} - updated
        done: dict[str, Memory | Sum] = {}
        while len(done) < len(steps):
            ready = [name for name in steps if name not in done and waits[name] <= done.keys()]
            if not ready:
                left = " and ".join(f"`{name}`" for name in steps if name not in done)
                raise RefusedError(f"{left} wait for one another, or for themselves")
            done |= {name: steps[name] for name in ready}
        return tuple(done.values())

    def _with_readings(self, step: Memory) -> Memory:
        asked = [
            (query, state.after, side, name)
            for (state, query, side), name in self.algebra.readings.items()
            if state.name == step.state
        ]
        if not asked:
            raise RefusedError(f"`{step.state}` is never read")
        sides = {side for _, _, side, _ in asked}
        corrected = any(each.query is not None for each in step.writes)
        if len(sides | ({step.turned} if corrected else set())) > 1:
            raise RefusedError(f"`{step.state}` is read from both sides")
        readings = tuple(Reading(name, query, after) for query, after, _, name in asked)
        if True in sides and not corrected:
            if step.decay is not None and self.algebra.rank(step.decay):
                shown = f"by `{show(step.decay)}`"
                raise RefusedError(
                    f"`{step.state} <- …`: it fades along the side that is not read, {shown}"
                )
            writes = tuple(Write(each.value or Number(1, "1"), each.key) for each in step.writes)
            return replace(step, turned=True, writes=writes, readings=readings)
        return replace(step, readings=readings)


def _writes(plain: list[Term], corrections: list[Term]) -> tuple[Write, ...]:
    """Return the outer products that are added, those of one key as one."""
    keys: dict[Factors, tuple[list[Expr], list[Expr]]] = {}
    for each in corrections:
        assert isinstance(each.core, Read)
        if each.columns:
            shown = show(product_of(1, each.columns))
            raise RefusedError(f"what is read of the state is scaled by the vector `{shown}`")
        query = product_of(each.number, each.scalars, each.core.query)
        keys.setdefault(each.rows, ([], []))[1].append(query)
    if len(keys) > 1:
        shown = " and ".join(f"`{show(product_of(1, each))}`" for each in keys)
        raise RefusedError(f"it is corrected along several keys, {shown}")
    for each in plain:
        if not (each.rows and each.columns):
            shown = show(product_of(each.number, each.scalars, each.rows, each.columns))
            raise RefusedError(f"`{shown}` is not an outer product")
        value = product_of(each.number, each.scalars, each.columns)
        keys.setdefault(each.rows, ([], []))[0].append(value)
    if not keys:
        raise RefusedError("nothing is written")
    return tuple(
        Write(
            product_of(1, key),
            total_of(values) if values else None,
            total_of(queries) if queries else None,
        )
        for key, (values, queries) in keys.items()
    )


def _decay(parts: list[Expr]) -> Expr | None:
    """Return what a state is multiplied by; None for 1."""
    if not parts:
        return Number(0, "0")
    made = total_of(parts)
    return None if made == Number(1) else made


def _read(step: Memory | Sum) -> set[str]:
    """Return the names that a step reads, but for its own readings."""
    exprs = [step.decay]
    if isinstance(step, Sum):
        exprs.append(step.added)
    else:
        exprs += [each.query for each in step.readings]
        exprs += [part for each in step.writes for part in (each.key, each.value, each.query)]
    return {name for expr in exprs if expr is not None for name in names(expr)}


@contextmanager
def _statement(name: str) -> Iterator[None]:
    """Name the statement in whatever is refused."""
    try:
        yield
    except RefusedError as refused:
        raise RefusedError(f"`{name} <- …`: {refused}") from None
