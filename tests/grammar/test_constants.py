"""Which constants have a value, and where minus infinity may stand."""

from __future__ import annotations

import math

import pytest

from headloom.grammar.constants import infinite, settle
from headloom.grammar.dialect import write
from headloom.grammar.expr import NotConstant, evaluate, fold
from headloom.grammar.parse import parse_expression
from headloom.grammar.show import show
from headloom.grammar.syntax import Index, Name

WITHOUT = {
    "s / (2 - 2)": "s / 0",
    "(i - j) % 0 == 0": "(i - j) % 0",
    "i // (1 - 1)": "i // 0",
    "s + log(-1)": "log(-1)",
    "s * sqrt(0 - 4)": "sqrt(-4)",
    "s + exp(1000) / 2": "exp(1000)",
    "s + 2 ** 5000": "2 ** 5000",
    "(0 - 8) ** 0.5 * s": "(-8) ** 0.5",
    "0 ** -1": "0 ** -1",
    "s * 0 * (1 / 0)": "1 / 0",
    "where(i > 2, s, 1 / 0)": "1 / 0",
    "log(0) - log(0)": "log(0) - log(0)",
    "-log(0)": "-log(0)",
    "t[i // 0]": "i // 0",
}


@pytest.mark.parametrize("text", WITHOUT)
def test_the_smallest_part_without_a_value_is_named(text: str) -> None:
    with pytest.raises(NotConstant) as problem:
        settle(parse_expression(text))
    assert show(problem.value.node) == WITHOUT[text]


@pytest.mark.parametrize(
    "text",
    ["s * 1 + (4 - 4)", "where(1 > 2, s, 3 * t)", "j <= i and true", "2 ** 3 * s", "-(-s)",
     "where(i > 2, s, 0.5)", "i // 1 * 1", "max(s, log(0))", "softmax(3)", "sum(2)"],
)  # fmt: skip
def test_settling_is_folding(text: str) -> None:
    assert settle(parse_expression(text)) == fold(parse_expression(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [("where(1 == 1, s, 1 / 0)", "s"), ("where(1 > 1, 1 / 0, s)", "s"),
     ("false and (i - j) % 0 == 0", "false"), ("true or i // 0 > 3", "true"),
     ("exp(log(0)) + s", "0.0 + s"), ("max(log(0), 2)", "2"), ("log(0) < 3", "true"),
     ("s + 2 * log(0)", "s + log(0)"), ("log2(0) + s", "log(0) + s")],
)  # fmt: skip
def test_what_is_not_chosen_needs_no_value(text: str, shown: str) -> None:
    done = settle(parse_expression(text))
    assert show(done) in (shown, shown.removeprefix("0.0 + "))


MAY = {
    "s": False, "s + log(0)": True, "log(0) + s": True, "where(i > 2, s, log(0))": True,
    "0.5 * where(i > 2, s, log(0)) / 3": True, "max(s, log(0))": False, "min(s, log(0))": True,
    "exp(s + log(0))": False, "3 * tanh((s + log(0)) / 3)": False, "(s + log(0)) - t": True,
    "clip(s, log(0), 3)": False, "clip(s + log(0), -3, 3)": False, "s > log(0)": False,
    "detach(s + log(0))": True, "where(s > log(0), s, 1)": False, "max(s + log(0), t)": False,
}  # fmt: skip


@pytest.mark.parametrize("text", MAY)
def test_what_may_be_minus_infinity(text: str) -> None:
    assert infinite(settle(parse_expression(text))) == MAY[text]


def test_names_may_be_minus_infinity() -> None:
    reads = frozenset({"s"})
    assert infinite(parse_expression("s + 1"), reads)
    assert not infinite(parse_expression("exp(s) + t"), reads)
    with pytest.raises(NotConstant, match="minus infinity"):
        infinite(parse_expression("s * t"), reads)


@pytest.mark.parametrize(
    "text",
    ["s * log(0)", "-(s + log(0))", "s - where(i > 2, s, log(0))", "(s + log(0)) * t",
     "(s + log(0)) / t", "-2 * (s + log(0))", "t / log(0) + s * log(0)", "(s + log(0)) ** 2",
     "sqrt(s + log(0))", "gelu(s + log(0))", "sum_keys(s + log(0))", "mix_heads(s + log(0), w)"],
)  # fmt: skip
def test_minus_infinity_cannot_be_multiplied(text: str) -> None:
    with pytest.raises(NotConstant, match="minus infinity"):
        infinite(settle(parse_expression(text)))


def leaf(each: Name | Index) -> str:
    assert isinstance(each, Name)
    return each.id


def test_minus_infinity_is_written_in_both_dialects() -> None:
    expr = settle(parse_expression("where(i > 2, s, log(0)) + max(t, log(0))"))
    assert write(expr, "torch", leaf) == (
        "torch.where(i > 2, s, -torch.inf) + t.clamp(min=-torch.inf)"
    )
    assert 'tl.where(i > 2, s, float("-inf"))' in write(expr, "triton", leaf)
    assert show(expr) == "where(i > 2, s, log(0)) + max(t, log(0))"
    assert evaluate(parse_expression("log(0)"), {}) == -math.inf
