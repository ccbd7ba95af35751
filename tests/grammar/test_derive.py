"""Derivatives against finite differences, folding and printing against the values themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headloom.compiler.pieces.stages import hard_step, tanh
from headloom.grammar.derive import derivative
from headloom.grammar.dialect import write
from headloom.grammar.expr import NotConstant, evaluate, fold, substitute
from headloom.grammar.format import show
from headloom.grammar.functions import FUNCTIONS
from headloom.grammar.parse import parse_expression
from headloom.grammar.syntax import Binary, Call, Compare, Name, Number, Unary

from .strategies import STRAIGHT, scalars

quiet = settings(derandomize=True, deadline=None, max_examples=300)
S = Name("s")
points = st.sampled_from([-2.3, -1.1, -0.4, 0.3, 0.7, 1.9, 3.2])


def value(expr, s, t):
    try:
        return float(evaluate(expr, {"s": s, "t": t}))
    except NotConstant:
        return math.nan


def slope(expr, s, t, step):
    return (value(expr, s + step, t) - value(expr, s - step, t)) / (2 * step)


@quiet
@given(scalars(without=STRAIGHT), points, points)
def test_derivatives_of_random_expressions(expr, s, t):
    expected, close = slope(expr, s, t, 1e-5), slope(expr, s, t, 1e-6)
    # Away from kinks and overflow, two step widths agree, and both sides.
    assume(math.isfinite(close) and abs(expected) < 1e4)
    sides = [(value(expr, s + step, t) - value(expr, s, t)) / step for step in (1e-5, -1e-5)]
    assume(math.isclose(*sides, rel_tol=1e-2, abs_tol=1e-2))
    assume(math.isclose(expected, close, rel_tol=1e-4, abs_tol=1e-4))
    got = value(derivative(expr, S), s, t)
    assume(math.isfinite(got))  # a derivative may overflow where the expression does not
    assert math.isclose(got, close, rel_tol=1e-3, abs_tol=1e-3), show(derivative(expr, S))


SMOOTH = [
    name
    for name, each in FUNCTIONS.items()
    if any(each.partials) and not each.boolean and name not in STRAIGHT
]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("s", [0.35, 0.8, 1.7])
def test_the_derivative_of_each_function(name, s):
    function = FUNCTIONS[name]
    for place, partial in enumerate(function.partials):
        if partial is None:
            continue
        args = [Number(0.5), Number(0.6), Number(2.9)][: function.arity]
        args[place] = S
        expr = Call(name, tuple(args))
        got = value(derivative(expr, S), s, 0)
        assert math.isclose(got, slope(expr, s, 0, 1e-6), rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("50 * tanh(s / 50)", "50 * ((1 - tanh(s / 50) ** 2) * (1 / 50))"), ("t + 3", "0"),
     ("s * t", "t"), ("s ** 2", "2 * s"), ("-s", "-1"), ("i - j", "0"), ("s / t", "1 / t")],
)  # fmt: skip
def test_derivatives_are_folded(text, shown):
    got = derivative(parse_expression(text), S)
    want = parse_expression(shown)
    for s, t in [(0.4, 1.3), (2.0, -0.7)]:
        assert math.isclose(value(got, s, t), value(want, s, t), abs_tol=1e-12)
    assert len(show(got)) <= len(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("detach(s)", "0"), ("step(s)", "1"), ("s * detach(s)", "detach(s)"),
     ("step(3 * s) * s", "3 * s + step(3 * s)"), ("step(detach(s)) + s", "1"),
     ("s * (1 + detach(step(s) - s))", "1 + detach(step(s) - s)")],
)  # fmt: skip
@pytest.mark.parametrize("s", [-1.5, 0.0, 0.7])
def test_gradients_that_are_not_slopes(text, shown, s):
    expr = parse_expression(text)
    assert show(derivative(expr, S)) == shown
    at = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    written = write(expr, "torch", lambda leaf: leaf.id)
    y = eval(written, {"s": at, "hard_step": hard_step})
    assert y.item() == value(expr, s, 0)
    (got,) = torch.autograd.grad(y, at) if y.requires_grad else (0,)
    assert float(got) == value(derivative(expr, S), s, 0)


def test_an_indexed_tensor_is_a_target():
    expr = parse_expression("s - slope[h] * abs(i - j)")
    got = derivative(expr, parse_expression("slope[h]"))
    assert "slope" not in show(got)
    numbers = {"i": Number(7), "j": Number(4)}
    assert evaluate(substitute(got, numbers), {}) == -3


@quiet
@given(scalars(), points, points)
def test_fold_keeps_values(expr, s, t):
    before, after = value(expr, s, t), value(fold(expr), s, t)
    assume(math.isfinite(before))
    assert math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-9), show(fold(expr))


def in_torch(expr, s, t):
    """Evaluate an expression as the compiler's text under torch, on tensors of float64."""
    text = write(expr, "torch", lambda leaf: leaf.id)
    values = {name: torch.tensor([at], dtype=torch.float64) for name, at in (("s", s), ("t", t))}
    return text, eval(
        text, {"torch": torch, "F": F, "hard_step": hard_step, "elu": F.elu, "tanh": tanh, **values}
    )


@quiet
@given(scalars(constants=False), points, points)
def test_torch_text_has_the_same_value(expr, s, t):
    want = value(expr, s, t)
    assume(math.isfinite(want) and abs(want) < 1e12)
    text, got = in_torch(expr, s, t)
    assert math.isclose(float(got), want, rel_tol=1e-6, abs_tol=1e-6), text


@pytest.mark.parametrize("op", ["//", "%"])
@pytest.mark.parametrize("a", range(-7, 8, 2))
@pytest.mark.parametrize("b", [-3, 2, 3])
def test_whole_division_rounds_down_in_torch(op, a, b):
    expr = Binary(op, Name("s"), Name("t"))
    text = write(expr, "torch", lambda leaf: leaf.id)
    got = eval(text, {"s": torch.tensor([a]), "t": torch.tensor([b])})
    assert int(got) == evaluate(expr, {"s": a, "t": b})


@pytest.mark.parametrize("text", ["x | f", "[s]", "s.t", '"s"', "f(s)", "1..2"])
def test_what_is_no_scalar_is_not_written(text):
    with pytest.raises(ValueError, match="not a scalar expression"):
        write(parse_expression(text), "torch", lambda leaf: leaf.id)


@pytest.mark.parametrize(
    ("tree", "text"),
    [(Compare((Number(0), S, Number(8)), ("<=", "<")), "(0 <= s) & (s < 8)"),
     (Unary("not", Compare((S, Number(1)), ("<",))), "~(s < 1)"),
     (Binary("**", Unary("-", S), Number(2)), "(-s) ** 2"),
     (Call("max", (S, Number(0))), "s.clamp(min=0)"),
     (Binary("*", Call("step", (Binary("+", S, Number(1)),)), S), "hard_step(s + 1) * s"),
     (Binary("*", Call("detach", (Binary("+", S, Number(1)),)), S), "(s + 1).detach() * s")],
)  # fmt: skip
def test_torch_text(tree, text):
    assert write(tree, "torch", lambda leaf: leaf.id) == text


@pytest.mark.parametrize("text", ["relu(s) ** 0.5", "sqrt(relu(s))", "relu(s - 1) ** t"])
def test_the_root_of_nothing_is_flat(text):
    expr = parse_expression(text)
    found = derivative(expr, S)
    assert value(found, 0.0, 0.5) == value(found, -1.0, 0.5) == 0
    assert value(found, 1.25, 0.5) == pytest.approx(slope(expr, 1.25, 0.5, 1e-6))
