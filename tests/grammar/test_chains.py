"""A flat chain of one operator is no nesting: it is read in halves, and written flat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headloom.grammar import syntax
from headloom.grammar.chains import SHORT, chain, terms
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse_expression
from headloom.grammar.show import show
from headloom.grammar.syntax import Binary, Name

some = settings(derandomize=True, deadline=None, max_examples=200)


def row(op: str, count: int) -> str:
    return f" {op} ".join(f"t{each}" for each in range(count))


@pytest.mark.parametrize("op", ["or", "and", "+", "*"])
@pytest.mark.parametrize("count", [2, SHORT, SHORT + 1, 70, 400])
def test_a_chain_is_not_nested(op, count):
    expr = parse_expression(row(op, count))
    assert terms(expr) == [Name(f"t{each}") for each in range(count)]
    assert syntax.depth(expr) <= SHORT + 6
    assert show(expr) == row(op, count)


def test_short_chains_go_from_left_to_right():
    a, b, c = map(Name, "abc")
    assert parse_expression("a + b + c") == Binary("+", Binary("+", a, b), c)
    expr = parse_expression(row("+", SHORT))
    assert syntax.depth(expr) == SHORT


def test_the_parts_of_a_chain_stand_where_they_were_written():
    text = row("or", 40)
    expr = parse_expression(text)
    shown = {text[node.span.start : node.span.end] for node in syntax.walk(expr)}
    assert text in shown
    assert " or ".join(f"t{each}" for each in range(20)) in shown


def test_parentheses_and_other_operators_end_a_chain():
    text = f"({row('+', 20)}) + {row('+', 20)} - z + {row('+', 20)}"
    expr = parse_expression(text)
    assert parse_expression(show(expr)) == expr
    first, *others = terms(expr)
    assert isinstance(first, Binary)
    assert (first.op, len(others)) == ("-", 20)


@pytest.mark.parametrize(
    "text", ["(" * 65 + "x" + " or x)" * 65, "x" + " - x" * 64, "x" + " / x" * 64]
)
def test_what_is_nested_is_still_refused(text):
    with pytest.raises(LoomError, match="L103") as caught:
        parse_expression(text)
    assert caught.value.diagnostics[0].help == "name a part of it with `let`"


@st.composite
def trees(draw: st.DrawFn) -> syntax.Expr:
    """Return a tree of long chains, left-leaning runs and halves, of a few operators."""
    parts: list[syntax.Expr] = [Name("a"), Name("b"), Name("c")]
    for _ in range(draw(st.integers(1, 4))):
        op = draw(st.sampled_from(["or", "+", "-", "*"]))
        picked = draw(st.lists(st.sampled_from(parts), min_size=2, max_size=2 * SHORT + 3))
        made = picked[0]
        if draw(st.booleans()):
            made = chain(op, picked, Binary)
        else:
            for each in picked[1:]:
                made = Binary(op, made, each)
        parts.append(made)
    return parts[-1]


@some
@given(trees().filter(lambda expr: syntax.depth(expr) <= 64))
def test_what_is_written_reads_as_the_same_tree(expr):
    assert parse_expression(show(expr)) == expr
