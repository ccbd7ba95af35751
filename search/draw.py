"""Filling the holes of a file: a space in, a plain architecture out.

    let w = pow2(16..64)                            block local(w) { mask = window(w) }
    block local(w) { mask = window(w) }      →      model probe { layers = [local(64), delta] }
    model probe { layers = each(2, choose(local(w), delta)) }

A `let` at the top or in a model is one draw, however often it is read. A hole in a block's
body is one draw for the block; what differs from use to use goes through its parameters.
Names of draws follow the text: `w`, `probe.layers[0]`, `probe.layers[0].local.w`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..grammar import syntax
from ..grammar.diagnostics import error
from ..grammar.expr import NotConstant, Value, calls, evaluate, number, rebuild, substitute
from ..grammar.show import show
from ..grammar.syntax import Binary, Call, Expr, Keyword, ListOf, Name, Number, Pipe, Range
from .choosers import Chooser
from .holes import (
    MAX_EACH,
    constant,
    contains_hole,
    inner,
    is_hole,
    powers,
    refusal,
    weights_of,
)
from .kinds import Grammar, Named
from .productions import MADE

LEFT_OUT = "left out"
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Tie:
    """A name that stands for one draw, and where that draw's own names are looked up."""

    path: str
    value: Expr
    scope: Mapping[str, Tie]


Scope = Mapping[str, Tie]
Made = syntax.Block | syntax.Definition  # what a production may bring into the file


