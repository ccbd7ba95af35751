"""The statements of one token as a list of simple operations, to be run forwards or backwards.

    o <- q @ S + w * v       o_read = Σ over rows of a · b        a = q along rows, b = S
                             o      = a + b · c                   a = o_read, b = w, c = v

Each operation is an elementwise pattern over earlier values, which may lie along the rows or
the columns of a matrix, and perhaps a sum over axes of what comes out. That is all that a
derivative needs: the gradient of a part is the gradient of the operation, times the derivative
of the pattern, summed over the axes that the part does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword

from ..grammar.expr import fold, rebuild, substitute
from ..grammar.functions import FUNCTIONS
from ..grammar.parse import parse_expression
from ..grammar.show import show
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary

Shape = tuple[int, ...]

_NOTHING = Number(0)

# The root of a sum of squares, with the derivative 0 at 0, as torch's norm has it.
_ROOT = "where(a == 0, 0, sqrt(where(a == 0, 1, a)))"


class RefusedError(ValueError):
    """No sequential kernel can carry this; the message says what."""


@dataclass(frozen=True, slots=True)
class Part:
    """A value that a pattern reads, where `along` is `rows` or `columns` if it is a vector
    that meets a matrix: constant along the other axis."""

    value: str
    along: str = ""


@dataclass(frozen=True, slots=True)
class Op:
    """`name` is the pattern over `part 0` …, of the shape `wide`, summed over the axes `over`."""

    name: str
    pattern: Expr
    parts: tuple[Part, ...]
    wide: Shape
    over: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        return tuple(size for at, size in enumerate(self.wide) if at not in self.over)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What statements read, by name: shapes of a head, but for tensors, which come whole."""

    streams: Mapping[str, Shape]
    tensors: Mapping[str, Shape]
    states: Mapping[str, Shape]
    heads: int
    output: Shape


@dataclass(frozen=True, slots=True)
class Tape:
    """The operations of a token in order, and the variables of what comes in and goes out.

    `tensors` are the reads of tensors: by name, and whether of the head alone.
    """

    ops: tuple[Op, ...]
    shapes: Mapping[str, Shape]
    streams: Mapping[str, str]
    tensors: Mapping[tuple[str, bool], str]
    states: Mapping[str, str]
    finals: Mapping[str, str]
    output: str

    def needed(self, roots: Iterable[str]) -> tuple[Op, ...]:
        """Return the operations that some values need, in order."""
        wanted, kept = set(roots), []
        for op in reversed(self.ops):
            if op.name in wanted:
                kept.append(op)
                wanted |= {part.value for part in op.parts}
        return tuple(reversed(kept))

    def reaches(self, sources: Iterable[str]) -> set[str]:
        """Return the values that depend on others, these included."""
        found = set(sources)
        for op in self.ops:
            if any(part.value in found for part in op.parts):
                found.add(op.name)
        return found


class Variables:
    """Names for a text: each is given once, and none is a keyword or otherwise taken."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def new(self, name: str) -> str:
        plain = re.sub(r"\W", "_", name)
        plain = plain if plain[:1].isalpha() or plain[:1] == "_" else f"_{plain}"
        made, number = plain, 2
        while made in self._taken or iskeyword(made):
            made, number = f"{plain}_{number}", number + 1
        self._taken.add(made)
        return made


# What the text of a kernel calls its own.
OWN = frozenset({
    "tl", "triton", "program", "head", "b", "h", "n", "t", "chunk", "chunks", "start", "stop",
    "step", "Streams", "strides", "groups", "Tensors", "Starts", "Marks", "O", "o_strides",
    "Lasts", "Kept", "DO", "DLasts", "DStreams", "DTensors", "DStarts", "Scratch", "mark", "each",
    "range", "row", "o_at", "do_at", "do_next", "d_o", "back", "do_strides", "EVERY",
})  # fmt: skip


def padded(size: int) -> int:
    """Return how long an axis is in registers: a power of two."""
    return 1 << (size - 1).bit_length()


def volume(shape: Shape) -> int:
    """Return how many numbers a value has in registers."""
    total = 1
    for size in shape:
        total *= padded(size)
    return total


def taped(statements: Iterable[tuple[str, Expr]], inputs: Inputs) -> Tape:
    """Return the tape of a token's statements. Raises `RefusedError`."""
    return _Recorder(inputs).run(tuple(statements))


