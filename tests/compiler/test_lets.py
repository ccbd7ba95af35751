"""A file's `let`s, defaults that read parameters, lets and masks inside of definitions."""

from __future__ import annotations

import pytest

from headloom.compiler.checking.check import check, find
from headloom.compiler.model import Block, Model, Pairwise
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse
from headloom.search.choosers import First
from headloom.search.space import draw, holes


def block(text: str, name: str = "a") -> Block:
    found = find(check(parse(text)), name)
    assert isinstance(found, Block)
    return found


def same(one: str, two: str) -> None:
    """Two texts mean the same block `a`."""
    assert block(one) == block(two)


def refused(text: str) -> list[str]:
    with pytest.raises(LoomError) as problem:
        check(parse(text))
    return [each.code for each in problem.value.diagnostics]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "let w = 3; mask near = abs(i - j) < w; block a { mask = near }",
            "mask near = abs(i - j) < 3; block a { mask = near }",
        ),
        (
            "let c = 5; score capped = c * tanh(s / c); block a { score = capped }",
            "score capped = 5 * tanh(s / 5); block a { score = capped }",
        ),
        (
            "let w = 3; mask near(u = w) = abs(i - j) < u; block a { mask = near }",
            "mask near(u = 3) = abs(i - j) < u; block a { mask = near }",
        ),
        (
            "let w = 3; let u = w + 1; block a(v = u) { mask = window(v) }",
            "block a(v = 4) { mask = window(v) }",
        ),
        (
            "let t = 4; score tabled { param z[t] = 0; s + z[i - j] }; block a { score = tabled }",
            "score tabled { param z[4] = 0; s + z[i - j] }; block a { score = tabled }",
        ),
        (
            "let t = 4; mix m { state S[t] = t; S <- S + sum(k); o <- sum(S) * v }\n"
            "block a { mix = m; mask = causal }",
            "mix m { state S[4] = 4; S <- S + sum(k); o <- sum(S) * v }\n"
            "block a { mix = m; mask = causal }",
        ),
        (
            "let r = 2; stage twice = r * x; block a { q = x | linear | twice | split }",
            "stage twice = 2 * x; block a { q = x | linear | twice | split }",
        ),
    ],
)  # fmt: skip
def test_a_let_of_a_file_is_seen_in_definitions(text: str, plain: str) -> None:
    same(text, plain)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "let w = 9; mask near(w) = abs(i - j) < w; block a { mask = near(2) }",
            "mask near(w) = abs(i - j) < w; block a { mask = near(2) }",
        ),
        (
            "let g = 9; score f { let g = x | linear(1); s + g[i] }; block a { score = f }",
            "score f { let g = x | linear(1); s + g[i] }; block a { score = f }",
        ),
        (
            "let c = 9; block a { let c = x | linear(8); k = c | linear | split }",
            "block a { let c = x | linear(8); k = c | linear | split }",
        ),
        (
            "let w = 9; mix m { state S = 0; w <- sum(k); S <- S + w; o <- S * v }\n"
            "block a { mix = m; mask = causal }",
            "mix m { state S = 0; w <- sum(k); S <- S + w; o <- S * v }\n"
            "block a { mix = m; mask = causal }",
        ),
    ],
)  # fmt: skip
def test_own_names_hide_a_let_of_the_file(text: str, plain: str) -> None:
    same(text, plain)


def test_a_let_of_a_file_is_the_default_of_a_models_parameter() -> None:
    text = "let d = 2; block a {}; model m(count = d) { width = 512; layers = [a] * count }"
    found = find(check(parse(text.replace("; ", "\n"))), "m")
    assert isinstance(found, Model)
    assert len(found.layers) == 2


def test_a_let_with_a_hole_is_one_draw_in_definitions_too() -> None:
    text = """
        let w = pow2(4..16)
        mask near = abs(i - j) < w
        mask far(u = w) = abs(i - j) >= u
        block a { mask = near; dropout = w / 100 }
        block b { mask = far }
    """
    file = parse(text)
    assert [each.name for each in holes(file)] == ["w"]
    arch = check(draw(file, First()))
    assert arch.blocks["a"] == block("block a { mask = abs(i - j) < 4; dropout = 0.04 }")
    assert arch.blocks["b"] == block("block b { mask = abs(i - j) >= 4 }", "b")


def test_a_default_reads_the_parameters_before_it() -> None:
    same(
        "mask band(c = 3, d = c - 1) = d <= i - j < 2 * c; block a { mask = band(5) }",
        "block a { mask = 4 <= i - j < 10 }",
    )
    same(
        "block a(c = 3, d = c - 1) { mask = window(d) }",
        "block a { mask = window(2) }",
    )
    same(
        "mask band(c = 3, d = c - 1) = d <= i - j < 2 * c; block a { mask = band(d = 1) }",
        "block a { mask = 1 <= i - j < 6 }",
    )