class Drawing:
    """One draw of one file: what the chooser has said so far about its ties."""

    def __init__(
        self, chooser: Chooser, parameters: Mapping[str, tuple[str, ...]], grammar: Grammar
    ) -> None:
        self._chooser = chooser
        self._parameters = parameters
        self._grammar = grammar
        self._place = grammar.place(None)
        self.made: dict[str, Made] = {}
        self.kinds: set[str] = set()  # the names of the holes of a kind
        self._drawn: dict[str, Expr] = {}
        self.shared: dict[str, syntax.Let] = {}  # what `once` makes one, by the names of draws
        self._open: list[str] = []

    # ── expressions ──────────────────────────────────────────────────────────────────────

    def whole(self, expr: Expr, path: str, scope: Scope) -> Expr:
        """Draw an expression that cannot be left out."""
        drawn = self.value(expr, path, scope)
        assert drawn is not None, f"`problems` let `{show(expr)}` pass"
        return drawn

    def setting(self, expr: Expr, path: str, scope: Scope) -> Expr | None:
        """Draw a setting's value; the holes of a call are named after the setting alone."""
        if isinstance(expr, Call) and not is_hole(expr) and expr.function != "each":
            return self._call(expr, path, scope)
        return self.value(expr, path, scope)

    def value(self, expr: Expr, path: str, scope: Scope) -> Expr | None:
        """Draw an expression; None where a `maybe` leaves it out."""
        match expr:
            case Name(id) if id in scope:
                return self._tie(scope[id], expr)
            case Call("choose"):
                return self._choose(expr, path, scope)
            case Call("maybe", (inner,)):
                texts = (show(inner), LEFT_OUT)
                if self._chooser.category(path, texts, ()) == 1:
                    return None
                return self.value(inner, _below(path, inner, 0, True), scope)
            case Call("each"):
                return ListOf(tuple(self._each(expr, path, scope)), expr.span)
            case Call("any"):
                return self._any(expr, path)
            case Call() if is_hole(expr):
                return self._number(expr, path, scope)
            case Call(function):
                return self._call(expr, f"{path}.{function}", scope)
            case ListOf(items):
                return replace(expr, items=tuple(self._items(items, path, scope, 0)))
            case Pipe(head, stages):
                return self._pipe(expr, head, stages, path, scope)
            case Binary("+", left, right) if (offset := _length(left)) is not None:
                return self._joined(expr, left, right, offset, path, scope)
            case Binary(_, left, right):
                return self._binary(expr, left, right, path, scope)
            case _:
                return self._others(expr, path, scope)

    def _tie(self, tie: Tie, use: Expr) -> Expr:
        if tie.path in self._open:
            raise error("L510", f"`let {show(use)}` reads itself", tie.value.span)
        if tie.path not in self._drawn:
            self._open.append(tie.path)
            with self.standing_in(None):
                self._drawn[tie.path] = self.whole(tie.value, tie.path, tie.scope)
            self._open.pop()
        drawn = self._drawn[tie.path]
        if not calls(drawn, "once"):
            return drawn
        name = tie.path.rpartition(".")[2]  # one place in the text, however often it is read
        self.shared.setdefault(tie.path, syntax.Let(name, drawn, span=tie.value.span))
        return Name(name, use.span)

    def _choose(self, call: Call, path: str, scope: Scope) -> Expr | None:
        texts = tuple(show(each) for each in call.args)
        index = self._chooser.category(path, texts, weights_of(call))
        taken = call.args[index]
        same = [each for each in call.args if _head(each) == _head(taken) and contains_hole(each)]
        return self.value(taken, _below(path, taken, index, len(same) == 1), scope)

    @contextmanager
    def standing_in(self, item: Named | None) -> Iterator[None]:
        """Draw what stands in an item, whose names holes of a kind may read."""
        outer, self._place = self._place, self._grammar.place(item)
        yield
        self._place = outer

    def _any(self, hole: Call, path: str) -> Expr:
        """Draw a production of a kind, and its own holes with it."""
        productions = self._grammar.opened(hole, self._place)
        names = tuple(each.name for each in productions)
        weights = tuple(each.weight for each in productions)
        taken = productions[self._chooser.category(path, names, weights)]
        self.kinds.add(path)
        below = f"{path}.{taken.name}"
        value = within(taken.value, hole)
        if taken.item is not None:
            name = self._make(deeper(taken.item, hole), below)
            value = substitute(value, {MADE: Name(name, hole.span)})
        drawn = self.setting(value, below, {})
        assert drawn is not None
        return drawn

    def _make(self, item: Made, path: str) -> str:
        """Draw an item of a production, and return its name; equal ones are one."""
        with self.standing_in(item):
            drawn = replace(
                item,
                params=self.parameters(item.params, path, {}),
                body=self.body(item.body, path, {}),
            )
        for name, other in self.made.items():
            if replace(other, name=MADE) == drawn:
                return name
        name = self._grammar.free_name(path.rpartition(".")[0], self.made)
        self.made[name] = replace(drawn, name=name)
        return name

    def _number(self, call: Call, path: str, scope: Scope) -> Expr:
        range_ = call.args[0]
        assert isinstance(range_, Range)
        low = self._bound(range_.low, f"{path}.low", scope)
        high = self._bound(range_.high, f"{path}.high", scope)
        if why := refusal(call.function, low, high):
            code, message, label = why
            raise error(code, message, range_.span, label)
        if call.function == "integer":
            return number(self._chooser.integer(path, int(low), int(high)), call)
        if call.function == "pow2":
            if constant(range_.low) is None or constant(range_.high) is None:
                path = f"{path}({low}..{high})"  # other choices are another draw
            choices = powers(low, high)
            return number(choices[self._chooser.category(path, choices, ())], call)
        log = call.function == "loguniform"
        return number(self._chooser.real(path, float(low), float(high), log), call)

    def _bound(self, expr: Expr, path: str, scope: Scope) -> Value:
        drawn = self.whole(expr, path, scope)
        try:
            return evaluate(drawn, {})
        except NotConstant as problem:
            raise error(
                "L512",
                "the ends of a range are numbers, or names of `let`s that are",
                expr.span,
                problem.reason,
            ) from None

    def _each(self, call: Call, path: str, scope: Scope, offset: int = 0) -> Iterator[Expr]:
        count = self._bound(call.args[0], f"{path}.n", scope)
        if not (float(count).is_integer() and 0 <= count <= MAX_EACH):
            raise error(
                "L509",
                "`each` repeats a whole number of times",
                call.args[0].span,
                f"{count}, the most is {MAX_EACH}",
            )
        for index in range(int(count)):
            drawn = self.value(call.args[1], f"{path}[{offset + index}]", scope)
            if drawn is not None:
                yield drawn

    def _call(self, call: Call, path: str, scope: Scope) -> Expr:
        function = call.function
        if function in scope:
            renamed = self._tie(scope[function], Name(function))
            if isinstance(renamed, Name):
                function = renamed.id
        known = self._parameters.get(function, ())
        args = []
        for index, each in enumerate(call.args):
            if index < len(known):
                below = f"{path}.{known[index]}"
            else:
                below = path if len(call.args) == 1 else f"{path}[{index}]"
            args.append(self.whole(each, below, scope))
        keywords: list[Keyword] = []
        for keyword in call.keywords:
            drawn = self.value(keyword.value, f"{path}.{keyword.name}", scope)
            if drawn is not None:
                keywords.append(replace(keyword, value=drawn))
        return replace(call, function=function, args=tuple(args), keywords=tuple(keywords))

    def _items(
        self, items: tuple[Expr, ...], path: str, scope: Scope, offset: int
    ) -> Iterator[Expr]:
        for index, each in enumerate(items, offset):
            drawn = self.value(each, f"{path}[{index}]", scope)
            if drawn is not None:
                yield drawn

    def _pipe(
        self, pipe: Pipe, head: Expr | None, stages: tuple[Expr, ...], path: str, scope: Scope
    ) -> Expr | None:
        first = None if head is None else self.whole(head, f"{path}.head", scope)
        rest: list[Expr] = []
        for drawn in self._items(stages, path, scope, 0):
            # `choose(| linear | silu, | linear)` as a stage is more than one stage
            headless = isinstance(drawn, Pipe) and drawn.head is None
            rest.extend(drawn.stages if headless and isinstance(drawn, Pipe) else (drawn,))
        if not rest:
            return first
        if isinstance(first, Pipe):
            return replace(pipe, head=first.head, stages=(*first.stages, *rest))
        return replace(pipe, head=first, stages=tuple(rest))

    def _joined(
        self, expr: Binary, left: Expr, right: Expr, offset: int, path: str, scope: Scope
    ) -> Expr | None:
        """Draw `[a] + each(2, b)` so that the index in a name is the place in the list."""
        first = self.value(left, path, scope)
        match right:
            case ListOf(items):
                rest = tuple(self._items(items, path, scope, offset))
                second: Expr | None = replace(right, items=rest)
            case Call("each"):
                second = ListOf(tuple(self._each(right, path, scope, offset)), right.span)
            case _:
                second = self.value(right, f"{path}.right", scope)
        assert first is not None
        if isinstance(first, ListOf) and isinstance(second, ListOf):
            return replace(first, items=first.items + second.items, span=expr.span)
        return replace(expr, left=first, right=second) if second is not None else first

    def _binary(
        self, expr: Binary, left: Expr, right: Expr, path: str, scope: Scope
    ) -> Expr | None:
        paths = _paths((left, right), path)
        a = self.value(left, paths[0], scope)
        b = self.value(right, paths[1], scope)
        if a is None or b is None:
            return a if b is None else b
        return _folded(expr, replace(expr, left=a, right=b))

    def _others(self, expr: Expr, path: str, scope: Scope) -> Expr:
        paths = iter(_paths(syntax.children(expr), path))
        drawn = rebuild(expr, lambda each: self.whole(each, next(paths), scope))
        return _folded(expr, drawn)

    # ── statements ───────────────────────────────────────────────────────────────────────

    def body(
        self, body: tuple[syntax.Statement, ...], path: str, scope: Scope
    ) -> tuple[syntax.Statement, ...]:
        """Draw every statement; a setting that is left out is gone."""
        drawn = (self.statement(each, path, scope) for each in body)
        return tuple(each for each in drawn if each is not None)

    def statement(
        self, statement: syntax.Statement, path: str, scope: Scope
    ) -> syntax.Statement | None:
        match statement:
            case syntax.Setting(name, value, where):
                drawn = self.setting(value, f"{path}.{name}", scope)
                if drawn is None:
                    return None
                if where is not None:
                    where = self.whole(where, f"{path}.{name}.where", scope)
                return replace(statement, value=drawn, where=where)
            case syntax.Let(name, value) | syntax.Update(name, value):
                return replace(statement, value=self.whole(value, f"{path}.{name}", scope))
            case syntax.Param(name, dims, init) | syntax.State(name, dims, init):
                below = f"{path}.{name}"
                sizes = tuple(
                    self.whole(each, f"{below}.dims[{at}]", scope) for at, each in enumerate(dims)
                )
                drawn_ = replace(statement, dims=sizes, init=self.whole(init, below, scope))
                if isinstance(drawn_, syntax.State) and drawn_.weights is not None:
                    weights = self.whole(drawn_.weights, f"{below}.weights", scope)
                    return replace(drawn_, weights=weights)
                return drawn_
            case syntax.Result(value, where):
                condition = None if where is None else self.whole(where, f"{path}.where", scope)
                return replace(statement, value=self.whole(value, path, scope), where=condition)
            case syntax.Branch(name, body):
                return replace(statement, body=self.body(body, f"{path}.{name}", scope))

    def parameters(
        self, params: tuple[syntax.Parameter, ...], path: str, scope: Scope
    ) -> tuple[syntax.Parameter, ...]:
        """Draw the defaults of a definition's parameters."""

        def default(each: syntax.Parameter) -> Expr | None:
            if each.default is None:
                return None
            return self.whole(each.default, f"{path}.{each.name}", scope)

        return tuple(replace(each, default=default(each)) for each in params)


