"""Random well-formed syntax trees: what the language can say, comments and odd names included.

`files()` gives whole files, `expressions()` expressions of every kind, `scalars()` the
expressions of the functions table that have a number.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from hypothesis import strategies as st

from headloom.grammar import syntax
from headloom.grammar.comments import clean
from headloom.grammar.functions import FUNCTIONS

DECLARING = ("let", "param", "const", "state", "branch")
ODD = (
    "where", "by", "search", "block", "model", "base", "branches", "value", "masks", "true", "Ki",
    "e5",
)  # fmt: skip

_plain = st.sampled_from(["x", "q", "k", "heads", "head_dim", "S", "gate_2", "_", "sum", "i"])
names = _plain | st.sampled_from([*ODD, *DECLARING, *syntax.DEFINITION_KINDS])
setting_names = names.filter(lambda name: name not in DECLARING)
update_names = setting_names.filter(lambda name: name not in syntax.DEFINITION_KINDS)


def _written(text: str, value: float) -> syntax.Number:
    return syntax.Number(value, text)


numbers = (
    st.integers(0, 10**12).map(lambda value: _written(str(value), value))
    | st.floats(0, 1e30, allow_nan=False).map(lambda value: _written(repr(value), value))
    | st.sampled_from([
        _written("10_000", 10_000), _written("64Ki", 65536), _written(".5", 0.5),
        _written("1e-4", 1e-4), _written("1.5K", 1500), _written("2M", 2_000_000),
    ])
)  # fmt: skip
_texts = st.text(max_size=6) | st.sampled_from(["a, b", "# no comment", "a: b", "\\", "{", "| x"])
strings = _texts.filter(lambda text: not set('"\n') & set(text)).map(syntax.String)


def _several(one: st.SearchStrategy[Any], least: int = 0, most: int = 3) -> Any:
    return st.lists(one, min_size=least, max_size=most).map(tuple)


@st.composite
def _compares(draw: Any, inner: st.SearchStrategy[syntax.Expr]) -> syntax.Compare:
    ops = draw(_several(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), 1, 2))
    return syntax.Compare(tuple(draw(inner) for _ in range(len(ops) + 1)), ops)


def _larger(inner: st.SearchStrategy[syntax.Expr]) -> st.SearchStrategy[syntax.Expr]:
    ops = st.sampled_from(["or", "and", "+", "-", "*", "/", "//", "%", "@", "**"])
    keywords = st.builds(syntax.Keyword, names, inner)
    return (
        st.builds(syntax.Unary, st.sampled_from(["-", "not"]), inner)
        | st.builds(syntax.Binary, ops, inner, inner)
        | _compares(inner)
        | st.builds(syntax.Call, names, _several(inner), _several(keywords, 0, 2))
        | st.builds(syntax.Index, inner, _several(inner, 1))
        | st.builds(syntax.Attribute, inner, names)
        | st.builds(syntax.ListOf, _several(inner))
        | st.builds(syntax.Range, inner, inner)
        | st.builds(syntax.Pipe, st.none() | inner, _several(inner, 1))
    )


def expressions(leaves: int = 8) -> st.SearchStrategy[syntax.Expr]:
    """Return expressions of every kind, in any order of precedence."""
    return st.recursive(numbers | strings | names.map(syntax.Name), _larger, max_leaves=leaves)


_comment_texts = st.sampled_from(["", " the paper", " a: b", ' "', " {", " }", " #", " é", " | x"])
comment_lines = (_comment_texts | st.text(max_size=8)).map(lambda text: clean("#" + text))
comment_lines = comment_lines.filter(lambda text: text.isprintable())
closings = st.just(()) | _several(comment_lines, 0, 2)
comments = st.just(syntax.SILENT) | st.builds(
    syntax.Comments, _several(comment_lines, 0, 2), st.just("") | comment_lines
)


def statements(expr: st.SearchStrategy[syntax.Expr]) -> st.SearchStrategy[syntax.Statement]:
    """Return statements of every kind, branches without branches."""
    dims = _several(expr, 0, 2)
    return (
        st.builds(syntax.Setting, setting_names, expr, st.none() | expr, comments=comments)
        | st.builds(syntax.Let, names, expr, comments=comments)
        | st.builds(syntax.Param, names, dims, expr, st.booleans(), comments=comments)
        | st.builds(syntax.State, names, dims, expr, st.none() | expr, comments=comments)
        | st.builds(syntax.Update, update_names, expr, comments=comments)
        | st.builds(syntax.Result, expr, st.none() | expr, comments=comments)
    )


@st.composite
def files(draw: Any) -> syntax.File:
    """Return a whole file."""
    expr = expressions(5)
    some = statements(expr)
    branches = st.builds(syntax.Branch, names, _several(some), closing=closings, comments=comments)
    body = _several(some | branches, 0, 5)
    params = _several(st.builds(syntax.Parameter, names, st.none() | expr), 0, 2)
    base = st.none() | expr
    kinds_of_blocks = st.sampled_from(("block", *syntax.PART_KINDS))
    kinds = st.sampled_from(syntax.DEFINITION_KINDS)
    only = st.builds(syntax.Result, expr, st.none() | expr).map(lambda result: (result,))
    items = (
        st.builds(syntax.Let, names, expr, comments=comments)
        | st.builds(syntax.Definition, kinds, names, params, only, comments=comments)
        | st.builds(
            syntax.Definition, kinds, names, params, body, closing=closings, comments=comments
        )
        | st.builds(
            syntax.Block,
            names,
            params,
            base,
            body,
            kinds_of_blocks,
            closing=closings,
            comments=comments,
        )
        | st.builds(syntax.Model, names, params, base, body, closing=closings, comments=comments)
        | st.builds(syntax.Search, body, closing=closings, comments=comments)
    )
    return syntax.File(draw(_several(items, 0, 4)), draw(closings))


def everything(node: Any) -> Any:
    """Return a node as plain data that compares comments and the texts of numbers too."""
    if is_dataclass(node):
        kept = [each.name for each in fields(node) if each.name != "span"]
        return (type(node).__name__, *(everything(getattr(node, name)) for name in kept))
    return tuple(map(everything, node)) if isinstance(node, tuple) else node


STRAIGHT = ("detach", "step")  # their derivatives are not their slopes


def scalars(
    constants: bool = True, without: tuple[str, ...] = ()
) -> st.SearchStrategy[syntax.Expr]:
    """Return numeric expressions over `s` and `t` and the functions that have a derivative.

    Without `constants`, only `s` and `t` are arguments of functions: a tensor function of
    PyTorch takes no plain number.
    """
    names = st.sampled_from([syntax.Name("s"), syntax.Name("t")])
    small = st.sampled_from([syntax.Number(value, str(value)) for value in (0, 1, 2, 3, 0.5, 1.5)])
    ops = st.sampled_from(["+", "-", "*", "/"])
    unary = [
        name
        for name, each in FUNCTIONS.items()
        if each.arity == 1 and not each.boolean and name not in without
    ]

    def larger(inner: st.SearchStrategy[syntax.Expr]) -> st.SearchStrategy[syntax.Expr]:
        mixed = inner | small
        compares = st.builds(
            lambda a, b, op: syntax.Compare((a, b), (op,)),
            inner,
            mixed,
            st.sampled_from(["<", "<=", ">", ">="]),
        )
        return (
            st.builds(syntax.Binary, ops, inner, mixed)
            | st.builds(syntax.Binary, ops, mixed, inner)
            | st.builds(lambda base, n: syntax.Binary("**", base, n), inner, small)
            | st.builds(lambda operand: syntax.Unary("-", operand), inner)
            | st.builds(lambda name, a: syntax.Call(name, (a,)), st.sampled_from(unary), inner)
            | st.builds(
                lambda name, a, b: syntax.Call(name, (a, b)),
                st.sampled_from(["min", "max"]),
                inner,
                mixed,
            )
            | st.builds(lambda a, b, c: syntax.Call("where", (a, b, c)), compares, inner, inner)
        )

    leaves = names | small if constants else names
    return st.recursive(leaves, larger, max_leaves=6)