def test_a_default_does_not_read_the_parameters_after_it() -> None:
    assert refused("mask band(c = d, d = 3) = c <= i - j < d; block a { mask = band }") == ["L201"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("score f { let d = 3; s / d }; block a { score = f }", "block a { score = s / 3 }"),
        (
            "score f(c) { let d = abs(i - j); let e = c * d; s - e * d }; block a { score = f(2) }",
            "block a { score = s - (2 * abs(i - j)) * abs(i - j) }",
        ),
        (
            "mask f { let near = abs(i - j) < 3; near and causal }; block a { mask = f }",
            "block a { mask = abs(i - j) < 3 and j <= i }",
        ),
        (
            "score f { param z = 2; let d = 2 * z; let t = x | linear(heads); let u = t[i, h] * d\n"
            "s + u }; block a { score = f }",
            "score f { param z = 2; let t = x | linear(heads); s + t[i, h] * (2 * z) }\n"
            "block a { score = f }",
        ),
        (
            "score f { let d = 4; param z[d] = 0; let t = x | linear(d); s + t[i, 0] + z[h] }\n"
            "block a { score = f }",
            "score f { param z[4] = 0; let t = x | linear(4); s + t[i, 0] + z[h] }\n"
            "block a { score = f }",
        ),
        (
            "score f { let t = (x | linear(heads)) * 2; s + t[i, h] }; block a { score = f }",
            "score f { let t = x | linear(heads) | scale(2); s + t[i, h] }; block a { score = f }",
        ),
        (
            "normalize f { let e = exp(2 * s); e / sum }; block a { normalize = f }",
            "normalize f = exp(2 * s) / sum; block a { normalize = f }",
        ),
        (
            "normalize f { let e = s - tau; relu(e) where sum == 1 }; block a { normalize = f }",
            "normalize f = relu(s - tau) where sum == 1; block a { normalize = f }",
        ),
        (
            "weights f { let e = p / 2; e * where(i == j, 1, 2) }; block a { weights = f }",
            "block a { weights = (p / 2) * where(i == j, 1, 2) }",
        ),
    ],
)  # fmt: skip
def test_a_let_of_a_definition_is_a_number_or_a_stream(text: str, plain: str) -> None:
    same(text, plain)


def test_a_number_of_a_definition_reads_what_stands_above() -> None:
    assert refused("score f { let d = e; let e = 3; s / d }; block a { score = f }") == ["L201"]
    assert refused("score f { let d = 2; let d = 3; s / d }; block a { score = f }") == ["L211"]
    assert refused("score f { let i = 3; s / i }; block a { score = f }") == ["L215"]


def test_a_threshold_is_written_in_place() -> None:
    plain = "normalize f = relu(s - tau) where sum == 1; block a { normalize = f }"
    text = "let one = 1; block a(c = 1) { normalize = relu(c * s - tau) where sum == one }"
    found, other = block(text).mixings["o"].mix, block(plain).mixings["o"].mix
    assert isinstance(found, Pairwise)
    assert isinstance(other, Pairwise)
    assert (found.normalize.numerator, found.normalize.where) == (
        other.normalize.numerator,
        other.normalize.where,
    )
    same("normalize f = relu(s - tau); block a { normalize = f where sum == 1 }", plain)
    space = parse("block a { normalize = relu(choose(1, 2) * s - tau) where sum == 1 }")
    assert "where sum == 1" in format_loom(draw(space, First()))


@pytest.mark.parametrize(
    "text",
    [
        "block a { normalize = relu(s) where sum == 1 }",
        "block a { normalize = relu(s - tau) where sum == 2 }",
        "block a { score = s where sum == 1 }",
        "mask f = j <= i where sum == 1; block a { mask = f }",
        "block a { heads = 4 where sum == 1 }",
        "block a { heads = 2 }\nmodel m { width = 8; layers = [a] where sum == 1 }",
    ],
)
def test_a_condition_that_fixes_nothing_is_refused(text: str) -> None:
    assert refused(text) == ["L220"]


@pytest.mark.parametrize(
    ("setting", "plain"),
    [
        ("score = where(causal, s, 0)", "score = where(j <= i, s, 0)"),
        ("score = where(window(3) and not causal, s, 0)",
         "score = where(abs(i - j) < 3 and not (j <= i), s, 0)"),
        ("weights = where(causal, p, 0)", "weights = where(j <= i, p, 0)"),
        ("normalize = relu(where(strided(2), s, 0)) / seen",
         "normalize = relu(where((i - j) % 2 == 0, s, 0)) / seen"),
    ],
)  # fmt: skip
def test_a_mask_is_a_truth_in_scores(setting: str, plain: str) -> None:
    same(f"block a {{ {setting} }}", f"block a {{ {plain} }}")
