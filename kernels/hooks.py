"""Printing hooks: the device functions that turn a skeleton into one attention.

Every expression of a spec becomes a Triton function, its derivatives too. Tensors are read
through T, a tuple of pointers, at offsets made of b, h, i, j and sizes; a read that a ragged
tile could carry outside the tensor is masked, and an index that might leave its axis takes
the nearest end. Gradients that are scattered are added through Grads, a tuple like T.

    s - slope[h] * abs(i - j)        @triton.jit
                                     def _gemma_score(s, b, h, i, j, n, m, seen, T):
                                         slope = read(T[0] + h)
                                         return s - slope * tl.abs(i - j)
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from keyword import iskeyword

from ..grammar.derive import derivative
from ..grammar.dialect import write
from ..grammar.expr import fold, names, rebuild
from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Expr, Index, Name, Number, Unary, walk
from .places import on_own_axis, surely_inside
from .shares import Share, scattered, shares
from .spec import TRUE, Attend, Tensor, index_names, is_whole

_PAIR = ("b", "h", "i", "j", "n", "m", "seen", "T")
_ROW = ("b", "h", "i", "n", "m", "seen", "T")
_MASK = ("b", "h", "i", "j", "n", "m", "T")
_TILE = ("raw", "s", "ds", "df", "visible", *_PAIR)
_SUMS = ("sums", *_TILE)
_ENDS = ("sums", "end", "total", *_ROW)
_ROW_SCATTER = ("sums", "total", "Grads", *_ROW)
_COLUMN_SCATTER = ("sums", "Grads", "b", "h", "j", "n", "m", "T")
_FLOAT_ONLY = frozenset(
    {
        "exp",
        "log",
        "log2",
        "sqrt",
        "tanh",
        "sigmoid",
        "log_sigmoid",
        "gelu",
        "silu",
        "softplus",
        "elu",
        "erf",
        "sin",
    }
    | {"cos", "floor"}
)
_TAKEN = frozenset({*_SUMS, *_ENDS, "Grads", "tl", "triton", "True", "False"}) | {
    "read",
    "nearest",
    "scatter",
}
_ZERO = Number(0)
_WIDTH = 96


def print_hooks(spec: Attend, prefix: str) -> dict[str, str]:
    """Return the text of each hook the spec needs, by role; `prefix` starts its name."""
    printer = _Printer(spec, prefix)
    found: dict[str, str] = {}

    def add(role: str, params: tuple[str, ...], value: Expr, names: Mapping[str, str]) -> None:
        found[role] = printer.function(role, params, value, names)

    score, s = fold(spec.score), Name("s")
    if score != s:
        add("score", ("s", *_PAIR), score, {})
        if (by_s := derivative(score, s)) != Number(1):
            add("score_by_s", ("s", *_PAIR), by_s, {})
    if (mask := fold(spec.mask)) != TRUE:
        add("mask", _MASK, mask, {})
    if spec.extra is not None:
        add("extra", _ROW, fold(spec.extra), {})
    if spec.numerator is not None:
        add("numerator", ("s", *_PAIR), fold(spec.numerator), {})
        add("numerator_by_s", ("s", *_PAIR), derivative(spec.numerator, s), {})
    if spec.denominator is not None:
        total = {"sum": "total"}
        add("denominator", ("total", *_ROW), fold(spec.denominator), total)
        by_sum = derivative(spec.denominator, Name("sum"))
        add("denominator_by_sum", ("total", *_ROW), by_sum, total)
    of_rows, of_columns = shares(spec, "rows"), shares(spec, "columns")
    printed = {
        "row_pairs": printer.pair_sums("row_pairs", of_rows),
        "column_pairs": printer.pair_sums("column_pairs", of_columns),
        "row_ends": printer.row_ends(of_rows),
        "row_scatter": printer.scatter_sums("row_scatter", _ROW_SCATTER, "i < n", of_rows),
        "column_scatter": printer.scatter_sums(
            "column_scatter", _COLUMN_SCATTER, "j < m", of_columns
        ),
        "pair_scatter": printer.pair_scatter(shares(spec, "pairs")),
    }
    return found | {role: text for role, text in printed.items() if text}


class _Printer:
    """Prints functions for one spec; holds no state between functions."""

    def __init__(self, spec: Attend, prefix: str) -> None:
        self.spec = spec
        self.prefix = prefix
        self.buffers = scattered(spec)

    def function(
        self, role: str, params: tuple[str, ...], value: Expr, names_: Mapping[str, str]
    ) -> str:
        """Print `def {prefix}_{role}(params): return value`."""
        body = _Body(self.spec, names_)
        text = body.write(value)
        flat = role in ("score", "numerator") and "s" not in names(value)
        if flat:  # a value that the tile does not carry in: give it the tile's shape and type
            text = f"tl.zeros_like(s) + ({text})"
        return self._define(role, params, [*body.lines, wrapped("return ", text)])

    def pair_sums(self, role: str, sums_of: list[Share]) -> str:
        """Print the hook that adds a tile's part to the sum of each share, or ''."""
        lines: list[str] = []
        sums: list[str] = []
        score, numerator = self._bodies()
        for at, share in enumerate(sums_of):
            terms = self._terms(share, score, numerator)
            if not terms:
                sums.append(f"sums[{at}]")
                continue
            name = score.named(f"d_{share.tensor.name}")
            lines.append(wrapped(f"{name} = ", " + ".join(text for _, text in terms)))
            sums.append(f"sums[{at}] + tl.sum(tl.where(visible, {name}, 0.0), 1)")
        if not lines:
            return ""
        lines = [*score.lines, *numerator.lines, *lines, _tuple(sums)]
        return self._define(role, _SUMS, lines)

    def row_ends(self, sums_of: list[Share]) -> str:
        """Print the hook that adds what `extra`, or the denominator, gives each share, or ''."""
        value = self.spec.extra if self.spec.exponential else self.spec.denominator
        if value is None:
            return ""
        body = _Body(self.spec, {"sum": "total"})
        sums: list[str] = []
        for at, share in enumerate(sums_of):
            by = derivative(value, share.read)
            more = "" if by == _ZERO else f" + {_product('end', body.write(by))}"
            sums.append(f"sums[{at}]{more}")
        if not any("end" in each for each in sums):
            return ""
        return self._define("row_ends", _ENDS, [*body.lines, _tuple(sums)])

    def scatter_sums(
        self, role: str, params: tuple[str, ...], inside: str, sums_of: list[Share]
    ) -> str:
        """Print the hook that adds finished sums to the gradients they scatter into, or ''."""
        body = _Body(self.spec, {"sum": "total"})
        lines = [
            self._scatter(share, body.place(share.read), f"sums[{at}]", inside)
            for at, share in enumerate(sums_of)
            if not share.einsum
        ]
        return self._define(role, params, [*body.lines, *lines]) if lines else ""

    def pair_scatter(self, each_pair: list[Share]) -> str:
        """Print the hook that adds a tile's derivatives to the gradients, pair by pair, or ''."""
        lines: list[str] = []
        score, numerator = self._bodies()
        for share in each_pair:
            terms = self._terms(share, score, numerator)
            if "s" not in names(share.read):  # then the score and the numerator read one place
                terms = [(score, " + ".join(text for _, text in terms))]
            for body, text in terms:
                name = body.named(f"d_{share.tensor.name}")
                place = body.place(share.read)
                lines.append(wrapped(f"{name} = ", text))
                lines.append(self._scatter(share, place, name, "visible"))
        if not lines:
            return ""
        return self._define(
            "pair_scatter", ("Grads", *_TILE), [*score.lines, *numerator.lines, *lines]
        )

    def _bodies(self) -> tuple[_Body, _Body]:
        """Return where derivatives of the score are written, and those of the numerator."""
        return _Body(self.spec, {"s": "raw"}), _Body(self.spec, {}, "_f")

    def _terms(self, share: Share, score: _Body, numerator: _Body) -> list[tuple[_Body, str]]:
        """Write what each pair gives a share: by the score, and by the numerator beside it."""
        terms: list[tuple[_Body, str]] = []
        if (by := derivative(self.spec.score, share.read)) != _ZERO:
            terms.append((score, _product("ds", score.write(by))))
        if self.spec.numerator is not None:
            by = derivative(self.spec.numerator, share.read)
            if by != _ZERO:
                terms.append((numerator, _product("df", numerator.write(by))))
        return terms

    def _scatter(self, share: Share, place: str, value: str, inside: str) -> str:
        at = self.buffers.index(share.tensor.name)
        text = f"Grads[{at}], {place or '0'}, {value}, {inside}"
        return f"scatter({text})" if len(text) + 16 <= _WIDTH else _broken("scatter", text)

    def _define(self, role: str, params: tuple[str, ...], lines: list[str]) -> str:
        head = f"@triton.jit\ndef {self.prefix}_{role}({', '.join(params)}):\n"
        return head + textwrap.indent("\n".join(lines), "    ") + "\n"


