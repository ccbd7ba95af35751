"""What a sequential kernel computes, as data: a recurrence that runs token by token.

    The state space of Mamba, four heads with sixteen features, eight numbers for each feature:

    Scan(
        heads=4, value_dim=16,
        streams=(Stream("time", 16), Stream("v", 16), Stream("k", 8), Stream("q", 8)),
        tensors=(Tensor("rate", (4, 16, 8), differentiable=True),),
        states=(State("H", (16, 8)),),
        statements=(
            ("H", parse_expression("exp(-exp(rate[h]) * time) * H + outer(time * v, k)")),
            ("o", parse_expression("H @ q")),
        ),
    )

Statements run top to bottom for every token and head; a name that is no state lasts for the
token. Streams are numbers or vectors of the head. `t[h]` is what a tensor holds for the head, `t[]`
a tensor that all heads share; as syntax, `Index(Name("t"), ())`. `obstacle` says, in words
fit for `headloom explain`, why a kernel cannot carry a scan.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..grammar.syntax import Expr
from .spec import Tensor
from .tape import Inputs, RefusedError, Shape, Tape, taped, volume

# Numbers that a program may carry from token to token: 160 KiB of the 256 KiB of registers that
# a multiprocessor has. Near the limit the backward spills: up to 1.4 KB a thread at 128 by 128.
ROOM = 40960
BEGINS, IDLE = 1, 2  # marks of tokens, 0 for all others


@dataclass(frozen=True, slots=True)
class Stream:
    """What every token brings: a number for each head where `size` is None, or a vector."""

    name: str
    size: int | None


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered, for each head; `initial` is where a document begins it.

    `levels` says how many a state is kept in, 0 for none: no kernel carries such a state.
    """

    name: str
    shape: Shape
    initial: float = 0.0
    levels: int = 0


@dataclass(frozen=True, slots=True)
class Scan:
    """One recurrence. The statement of the name `o` is the output, a vector of `value_dim`.

    Tokens may be marked: where one `BEGINS`, every state starts anew; an `IDLE` one leaves them
    as they are.
    """

    heads: int
    value_dim: int
    streams: tuple[Stream, ...]
    states: tuple[State, ...]
    statements: tuple[tuple[str, Expr], ...]
    tensors: tuple[Tensor, ...] = ()
    causal: bool = True


def obstacle(scan: Scan) -> str | None:
    """Return why no sequential kernel can carry the scan, or None."""
    if not scan.causal:
        return "every token is taken up before the first is answered (bidirectional)"
    if not scan.streams:
        return "it reads no stream"
    if not scan.states:
        return "it keeps no state"
    for state in scan.states:
        if state.levels:
            return f"`{state.name}` is kept in levels"
    for each in scan.tensors:
        if each.batched or not all(isinstance(size, int) for size in each.shape):
            return f"`{each.name}` is no tensor of fixed size"
    try:
        tape = tape_of(scan)
    except RefusedError as refused:
        return str(refused)
    carried = carries(scan, tape)
    if carried > ROOM:
        return (
            f"{carried} numbers would be carried from token to token: the states, the "
            f"tensors and the gradients of both; there is room for {ROOM}"
        )
    return None


def tape_of(scan: Scan) -> Tape:
    """Return the operations of one token. Raises `RefusedError` for what no kernel carries."""
    sizes = {each.name: tuple(int(size) for size in each.shape) for each in scan.tensors}
    inputs = Inputs(
        streams={each.name: () if each.size is None else (each.size,) for each in scan.streams},
        tensors=sizes,
        states={each.name: each.shape for each in scan.states},
        heads=scan.heads,
        output=(scan.value_dim,),
    )
    return taped(scan.statements, inputs)


def carries(scan: Scan, tape: Tape) -> int:
    """Return how many numbers the backward carries: states, tensors, the gradients of both."""
    learned = {each.name for each in scan.tensors if each.differentiable}
    shapes = [shape for each in scan.states for shape in (each.shape, each.shape)]
    for name, per_head in tape.tensors:
        shape = tape.shapes[tape.tensors[name, per_head]]
        shapes += [shape] * (1 + (name in learned))
    return sum(volume(each) for each in shapes)


def warps(tape: Tape) -> int:
    """Return how many warps a program has: a thread holds 8 numbers of the largest value.

    No more than 8 warps: with 16, a thread has half the registers, and more spills (`aot`
    measures it).
    """
    largest = max(volume(each) for each in (*tape.shapes.values(), *(op.wide for op in tape.ops)))
    return min(max(largest // (32 * 8), 1), 8)
