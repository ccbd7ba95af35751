from __future__ import annotations

import pytest
from hypothesis import given, settings

from headloom.grammar.format import WIDTH, format_loom, format_yaml, show
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse, parse_expression
from headloom.grammar.syntax import Binary, Number

from .strategies import everything, expressions, files

quiet = settings(derandomize=True, deadline=None, max_examples=80)


@quiet
@given(expressions())
def test_show_is_read_back(expr):
    assert everything(parse_expression(show(expr))) == everything(expr)


@quiet
@given(files())
def test_loom_is_read_back_and_stable(file):
    text = format_loom(file)
    again = parse(text)
    assert everything(again) == everything(file), text
    assert format_loom(again) == text


@quiet
@given(files())
def test_yaml_is_read_back_and_stable(file):
    text = format_yaml(file)
    again = parse_yaml(text)
    assert everything(again) == everything(file), text
    assert format_yaml(again) == text


CASES = {
    "aligned": (
        "block a { heads = 8; kv_heads = 2; let g = x; let gate = x; v = 1; a_very_long_name = 2 }",
        """\
block a {
  heads    = 8
  kv_heads = 2
  let g    = x
  let gate = x
  v = 1
  a_very_long_name = 2
}
""",
    ),
    "items": (
        "mask a = i; mask b = j; score c = s\nlet d = 1; let e = 2; block f {}; block g:f(1) {}",
        """\
mask a = i
mask b = j

score c = s

let d = 1
let e = 2

block f {}

block g : f(1) {}
""",
    ),
    "comments": (
        "# top\nblock a { # beside\nheads = 8 # eight\n# closing\n}\n# end",
        """\
# top
block a {  # beside
  heads = 8  # eight
  # closing
}

# end
""",
    ),
    "odd results": (
        "mask a { x = 1; (state + 1); (where[i]); (| f); (let) where (b) }",
        """\
mask a {
  x = 1
  (state + 1)
  (where[i])
  (| f)
  (let) where b
}
""",
    ),
}


@pytest.mark.parametrize(("text", "formatted"), CASES.values(), ids=CASES)
def test_layout(text, formatted):
    assert format_loom(parse(text)) == formatted
    assert format_loom(parse(formatted)) == formatted
    assert parse(formatted) == parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("((a * b)) + (2 ** (c + 1))", "a * b + 2 ** (c + 1)"), ("a<-1", "a < -1"),
     ("(a - b) - (c - d)", "a - b - (c - d)"), ("(-a) ** 2", "(-a) ** 2"), ("(1).a", "(1).a"),
     ("not (a or b)", "not (a or b)"), ("(a < b) == c", "(a < b) == c"),
     ("f((a | b), [c])", "f(a | b, [c])"), ("10_000 * 64Ki", "10_000 * 64Ki"),
     ("(a | b) | c", "(a | b) | c"), ("(a ** b) ** c", "(a ** b) ** c")],
)  # fmt: skip
def test_show(text, shown):
    assert show(parse_expression(text)) == shown


def test_show_numbers_without_text():
    assert show(Binary("**", Number(-2), Number(0.5))) == "(-2) ** 0.5"


LONG = {
    "terms": (
        "score f(r = i // 32, c = i % 16 // 2, d = j) = log(where(d == r and d == c, exp(t[i, 0]),"
        " 0) + where(d == max(r - 1, 0) and d == c, exp(t[i, 1]), 0) + where(d == r, t[i, 2], 0))",
        """\
score f(r = i // 32, c = i % 16 // 2, d = j) =
    log(where(d == r and d == c, exp(t[i, 0]), 0) +
    where(d == max(r - 1, 0) and d == c, exp(t[i, 1]), 0) + where(d == r, t[i, 2], 0))
""",
    ),
    "indices": (
        "score g { s + head_dim ** -0.5 * (q[h, i, 0] * (across[dx, 0] + down[dy, 0]) + q[h, i, 1]"
        " * (across[dx, 1] + down[dy, 1]) + q[h, i, 2] * (across[dx, 2] + down[dy, 2])); s }",
        """\
score g {
  s + head_dim ** -0.5 * (q[h, i, 0] * (across[dx, 0] + down[dy, 0]) +
      q[h, i, 1] * (across[dx, 1] + down[dy, 1]) + q[h, i, 2] * (across[dx, 2] + down[dy, 2]))
  s
}
""",
    ),
    "loosest first": (
        "mask f = doc[j] == 0 or i == j or sinks and doc[j] % 2 == 1 or own_document and"
        " doc[i] // 2 == doc[j] // 2",
        """\
mask f = doc[j] == 0 or i == j or sinks and doc[j] % 2 == 1
    or own_document and doc[i] // 2 == doc[j] // 2
""",
    ),
}


@pytest.mark.parametrize(("text", "formatted"), LONG.values(), ids=LONG)
def test_long_lines_are_broken_where_they_are_loosest(text, formatted):
    assert format_loom(parse(text)) == formatted
    assert format_loom(parse(formatted)) == formatted
    assert parse(formatted) == parse(text)


def test_long_lines_are_broken_and_read_back():
    call = "f(" + ", ".join(f"argument_{n} = [{n}, {n}]" for n in range(12)) + ")"
    mask = " or ".join(f"(i - j) % {n} == 0" for n in range(2, 14))
    text = f"block a(w = {call}) {{ q = x | {call} | linear | {call}; mask = {mask} }}"
    formatted = format_loom(parse(text))
    assert max(map(len, formatted.splitlines())) <= WIDTH
    assert parse(formatted) == parse(text)
    assert format_loom(parse(formatted)) == formatted
    assert "\n    | linear\n" in formatted