@dataclass
class _Recorder:
    inputs: Inputs
    variables: Variables = field(default_factory=lambda: Variables(OWN))
    shapes: dict[str, Shape] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    known: dict[object, str] = field(default_factory=dict)  # operations that were made before
    scope: dict[str, str] = field(default_factory=dict)
    tensors: dict[tuple[str, bool], str] = field(default_factory=dict)
    statement: str = ""

    def run(self, statements: tuple[tuple[str, Expr], ...]) -> Tape:
        given = {**self.inputs.streams, **self.inputs.states}
        self.scope = {name: self._variable(name, shape) for name, shape in given.items()}
        before = dict(self.scope)
        fixed = {**self.inputs.states, "o": self.inputs.output}
        for name, expr in statements:
            self.statement = name
            made = self._value(fold(expr), name)
            if name in fixed and self.shapes[made] != fixed[name]:
                made = self._filled(made, fixed[name], name)
            self.scope[name] = made
        if "o" not in self.scope:
            raise RefusedError("no statement writes `o`")
        return Tape(
            ops=tuple(self.ops),
            shapes=self.shapes,
            streams={name: before[name] for name in self.inputs.streams},
            tensors=self.tensors,
            states={name: before[name] for name in self.inputs.states},
            finals={name: self.scope[name] for name in self.inputs.states},
            output=self.scope["o"],
        )

    # values

    def _variable(self, name: str, shape: Shape) -> str:
        if len(shape) > 2:
            raise RefusedError(f"`{name}` has {len(shape)} dimensions for each head")
        made = self.variables.new(name)
        self.shapes[made] = shape
        return made

    def _value(self, expr: Expr, name: str = "") -> str:
        """Return the variable of an expression, recording what makes it."""
        parts: list[tuple[Part, Shape]] = []
        pattern = self._pattern(expr, parts)
        if pattern == Name("part 0") and len(parts) == 1 and parts[0][0].along == "":
            return parts[0][0].value
        return self._made(pattern, parts, name)

    def _made(
        self, pattern: Expr, parts: list[tuple[Part, Shape]], name: str = "", *, total: bool = False
    ) -> str:
        """Record an operation, and say what it is called; `total` sums all there is."""
        wide = self._wide(parts)
        over = tuple(range(len(wide))) if total else ()
        return self._record(pattern, self._lying(parts, wide), wide, over, name)

    def _record(
        self, pattern: Expr, parts: tuple[Part, ...], wide: Shape, over: tuple[int, ...], name: str
    ) -> str:
        if (same := (pattern, parts, wide, over)) in self.known:
            return self.known[same]
        op = Op(self.variables.new(name or f"{self.statement}_part"), pattern, parts, wide, over)
        self.ops.append(op)
        self.shapes[op.name] = op.shape
        self.known[same] = op.name
        return op.name

    def _wide(self, parts: list[tuple[Part, Shape]]) -> Shape:
        wide: Shape = ()
        for _, shape in parts:
            less, more = sorted((wide, shape), key=len)
            if more[: len(less)] != less:
                raise RefusedError(
                    f"`{self.statement} <- …` meets {list(wide)} and {list(shape)} elementwise"
                )
            wide = more
        return wide

    def _lying(self, parts: list[tuple[Part, Shape]], wide: Shape) -> tuple[Part, ...]:
        """Return the parts, with vectors that meet a matrix lying along its rows."""
        return tuple(
            Part(part.value, "rows")
            if not part.along and (len(self.shapes[part.value]), len(wide)) == (1, 2)
            else part
            for part, _ in parts
        )

    def _filled(self, value: str, shape: Shape, name: str) -> str:
        own = self.shapes[value]
        if shape[: len(own)] != own:
            raise RefusedError(f"`{name}` is {list(shape)}, and is written {list(own)}")
        along = "rows" if (len(own), len(shape)) == (1, 2) else ""
        return self._record(Name("part 0"), (Part(value, along),), shape, (), name)

    # patterns

    def _pattern(self, expr: Expr, parts: list[tuple[Part, Shape]]) -> Expr:
        """Return the elementwise part of an expression over `part 0` …, adding to `parts`."""
        match expr:
            case Number() | Name("true" | "false"):
                return expr
            case Name() | Index():
                return self._below(self._leaf(expr), parts)
            case Call("outer", (left, right)):
                a, b = self._value(left), self._value(right)
                shape = self._vector(a) + self._vector(b)
                rows = self._below(a, parts, "rows", shape)
                return Binary("*", rows, self._below(b, parts, "columns", shape))
            case Binary("@", left, right) | Call("dot", (left, right)):
                return self._below(self._contracted(left, right, expr), parts)
            case Call("sum" | "mean" | "norm" as name, (arg,)):
                return self._below(self._reduced(name, arg), parts)
            case Binary("//" | "%" as op, left, right):
                if not isinstance(right, Number) or right.value <= 0:
                    raise RefusedError(
                        f"`{show(expr)}`: `{op}` needs a positive number on its right"
                    )
                return self._below(self._divided(op, left, right), parts)
            case Binary("**", Number(value), exponent) if value <= 0:
                raise RefusedError(f"`{show(expr)}`: the base of a varying power is not positive")
            case Binary("**", base, exponent):
                lifted = self._single(base, parts)
                return Binary("**", lifted, self._pattern(exponent, parts))
            case Call(name, args, ()) if name in FUNCTIONS and not FUNCTIONS[name].boolean:
                written = FUNCTIONS[name].triton
                visited = (
                    self._single(arg, parts)
                    if written.count(f"{{{at}}}") > 1
                    else self._pattern(arg, parts)
                    for at, arg in enumerate(args)
                )
                return Call(name, tuple(visited))
            case Unary() | Binary() | Compare():
                return rebuild(expr, lambda each: self._pattern(each, parts))
        raise RefusedError(f"`{show(expr)}` is nothing that a sequential kernel computes")

    def _below(
        self,
        value: str,
        parts: list[tuple[Part, Shape]],
        along: str = "",
        shape: Shape | None = None,
    ) -> Expr:
        part = (Part(value, along), self.shapes[value] if shape is None else shape)
        if part not in parts:
            parts.append(part)
        return Name(f"part {parts.index(part)}")

    def _single(self, expr: Expr, parts: list[tuple[Part, Shape]]) -> Expr:
        """Return a pattern that may be written twice: a name or a number."""
        if isinstance(expr, Number):
            return expr
        return self._below(self._value(expr), parts)

    def _leaf(self, expr: Name | Index) -> str:
        match expr:
            case Name(id) if id in self.scope:
                return self.scope[id]
            case Index(Name(id), items) if id in self.inputs.tensors and len(items) <= 1:
                if (id, bool(items)) not in self.tensors:
                    shape = self.inputs.tensors[id]
                    if items and shape[:1] != (self.inputs.heads,):
                        raise RefusedError(f"`{id}[h]` is read by the head, and is {list(shape)}")
                    made = self._variable(id, shape[1:] if items else shape)
                    self.tensors[id, bool(items)] = made
                return self.tensors[id, bool(items)]
        raise RefusedError(f"`{show(expr)}` is not known in a sequential kernel")

    # sums

    def _vector(self, value: str) -> Shape:
        if len(self.shapes[value]) != 1:
            raise RefusedError(f"`{self.statement} <- …`: `outer` takes two vectors")
        return self.shapes[value]

    def _contracted(self, left: Expr, right: Expr, whole: Expr) -> str:
        a, b = self._value(left), self._value(right)
        wide: Shape
        match self.shapes[a], self.shapes[b]:
            case (d,), (e,) if d == e:
                parts, wide, axis = (Part(a), Part(b)), (d,), 0
            case (d,), (rows, columns) if d == rows:
                parts, wide, axis = (Part(a, "rows"), Part(b)), (rows, columns), 0
            case (rows, columns), (e,) if e == columns:
                parts, wide, axis = (Part(a), Part(b, "columns")), (rows, columns), 1
            case (_, _), (_, _):
                raise RefusedError(f"`{show(whole)}` multiplies a matrix by a matrix")
            case one, two:
                raise RefusedError(f"`{show(whole)}` contracts {list(one)} with {list(two)}")
        if a == b and parts[0] == parts[1]:
            return self._record(_product(0, 0), parts[:1], wide, (axis,), "")
        return self._record(_product(0, 1), parts, wide, (axis,), "")

    def _reduced(self, name: str, arg: Expr) -> str:
        if name == "norm":
            value = self._value(arg)
            if not self.shapes[value]:
                return self._value_of("abs(a)", value)
            squares = self._made(_product(0, 0), [(Part(value), self.shapes[value])], total=True)
            return self._value_of(_ROOT, squares)
        parts: list[tuple[Part, Shape]] = []
        pattern = self._pattern(arg, parts)
        count = 1
        for size in self._wide(parts):
            count *= size
        if name == "mean" and count > 1:
            pattern = Binary("*", pattern, Number(1 / count))
        return self._made(pattern, parts, total=True)

    def _divided(self, op: str, left: Expr, by: Number) -> str:
        """Record a rest or a quotient; a GPU divides a little wrong, which is put right."""
        value = self._value(left)
        rest = self._value_of("a - floor(a / c) * c", value, by)
        rest = self._value_of("where(a >= c, a - c, where(a < 0, a + c, a))", rest, by)
        return rest if op == "%" else self._value_of("floor((a - b) / c + 0.5)", value, by, rest)

    def _value_of(self, text: str, value: str, number: Expr = _NOTHING, other: str = "") -> str:
        """Record a formula of a value a, of another b of its shape, and of a number c."""
        names = {"a": Name("part 0"), "b": Name("part 1"), "c": number}
        parts = (Part(value), Part(other)) if other else (Part(value),)
        pattern = fold(substitute(parse_expression(text), names))
        return self._record(pattern, parts, self.shapes[value], (), "")


def _product(a: int, b: int) -> Expr:
    return Binary("*", Name(f"part {a}"), Name(f"part {b}"))