class _Body:
    """The lines of one hook: reads of tensors, bound to names in the order they are needed."""

    def __init__(self, spec: Attend, renamed: Mapping[str, str], ending: str = "") -> None:
        self.spec = spec
        self.renamed = renamed
        self.ending = ending
        self.known = {tensor.name: (at, tensor) for at, tensor in enumerate(spec.tensors)}
        self.bound: dict[Expr, str] = {}
        self.own: list[str] = []
        self.lines: list[str] = []

    def write(self, expr: Expr) -> str:
        """Return the text of an expression; what it would say twice gets a line of its own."""
        expr = _floated(expr, self.spec)
        while (twice := _said_twice(expr)) is not None:
            if twice not in self.bound:
                name = self._fresh(twice.function if isinstance(twice, Call) else "part", ())
                text = write(twice, "triton", self._leaf)
                self.lines.append(wrapped(f"{name} = ", text))
                self.bound[twice] = name
            expr = _replaced(expr, twice, Name(self.bound[twice]))
        return write(expr, "triton", self._leaf)

    def _leaf(self, leaf: Name | Index) -> str:
        base = leaf.base if isinstance(leaf, Index) else leaf
        assert isinstance(base, Name), "obstacle() lets only named tensors through"
        if base.id not in self.known:
            return self.renamed.get(base.id, base.id)
        if leaf not in self.bound:
            at, tensor = self.known[base.id]
            items = leaf.items if isinstance(leaf, Index) else ()
            texts = [write(item, "triton", self._leaf) for item in items]
            offset, inside = self._place(tensor, items, texts)
            place = f"T[{at}] + {offset}" if offset else f"T[{at}]"
            name = self._fresh(tensor.name, index_names(leaf))
            self.lines.append(wrapped(f"{name} = ", f"read({place}{inside})"))
            self.bound[leaf] = name
        return self.bound[leaf]

    def _fresh(self, tensor: str, indices: tuple[str, ...]) -> str:
        """`doc_i` for doc[i]; numbered when the index is no plain name, or the name is taken."""
        plain = "_".join((tensor, *indices)) if all(indices) else f"{tensor}_at"
        return self._free(plain + self.ending)

    def _free(self, plain: str) -> str:
        name, number = plain, 2
        taken = {*_TAKEN, *self.bound.values(), *self.own}
        while name in taken or iskeyword(name):
            name, number = f"{plain}_{number}", number + 1
        return name

    def named(self, plain: str) -> str:
        """Return a name like `plain` that nothing else in this body has."""
        self.own.append(self._free(plain + self.ending))
        return self.own[-1]

    def place(self, read: Index | Name) -> str:
        """Return the offset of a read in a tensor of its own shape, '' for the only element."""
        base = read.base if isinstance(read, Index) else read
        assert isinstance(base, Name), "obstacle() lets only named tensors through"
        items = read.items if isinstance(read, Index) else ()
        return self._place(self.known[base.id][1], items, [self.write(each) for each in items])[0]

    def _place(self, tensor: Tensor, items: tuple[Expr, ...], texts: list[str]) -> tuple[str, str]:
        """Return the offset of a read, rows last, and the condition that keeps it inside."""
        offset = first = "b" if tensor.batched else ""  # one index alone needs no parentheses
        tests: list[str] = []
        wide = {"n", "m"} <= set(tensor.shape) and not tensor.batched
        for item, size, written in zip(items, tensor.shape, texts, strict=True):
            text = self._index(item, size, written)
            if isinstance(size, str) and on_own_axis(item, size, self.spec.heads):
                tests.append(f"({text} < {size})")
            if wide and not offset:
                text = f"tl.cast({text}, tl.int64)"
            rows = f"({offset})" if " + " in offset and offset != first else offset
            first = first or text
            offset = f"{rows} * {size} + {text}" if offset else text
        if not tests:
            return offset, ""
        return offset, ", " + (tests[0][1:-1] if len(tests) == 1 else " & ".join(tests))

    def _index(self, item: Expr, size: int | str, text: str) -> str:
        """Write one index: a number known now, a place that is surely there, or the nearest."""
        item = fold(item)
        if isinstance(item, Unary) and isinstance(item.operand, Number):
            item = Number(-item.operand.value)
        if isinstance(item, Number):
            value = max(math.floor(item.value), 0)
            if isinstance(size, str) and value:
                return f"tl.minimum({value}, {size} - 1)"
            return str(min(value, size - 1) if isinstance(size, int) else value)
        if surely_inside(item, size, self.spec.heads):
            return text if isinstance(item, Name) else f"({text})"
        return f"nearest({text}, {size})"