# ── productions ──────────────────────────────────────────────────────────────────────────


def within(expr: Expr, hole: Call) -> Expr:
    """Return the text of a production where a hole stands, its own holes one less deep."""
    if isinstance(expr, Call) and expr.function == "any":
        return inner(expr, hole)
    return replace(rebuild(expr, lambda each: within(each, hole)), span=hole.span)


def deeper(item: Made, hole: Call) -> Made:
    """Return an item of a production with its holes one less deep."""
    params = tuple(
        replace(each, default=None if each.default is None else within(each.default, hole))
        for each in item.params
    )
    body = tuple(_within_statement(each, hole) for each in item.body)
    return replace(item, params=params, body=body)


def _within_statement(statement: syntax.Statement, hole: Call) -> syntax.Statement:
    match statement:
        case syntax.Setting(_, value) | syntax.Let(_, value) | syntax.Update(_, value):
            return replace(statement, value=within(value, hole))
        case _:
            return statement


# ── names of draws ───────────────────────────────────────────────────────────────────────


def _head(expr: Expr) -> str | None:
    plain = isinstance(expr, Call) and not is_hole(expr) and expr.function != "each"
    return expr.function if plain and isinstance(expr, Call) else None


def _below(path: str, expr: Expr, index: int, alone: bool) -> str:
    """Name what is inside an alternative: a call names itself, the rest is numbered."""
    return path if alone and _head(expr) is not None else f"{path}[{index}]"


