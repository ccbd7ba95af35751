"""Which recurrences are recognised: one form however they are written, and why others are not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headloom.compiler.api import explain, load
from headloom.compiler.model import Recurrence, State, Update
from headloom.compiler.plan.recurrences import Chunked, Memory, Sum, Write, recognised
from headloom.grammar.expr import rebuild
from headloom.grammar.parse import parse_expression
from headloom.grammar.show import show
from headloom.grammar.syntax import Expr, Index, Name, Number

RANKS = {"q": 1, "k": 1, "v": 1, "u": 1, "a": 0, "b": 0, "g": 1, "c": 1, "w": 3}
TENSORS = ("c", "w")


def expression(text: str) -> Expr:
    return _resolved(parse_expression(text))


def _resolved(expr: Expr) -> Expr:
    if isinstance(expr, Name) and expr.id in TENSORS:
        return Index(expr, (Name("h"),))
    return rebuild(expr, _resolved)


def mixer(*statements: str, init: float = 0, **settings: bool) -> Recurrence:
    """S is a matrix, z a vector, n a number, as far as they are written."""
    updates = []
    for statement in statements:
        name, _, value = statement.partition(" <- ")
        updates.append(Update(name, expression(value)))
    shapes = {"S": (4, 3), "T": (4, 3), "z": (4,), "y": (4,), "n": ()}
    written = {each.name for each in updates}
    states = tuple(
        State(name, shape, Number(init)) for name, shape in shapes.items() if name in written
    )
    return Recurrence("mixer", states, tuple(updates), **settings)


def form(*statements: str, init: float = 0, **settings: bool) -> Chunked:
    found = recognised(mixer(*statements, init=init, **settings), RANKS)
    assert isinstance(found, Chunked), found
    return found


def refusal(*statements: str, init: float = 0, **settings: bool) -> str:
    found = recognised(mixer(*statements, init=init, **settings), RANKS)
    assert isinstance(found, str), found
    return found


def memory(*statements: str) -> Memory:
    return next(each for each in form(*statements).steps if isinstance(each, Memory))


def shown(expr: Expr | None) -> str | None:
    return None if expr is None else show(expr)


def written(step: Memory) -> list[tuple[str | None, ...]]:
    return [(shown(each.key), shown(each.value), shown(each.query)) for each in step.writes]


DELTA = [
    "a * (S - b * outer(k, k @ S)) + b * outer(k, v)",
    "a * S - a * b * outer(k, k @ S) + b * outer(k, v)",
    "b * outer(k, v) + (S - outer(b * k, k @ S)) * a",
    "S * a + outer(k, b * v) - outer(a * k, (b * k) @ S)",
    "a * S + b * outer(k, v - a * (k @ S))",
    "a * S + outer(b * k, v - k @ (a * S))",
    "-(outer(k, (a * b * k) @ S) - a * S) + outer(k, v) * b",
    "a * S - (outer(k, k @ S) * a - outer(k, v)) * b",
    "outer(k, v) / (1 / b) + a * (S + outer(-k, b * k @ S))",
    "2 * (a * S / 2) - outer(k, a * (k @ S) - v) * b",
]


@pytest.mark.parametrize("update", DELTA)
def test_the_gated_delta_rule_has_one_form(update):
    step = memory(f"S <- {update}", "o <- q @ S")
    assert shown(step.decay) == "a"
    assert written(step) == [("k", "b * v", "-(a * b * k)")]
    assert not step.turned


def test_two_statements_are_one():
    statements = "S <- a * S", "S <- S + b * outer(k, v - k @ S)", "o <- q @ S"
    assert memory(*statements) == memory(f"S <- {DELTA[0]}", "o <- q @ S")
    step = memory("S <- g * S", "S <- S - outer(k, k @ S) * b + outer(b * k, v)", "o <- q @ S")
    assert shown(step.decay) == "g"  # a gate for each row stands before the correction
    assert written(step) == [("k", "b * v", "-(b * g * k)")]


def test_an_intermediate_name_is_what_it_stands_for():
    plain = memory(f"S <- {DELTA[0]}", "o <- q @ S")
    found = form("said <- k @ S", "S <- a * S + b * outer(k, v - a * said)", "o <- q @ S")
    assert found.steps == (plain,)
    assert not found.lets
    found = form("f <- exp(k) / sum(exp(k))", "S <- S + outer(f, v)", "o <- f @ S")
    assert [each.name for each in found.lets] == ["f"]
    assert written(found.steps[0]) == [("f", "v", None)]
    found = form("new <- outer(k, v)", "S <- g * S + b * new", "o <- q @ S")
    assert not found.lets
    assert written(found.steps[0]) == [("k", "b * v", None)]


LINEAR = ["a * S", "outer(k, b * v)", "outer(g * u, v)", "-outer(k, v) / 2"]


@given(st.permutations(LINEAR), st.lists(st.booleans(), min_size=3, max_size=3))
def test_sums_commute(parts, flips):
    text = parts[0]
    for part, flip in zip(parts[1:], flips, strict=True):
        text = f"{part} + ({text})" if flip else f"{text} + {part}"
    step = memory(f"S <- {text}", "o <- q @ S")
    assert shown(step.decay) == "a"
    assert {each[:2] for each in written(step)} == {("k", "b * v - 0.5 * v"), ("g * u", "v")}


FACTORS = ["a", "b", "g", "outer(k, v)"]


@pytest.mark.parametrize("order", list(itertools.permutations(FACTORS)))
def test_products_commute(order):
    step = memory(f"S <- S + {' * '.join(order)}", "o <- q @ S")
    assert step.decay is None
    assert written(step) == [("g * k", "a * b * v", None)]


@pytest.mark.parametrize(
    ("update", "decay"),
    [
        ("S", None),
        ("S * 1.0", None),
        ("0.5 * S", "0.5"),
        ("S / 4", "0.25"),
        ("S - a * S", "1 - a"),
        ("c * S", "c[h]"),
        ("sigmoid(a) ** 2 * S", "sigmoid(a) ** 2"),
        ("exp(-exp(c) * a) * S", "exp(-exp(c[h]) * a)"),
        ("g * S", "g"),
        ("g * S * a", "a * g"),
        ("S - S", "0"),
    ],
)
def test_what_a_matrix_fades_by(update, decay):
    step = memory(f"S <- {update} + outer(k, v)", "o <- q @ S")
    assert shown(step.decay) == decay


@pytest.mark.parametrize(
    ("output", "queries", "left"),
    [
        ("q @ S", ["q"], "reading 1"),
        ("2 * q @ S / a", ["q"], "2 * reading 1 / a"),
        ("q @ (S * b) * c", ["q"], "b * reading 1 * c[h]"),
        ("q @ (S / z)", ["q / z"], "reading 1"),
        ("(q * g) @ S + q @ S", ["g * q", "q"], "reading 1 + reading 2"),
        ("q @ S * (q @ S)", ["q"], "reading 1 * reading 1"),
        ("q @ S / max(abs(dot(q, z)), 1)", ["q"], "reading 1 / max(abs(dot(q, z)), 1)"),
        ("(q + u) @ S", ["q + u"], "reading 1"),
        ("where(a > 0, q @ S, v)", ["q"], "where(a > 0, reading 1, v)"),
        ("v * dot(q @ S, v)", ["q"], "dot(reading 1, v) * v"),
        ("q @ (S - outer(k, v))", ["q"], "reading 1 - dot(k, q) * v"),
    ],
)
def test_how_a_matrix_is_read(output, queries, left):
    found = form("S <- a * S + outer(k, v)", "z <- z + k", f"o <- {output}")
    step = next(each for each in found.steps if isinstance(each, Memory))
    assert [show(each.query) for each in step.readings] == queries
    assert all(each.after for each in step.readings)
    assert show(found.output) == left


def test_before_and_after_the_update():
    found = form(
        "o <- q @ S", "S <- S + outer(k, v)", "z <- a * z + k", "o <- o + dot(q, z) * (u @ S)"
    )
    step = next(each for each in found.steps if isinstance(each, Memory))
    assert [(show(each.query), each.after) for each in step.readings] == [("q", False), ("u", True)]
    found = form("o <- z * v", "z <- a * z + k")
    assert show(found.output) == "before z * v"


def test_vectors_and_numbers_are_read_in_any_way():
    found = form("z <- g * z + k * a", "n <- n + 1", "y <- y / 2 - max(z, n)", "o <- exp(y) + z")
    assert [each.state for each in found.steps] == ["z", "n", "y"]
    decays = [shown(each.decay) for each in found.steps]
    assert decays == ["g", None, "0.5"]
    last = found.steps[-1]
    assert isinstance(last, Sum)
    assert show(last.added) == "-max(z, n)"


def test_states_may_read_each_other_in_turn():
    found = form(
        "z <- z + k @ T", "T <- b * T + outer(k, u)", "S <- a * S + outer(z, v)", "o <- q @ S"
    )
    assert [each.state for each in found.steps] == ["T", "z", "S"]
    assert found.steps[0].readings[0].after is False


def test_a_matrix_that_is_read_from_the_other_side():
    found = form("S <- a * S + b * outer(v, k)", "o <- S @ q")
    (step,) = found.steps
    assert step.turned
    assert written(step) == [("b * k", "v", None)]
    (step,) = form("S <- S + b * outer(v - S @ k, k)", "o <- S @ q").steps
    assert step.turned
    assert written(step) == [("k", "b * v", "-(b * k)")]


def test_a_correction_along_another_key_is_a_write_of_its_own():
    step = memory("S <- S - b * outer(k, k @ S) + outer(u, v)", "o <- q @ S")
    assert written(step) == [("k", None, "-(b * k)"), ("u", "v", None)]


WRITE = "S <- S + outer(k, v)"


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["S <- max(S, 0) + outer(k, v)", "o <- q @ S"],
         "`S <- …`: `max(S, 0)` is not affine in the state"),
        (["S <- S * S + outer(k, v)", "o <- q @ S"],
         "`S <- …`: `S * S` multiplies what is read of states"),
        (["S <- S + outer(k, v) / norm(S)", "o <- q @ S"],
         "`S <- …`: `outer(k, v) / norm(S)` is not affine in the state"),
        (["S <- sigmoid(k @ S) * S + outer(k, v)", "o <- q @ S"],
         "`S <- …`: `sigmoid(k @ S)` is not affine in the state"),
        (["S <- S + w * k", "o <- q @ S"],
         "`S <- …`: `w[h]` is a matrix, and no outer product"),
        (["S <- w * S + outer(k, v)", "o <- q @ S"],
         "`S <- …`: `w[h]` is a matrix, and no outer product"),
        (["S <- S + 0.3", "o <- q @ S"],
         "`S <- …`: `S + 0.3` adds what is not a matrix to every row or column"),
        (["S <- S + outer(k, v) + v", "o <- q @ S"], "adds what is not a matrix"),
        (["S <- S - outer(k, k @ S) - outer(u, u @ S) + outer(k, v)", "o <- q @ S"],
         "`S <- …`: it is corrected along several keys, `k` and `u`"),
        (["S <- S - outer(k, g * (k @ S)) + outer(k, v)", "o <- q @ S"],
         "`S <- …`: what is read of the state is scaled by the vector `g`"),
        (["S <- S + outer(k @ S, v)", "o <- q @ S"],
         "`S <- …`: `outer(k @ S, v)` writes what it reads as a key"),
        (["S <- S * outer(k, v) + outer(k, v)", "o <- q @ S"],
         "`S <- …`: it fades along the side that is not read, by `v`"),
        ([WRITE, "o <- q @ S + norm(S)"],
         "`o <- …`: `S` is read other than by a product with a vector"),
        ([WRITE, "o <- q @ exp(S)"], "`o <- …`: `exp(S)` is not affine in the state"),
        ([WRITE, "o <- q @ S + S @ v"], "`S` is read from both sides"),
        (["S <- g * S + outer(k, v)", "o <- S @ q"],
         "`S <- …`: it fades along the side that is not read, by `g`"),
        (["S <- S + outer(k, (k @ S) @ S)", "o <- q @ S"],
         "`S <- …`: `k @ S @ S` multiplies what is read of states"),
        ([WRITE, "o <- v"], "`S` is never read"),
        (["z <- max(z, k)", "o <- z"], "`z <- …`: `max(z, k)` is not affine in the state"),
        (["z <- z - k * dot(k, z)", "o <- z"],
         "`z <- …`: `dot(k, z)` is not affine in the state"),
        (["z <- z + y", "y <- y + z", "o <- z"], "`z` and `y` wait for one another"),
        (["S <- S + outer(z, v)", "z <- z + k @ S", "o <- q @ S"],
         "`S` and `z` wait for one another"),
        (["T <- g * T + outer(k, k @ S - v)", "S <- g * S - T", "o <- q @ S"],  # with momentum
         "`S <- …`: `T` is read other than by a product with a vector"),
        (["S <- S + T + outer(k, v)", "T <- T + outer(k, v)", "o <- q @ S"],
         "`S <- …`: `T` is read other than by a product with a vector"),
        ([WRITE, "z <- max(z, g @ S)", "o <- z"],
         "`z <- …`: `max(z, g @ S)` is not affine in the state"),
    ],
)  # fmt: skip
def test_what_is_not_recognised_says_where(statements, reason):
    assert reason in refusal(*statements)


def test_a_reading_asks_for_what_an_earlier_one_has_read():
    step = memory(WRITE, "found <- q @ S", "o <- (q - found / norm(found)) @ S")
    first, second = step.readings
    assert shown(first.query) == "q"
    assert shown(second.query) == "q - reading 1 / norm(reading 1)"


def test_a_document_that_begins_with_something():
    assert "a document begins it at 0.5 instead of 0" in (
        refusal(WRITE, "o <- q @ S", init=0.5, resets=True)
    )
    assert isinstance(form(WRITE, "o <- q @ S", init=0.5).steps[0], Memory)
    assert isinstance(form("z <- z + k", "o <- z", init=0.5, resets=True).steps[0], Sum)


def test_both_ways_answers_come_from_all_tokens():
    found = form("o <- q @ S", WRITE, "z <- z + k", "o <- o / z", causal=False)
    step = found.steps[0]
    assert isinstance(step, Memory)
    assert [each.after for each in step.readings] == [True]
    assert show(found.output) == "reading 1 / z"


def test_what_is_written_is_a_value_of_its_own():
    assert memory(WRITE, "o <- q @ S").writes == (Write(Name("k"), Name("v")),)


def test_explain_says_which():
    text = "mix m {{ state S[head_dim, value_dim] = 0; S <- {} ; o <- q @ S }}\n"
    block = "block b { width = 16; heads = 4; mix = m; mask = causal }"
    (chosen,) = explain(load(text.format("0.5 * S + outer(k, v)") + block, format="loom")).lowerings
    assert (chosen.path, [each for each, _ in chosen.obstacles]) == ("chunkwise", ["triton"])
    assert "`S` adds outer products and fades by 0.5" in chosen.reason
    (chosen,) = explain(
        load(text.format("S + max(outer(k, v), S)") + block, format="loom")
    ).lowerings
    assert chosen.path == "sequential"
    assert chosen.obstacles[1] == (
        "chunkwise",
        "`S <- …`: `max(outer(k, v), S)` is not affine in the state",
    )