def _floated(expr: Expr, spec: Attend) -> Expr:
    """Make whole arguments of float functions floats: Triton refuses `tl.exp` of an integer."""
    expr = rebuild(expr, lambda each: _floated(each, spec))
    one = Number(1.0)
    match expr:
        case Call(function, (arg,)) if function in _FLOAT_ONLY and is_whole(arg, spec):
            return replace(expr, args=(Binary("*", arg, one),))
        case Binary("**", base, exponent) if is_whole(base, spec) and not (
            isinstance(base, Number) or (isinstance(exponent, Number) and is_whole(exponent, spec))
        ):
            return replace(expr, left=Binary("*", base, one))
        case _:
            return expr


def _said_twice(expr: Expr) -> Expr | None:
    """Return the smallest call, or operand of a text that repeats it, that is printed twice."""
    counted: Counter[Expr] = Counter()
    for node in walk(expr):
        match node:
            case Call("where" | "abs" | "min" | "max"):
                pass
            case Call(function, args):
                counted[node] += 1
                for at, arg in enumerate(args):
                    if FUNCTIONS[function].triton.count(f"{{{at}}}") > 1:
                        counted[arg] += 2
            case Binary("**", base, Number(value)) if isinstance(value, int):
                counted[base] += 2
            case Binary("//" | "%", left, right):
                counted.update({left: 2, right: 2})
    repeated = (
        node for node, times in counted.items() if times > 1 and isinstance(node, Call | Binary)
    )
    return min(repeated, key=lambda node: len(list(walk(node))), default=None)


def _replaced(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    return rebuild(expr, lambda each: _replaced(each, old, new))


def _product(left: str, right: str) -> str:
    if right == "1":
        return left
    return f"{left} * {right}" if right.isidentifier() else f"{left} * ({right})"


def _tuple(parts: list[str]) -> str:
    if len(parts) == 1 and len(parts[0]) < _WIDTH - 16:
        return f"return ({parts[0]},)"
    return "return (\n" + "".join(f"    {part},\n" for part in parts) + ")"


def wrapped(head: str, text: str) -> str:
    """`head text` on one line, or broken at spaces inside parentheses."""
    return head + text if len(head) + len(text) + 4 <= _WIDTH else _broken(head, text)


def _broken(head: str, text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return f"{head}(\n" + textwrap.indent("\n".join(lines), "    ") + "\n)"