def _paths(operands: tuple[Expr, ...], path: str) -> list[str]:
    """Name operands apart only where more than one of them has holes."""
    several = sum(contains_hole(each) for each in operands) > 1
    if not several:
        return [path] * len(operands)
    ends = _SIDES if len(operands) == 2 else tuple(str(at) for at in range(len(operands)))
    return [f"{path}.{end}" for end in ends]


def _length(expr: Expr) -> int | None:
    """Return how many items a list has before anything is drawn, if that is fixed."""
    match expr:
        case ListOf(items):
            return len(items)
        case Call("each", (count, _)):
            fixed = constant(count)
            return None if fixed is None else int(fixed)
        case Binary("+", left, right):
            a, b = _length(left), _length(right)
            return None if a is None or b is None else a + b
        case Binary("*", left, Number(times)):
            length = _length(left)
            return None if length is None else length * int(times)
        case _:
            return None


_ARITHMETIC = ("+", "-", "*", "/", "//", "%", "**")


def _folded(before: Expr, after: Expr) -> Expr:
    """Work out arithmetic that a draw has made constant: `2 * w` becomes 64, `8 / 3` stays."""
    if after is before or before == after:
        return before
    if not (
        isinstance(after, syntax.Unary) or (isinstance(after, Binary) and after.op in _ARITHMETIC)
    ):
        return after
    value = constant(after)
    if value is None or isinstance(value, bool):
        return after
    exact = isinstance(value, int) or not all(
        isinstance(each, Number) and isinstance(each.value, int) for each in syntax.children(after)
    )
    return number(value, after) if exact else after
