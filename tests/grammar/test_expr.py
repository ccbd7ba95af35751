from __future__ import annotations

import math

import pytest

from headloom.grammar import expr, syntax
from headloom.grammar.format import show
from headloom.grammar.parse import parse_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [("7 // 2", 3), ("-7 // 2", -4), ("-7 % 3", 2), ("8 / 2", 4), ("7 / 2", 3.5), ("2 ** -1", 0.5),
     ("0 <= a < 4", True), ("not a == 3", False), ("a > 2 and b > 2", False),
     ("a > 2 or b > 2", True), ("true", True), ("where(a > b, 1, 2)", 1), ("clip(9, 0, 4)", 4),
     ("ispow2(8)", True), ("min(a, b)", 2), ("-a ** 2", -9)],
)  # fmt: skip
def test_evaluate(text, value):
    result = expr.evaluate(parse_expression(text), {"a": 3, "b": 2})
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "text",
    ["c", "x[i]", "1 / 0", "log(-1)", "-log(0)", "2 ** 2000", "(-8) ** 0.5", "10 ** 30", "f(1)",
     "1..2", "x | linear", "2 @ 3", "exp(1000)"],
)  # fmt: skip
def test_what_has_no_number(text):
    with pytest.raises(expr.NotConstant):
        expr.evaluate(parse_expression(text), {})


@pytest.mark.parametrize(
    ("text", "folded"),
    [("s * 1 + (4 - 4)", "s"), ("a and true", "a"), ("a or true", "true"), ("a and a", "a"),
     ("0 - s", "-s"), ("--s", "s"), ("not true", "false"), ("where(1 < 2, a, b)", "a"),
     ("2 * 3 + s", "6 + s"), ("0 * s", "0"), ("s ** 1", "s"), ("1 / 0", "1 / 0")],
)  # fmt: skip
def test_fold(text, folded):
    assert show(expr.fold(parse_expression(text))) == folded


def test_substitute_renames_calls():
    tree = parse_expression("feature(q) + q")
    values = {"feature": syntax.Name("elu"), "q": parse_expression("a + b")}
    assert show(expr.substitute(tree, values)) == "elu(a + b) + (a + b)"
    assert expr.names(tree) == {"q"}
    assert expr.calls(tree, "feature")
    assert not expr.calls(tree, "q")


def test_depth_and_walk():
    tree = parse_expression("f(a, k = b[i]) + 1")
    assert syntax.depth(tree) == 4
    names = [node.id for node in syntax.walk(tree) if isinstance(node, syntax.Name)]
    assert names == ["a", "b", "i"]


def test_number_stands_where_it_is_told():
    like = parse_expression("a + b")
    assert expr.number(True) == syntax.Name("true")
    assert expr.number(2.5, like).span == like.span
    assert math.isclose(expr.number(2.5).value, 2.5)
