"""A tape as lines of Triton: the values of a token, and the gradients of what they depend on.

    z <- a * z + k             z_2 = a * z + k
                               d_a = tl.sum(d_z * z, 0)        d_z_before = d_z * a

Padded lanes may hold anything: every operation keeps lanes apart, and every sum leaves them
out. Values and gradients are float32, of their full shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..grammar.derive import derivative
from ..grammar.dialect import write
from ..grammar.expr import names, rebuild
from ..grammar.syntax import Binary, Expr, Index, Name, Number
from .hooks import wrapped
from .tape import Op, Part, Shape, Tape, Variables, padded

_LIFTS = {"": "", "rows": "[:, None]", "columns": "[None, :]"}
_ZERO, _ONE = Number(0), Number(1)
_GRADIENT = Name("gradient")  # of an operation, before the derivative of its pattern


@dataclass
class Lanes:
    """The indices of axes, by size: `i_5`, and `in_5` where the axis is padded."""

    variables: Variables
    sizes: dict[int, str] = field(default_factory=dict)

    def index(self, size: int) -> str:
        """Return the variable of an axis's indices."""
        if size not in self.sizes:
            self.sizes[size] = self.variables.new(f"i_{size}")
            self.variables.new(f"in_{size}")
        return self.sizes[size]

    def inside(self, size: int) -> str:
        """Return the variable of what is inside an axis, '' where all of it is."""
        index = self.index(size)
        return "" if padded(size) == size else index.replace("i_", "in_", 1)

    def lines(self) -> list[str]:
        """Return the lines that make the variables."""
        made = []
        for size, index in sorted(self.sizes.items()):
            made.append(f"{index} = tl.arange(0, {padded(size)})")
            if inside := self.inside(size):
                made.append(f"{inside} = {index} < {size}")
        return made

    def offsets(self, shape: Shape) -> str:
        """Return the offsets of a value's elements in memory, '' for a number."""
        match shape:
            case ():
                return ""
            case (size,):
                return self.index(size)
        rows, columns = shape
        return f"{self.index(rows)}[:, None] * {columns} + {self.index(columns)}[None, :]"

    def mask(self, shape: Shape, over: Iterable[int] | None = None) -> str:
        """Return what is inside a value along some axes, all unless said; '' where all is."""
        axes = range(len(shape)) if over is None else over
        lifts = ("",) if len(shape) == 1 else ("[:, None]", "[None, :]")
        masks = [f"{inside}{lifts[at]}" for at in axes if (inside := self.inside(shape[at]))]
        return " & ".join(masks)


def zeros(shape: Shape) -> str:
    """Return zeros in the registers of a value."""
    sizes = ", ".join(str(padded(size)) for size in shape) + "," * (len(shape) == 1)
    return f"tl.full(({sizes}), 0.0, tl.float32)"


