"""Printing hooks: the device functions that turn a skeleton into one attention.

Every expression of a spec becomes a Triton function, its derivatives too. Tensors are read
through T, a tuple of pointers, at offsets made of b, h, i, j and sizes; a read that a ragged
tile could carry outside the tensor is masked.

    s - slope[h] * abs(i - j)        @triton.jit
                                     def _gemma_score(s, b, h, i, j, n, m, seen, T):
                                         slope = read(T[0] + h)
                                         return s - slope * tl.abs(i - j)
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from keyword import iskeyword

from ..grammar.derive import derivative
from ..grammar.dialect import write
from ..grammar.expr import fold, names, rebuild
from ..grammar.functions import FUNCTIONS
from ..grammar.syntax import Binary, Call, Expr, Index, Name, Number, walk
from .spec import TRUE, Attend, Tensor, index_names, is_whole, learned_reads

_PAIR = ("b", "h", "i", "j", "n", "m", "seen", "T")
_ROW = ("b", "h", "i", "n", "m", "seen", "T")
_MASK = ("b", "h", "i", "j", "n", "m", "T")
_SUMS = ("sums", "raw", "s", "ds", "df", "visible", *_PAIR)
_ENDS = ("sums", "end", "total", *_ROW)
_FLOAT_ONLY = frozenset(
    {"exp", "log", "sqrt", "tanh", "sigmoid", "gelu", "silu", "softplus", "elu", "erf", "sin"}
    | {"cos", "floor"}
)
_TAKEN = frozenset({*_SUMS, *_ENDS, "tl", "triton", "read", "True", "False"})
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
    rows, columns = learned_sums(spec)
    for role, sums in (("row_pairs", rows), ("column_pairs", columns)):
        if text := printer.pair_sums(role, list(sums)):
            found[role] = text
    if text := printer.row_ends(list(rows)):
        found["row_ends"] = text
    return found


def learned_sums(spec: Attend) -> tuple[dict[str, str], dict[str, str]]:
    """Return the learned tensors summed over rows and over columns, each with its einsum.

    `t[i, h]` with a batch axis is `{"t": "bhi->bih"}`: what turns [b, H, n] into its gradient.
    """
    rows: dict[str, str] = {}
    columns: dict[str, str] = {}
    for tensor in spec.tensors:
        if (read := learned_reads(spec).get(tensor.name)) is None:
            continue
        indices = index_names(read)
        axis = "j" if "j" in indices else "i"
        target = "".join((*(("b",) if tensor.batched else ()), *indices))
        (columns if axis == "j" else rows)[tensor.name] = f"bh{axis}->{target}"
    return rows, columns


class _Printer:
    """Prints functions for one spec; holds no state between functions."""

    def __init__(self, spec: Attend, prefix: str) -> None:
        self.spec = spec
        self.prefix = prefix
        self.known = {tensor.name: tensor for tensor in spec.tensors}
        self.learned = learned_reads(spec)

    def function(
        self, role: str, params: tuple[str, ...], value: Expr, names_: Mapping[str, str]
    ) -> str:
        """Print `def {prefix}_{role}(params): return value`."""
        body = _Body(self.spec, names_)
        text = body.write(value)
        flat = role in ("score", "numerator") and "s" not in names(value)
        if flat:  # a value that the tile does not carry in: give it the tile's shape and type
            text = f"tl.zeros_like(s) + ({text})"
        return self._define(role, params, [*body.lines, _wrapped("return ", text)])

    def pair_sums(self, role: str, tensors: list[str]) -> str:
        """Print the hook that adds a tile's share to the gradient of each tensor, or ''."""
        lines: list[str] = []
        sums: list[str] = []
        score, numerator = _Body(self.spec, {"s": "raw"}), _Body(self.spec, {}, "_f")
        for at, name in enumerate(tensors):
            read = self.learned[name]
            terms: list[str] = []
            if (by := derivative(self.spec.score, read)) != _ZERO:
                terms.append(_product("ds", score.write(by)))
            if self.spec.numerator is not None:
                by = derivative(self.spec.numerator, read)
                terms += [] if by == _ZERO else [_product("df", numerator.write(by))]
            if not terms:
                sums.append(f"sums[{at}]")
                continue
            lines.append(_wrapped(f"d_{name} = ", " + ".join(terms)))
            sums.append(f"sums[{at}] + tl.sum(tl.where(visible, d_{name}, 0.0), 1)")
        if not lines:
            return ""
        lines = [*score.lines, *numerator.lines, *lines, _tuple(sums)]
        return self._define(role, _SUMS, lines)

    def row_ends(self, tensors: list[str]) -> str:
        """Print the hook that adds the share of `extra`, or of the denominator, or ''."""
        value = self.spec.extra if self.spec.exponential else self.spec.denominator
        if value is None:
            return ""
        body = _Body(self.spec, {"sum": "total"})
        sums: list[str] = []
        for at, name in enumerate(tensors):
            by = derivative(value, self.learned[name])
            share = "" if by == _ZERO else f" + {_product('end', body.write(by))}"
            sums.append(f"sums[{at}]{share}")
        if not any("end" in each for each in sums):
            return ""
        return self._define("row_ends", _ENDS, [*body.lines, _tuple(sums)])

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
        self.lines: list[str] = []

    def write(self, expr: Expr) -> str:
        """Return the text of an expression; what it would say twice gets a line of its own."""
        expr = _floated(expr, self.spec)
        while (twice := _said_twice(expr)) is not None:
            stem = twice.function if isinstance(twice, Call) else "part"
            name = self._fresh(stem, ())
            text = write(twice, "triton", self._leaf)
            self.lines.append(_wrapped(f"{name} = ", text))
            self.bound[twice] = name
            expr = _replaced(expr, twice, Name(name))
        return write(expr, "triton", self._leaf)

    def _leaf(self, leaf: Name | Index) -> str:
        base = leaf.base if isinstance(leaf, Index) else leaf
        assert isinstance(base, Name), "obstacle() lets only named tensors through"
        if base.id not in self.known:
            return self.renamed.get(base.id, base.id)
        if leaf not in self.bound:
            at, tensor = self.known[base.id]
            items = leaf.items if isinstance(leaf, Index) else ()
            offset, inside = self._place(tensor, items)
            place = f"T[{at}] + {offset}" if offset else f"T[{at}]"
            name = self._fresh(tensor.name, index_names(leaf))
            self.lines.append(_wrapped(f"{name} = ", f"read({place}{inside})"))
            self.bound[leaf] = name
        return self.bound[leaf]

    def _fresh(self, tensor: str, indices: tuple[str, ...]) -> str:
        """`doc_i` for doc[i]; numbered when the index is no plain name, or the name is taken."""
        plain = "_".join((tensor, *indices)) if all(indices) else f"{tensor}_at"
        name, number = plain + self.ending, 2
        while name in _TAKEN or iskeyword(name) or name in self.bound.values():
            name, number = f"{plain}{self.ending}_{number}", number + 1
        return name

    def _place(self, tensor: Tensor, items: tuple[Expr, ...]) -> tuple[str, str]:
        """Return the offset of a read, rows last, and the condition that keeps it inside."""
        offset, tests = ("b" if tensor.batched else ""), []
        wide = {"n", "m"} <= set(tensor.shape) and not tensor.batched
        for item, size in zip(items, tensor.shape, strict=True):
            text = write(item, "triton", self._leaf)
            plain = isinstance(item, Name | Number)
            if not plain:
                tests.append(f"({text} >= 0)")
            if not (isinstance(item, Number) or (item == Name("h") and isinstance(size, int))):
                tests.append(f"({text} < {size})")
            text = text if plain else f"({text})"
            if wide and not offset:
                text = f"tl.cast({text}, tl.int64)"
            rows = f"({offset})" if " " in offset else offset
            offset = f"{rows} * {size} + {text}" if offset else text
        if not tests:
            return offset, ""
        return offset, ", " + (tests[0][1:-1] if len(tests) == 1 else " & ".join(tests))


def _floated(expr: Expr, spec: Attend) -> Expr:
    """Make whole arguments of float functions floats: Triton refuses `tl.exp` of an integer."""
    expr = expr if isinstance(expr, Index) else rebuild(expr, lambda each: _floated(each, spec))
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


def _wrapped(head: str, text: str) -> str:
    """`head text` on one line, or broken at spaces inside parentheses."""
    if len(head) + len(text) + 4 <= _WIDTH:
        return head + text
    lines = textwrap.wrap(text, _WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return f"{head}(\n" + textwrap.indent("\n".join(lines), "    ") + "\n)"