@dataclass
class Writer:
    """Writes the operations of a tape, and their gradients."""

    tape: Tape
    lanes: Lanes
    used: set[str] = field(default_factory=set)  # values that gradients read

    def forward(self, ops: Iterable[Op]) -> list[str]:
        """Return a line for each operation."""
        return [wrapped(f"{op.name} = ", self._made(op)) for op in ops]

    def _made(self, op: Op) -> str:
        text = self._pattern(op, op.pattern)
        covered = {at for part in op.parts for at in self._axes(part, op.wide)}
        if not op.parts and not op.wide:
            return f"tl.full((), {text}, tl.float32)"
        return self._summed(self._full(text, op.wide, covered), op.wide, op.over)

    def backward(
        self, upstream: Mapping[str, list[str]], sources: Iterable[str], variables: Variables
    ) -> tuple[list[str], dict[str, str]]:
        """Return the lines of all gradients, and the texts of those of `sources`.

        `upstream` are texts of the gradients that reach values from outside. A source that
        nothing depends on has none.
        """
        sources = list(sources)
        wanted = self.tape.reaches(sources)
        found = _Found(
            {name: [((), (), text) for text in texts] for name, texts in upstream.items()}
        )
        lines: list[str] = []

        def finished(name: str) -> str:
            text = self._total(found.terms.get(name, []))
            if not text or text.isidentifier():
                return text
            made = variables.new(f"d_{name}")
            lines.append(wrapped(f"{made} = ", text))
            return made

        for op in reversed(self.tape.ops):
            if op.name in wanted and (own := finished(op.name)):
                self._spread(op, own, wanted, found)
        return lines, {name: text for name in sources if (text := finished(name))}

    def _spread(self, op: Op, own: str, wanted: set[str], found: _Found) -> None:
        """Give the parts of an operation what its gradient means for them."""
        kept = {at for at in range(len(op.wide)) if at not in op.over}
        lift = ""
        if len(op.wide) == 2 and len(kept) == 1:
            lift = _LIFTS["rows" if 0 in kept else "columns"]
        for at, part in enumerate(op.parts):
            if part.value not in wanted:
                continue
            by = derivative(op.pattern, Name(f"part {at}"))
            if by == _ZERO:
                continue
            whole = _GRADIENT if by == _ONE else Binary("*", _GRADIENT, by)
            text = self._pattern(op, whole, f"{own}{lift}")
            read = [op.parts[int(each.removeprefix("part "))] for each in names(by)]
            self.used |= {each.value for each in read}
            covered = kept.union(*(self._axes(each, op.wide) for each in read))
            own_axes = self._axes(part, op.wide)
            gone = tuple(axis for axis in range(len(op.wide)) if axis not in own_axes)
            found.add(part.value, op.wide, gone, self._full(text, op.wide, covered))

    def _axes(self, part: Part, wide: Shape) -> set[int]:
        """Return along which axes of a pattern a part varies."""
        if part.along:
            return {0} if part.along == "rows" else {1}
        return set(range(len(wide))) if self.tape.shapes[part.value] else set()

    def _total(self, terms: list[tuple[Shape, tuple[int, ...], str]]) -> str:
        """Add the terms of a gradient, those that are summed alike before they are summed."""
        groups: dict[tuple[Shape, tuple[int, ...]], list[str]] = {}
        for wide, gone, text in terms:
            groups.setdefault((wide, gone) if gone else ((), ()), []).append(text)
        sums = [
            self._summed(" + ".join(texts), wide, gone) for (wide, gone), texts in groups.items()
        ]
        return " + ".join(sums)

    def _summed(self, text: str, wide: Shape, over: tuple[int, ...]) -> str:
        if not over:
            return text
        if mask := self.lanes.mask(wide, over):
            text = f"tl.where({mask}, {text}, 0.0)"
        return f"tl.sum({text})" if len(over) == len(wide) else f"tl.sum({text}, {over[0]})"

    @staticmethod
    def _full(text: str, wide: Shape, covered: set[int]) -> str:
        """Give a text the shape of a value, where it does not have it already."""
        return text if len(covered) == len(wide) else f"{zeros(wide)} + ({text})"

    def _pattern(self, op: Op, pattern: Expr, gradient: str = "") -> str:
        def leaf(each: Name | Index) -> str:
            assert isinstance(each, Name)
            if each == _GRADIENT:
                return gradient
            part = op.parts[int(each.id.removeprefix("part "))]
            return f"{part.value}{_LIFTS[part.along]}"

        return write(_floats(pattern), "triton", leaf)


@dataclass
class _Found:
    """The terms of gradients: the shape of each, the axes it is to be summed over, its text."""

    terms: dict[str, list[tuple[Shape, tuple[int, ...], str]]]

    def add(self, value: str, wide: Shape, gone: tuple[int, ...], text: str) -> None:
        self.terms.setdefault(value, []).append((wide, gone, text))


def _floats(expr: Expr) -> Expr:
    """Write whole numbers as floats, but for exponents: Triton takes no exp of an integer."""
    match expr:
        case Number(value):
            return replace(expr, value=float(value))
        case Binary("**", base, Number()):
            return replace(expr, left=_floats(base))
    return rebuild(expr, _floats)
