from __future__ import annotations

import pytest

from headloom.grammar import syntax
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom, format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse
from headloom.grammar.source import Source

LOOM = """\
let rate = 0.5
mask near(w) = abs(i - j) < w
score alibi { const slope[heads] = 2 ** -h; s - slope[h] }
normalize entmax(a) = relu(s - tau) where sum == 1
weights half = p / 2
mix plain(feature = elu1) { state S[head_dim] = 0; S <- S + feature(k); o <- q * S }
mix levels { state S[head_dim] = 0 by exp(k); state z = 0; S <- S + k; o <- q * S }
stage soft = | linear | silu
block local(w = 64) { heads = 8; mask = causal and near(w); let g = x | linear; out = o | gate(g) }
block global : local {
  mask = causal; normalize = relu(s - tau) where sum == 1; branch two { heads = 4 }
}
model tiny { width = 512; layers = [local] * 2 + [global] }
search { model = tiny; minimize = [params, flops] }
"""

YAML = """\
let:
  rate: 0.5

masks:
  near(w): abs(i - j) < w

scores:
  alibi:
    const:
      slope[heads]: 2 ** -h
    value: s - slope[h]

normalizers:
  entmax(a): relu(s - tau) where sum == 1

weights:
  half: p / 2

mixers:
  plain(feature = elu1):
    - state S[head_dim] = 0
    - S <- S + feature(k)
    - o <- q * S

  levels:
    - state S[head_dim] = 0 by exp(k)
    - state z = 0
    - S <- S + k
    - o <- q * S

stages:
  soft: "| linear | silu"

blocks:
  local(w = 64):
    heads: 8
    mask: causal and near(w)
    let:
      g: x | linear
    out: o | gate(g)

  global:
    base: local
    mask: causal
    normalize: relu(s - tau) where sum == 1
    branches:
      two:
        heads: 4

models:
  tiny:
    width: 512
    layers: "[local] * 2 + [global]"

search:
  model: tiny
  minimize: [params, flops]
"""


def test_both_forms_say_the_same():
    assert parse_yaml(YAML) == parse(LOOM)
    assert format_yaml(parse(LOOM)) == YAML


def test_flow_style_of_the_design():
    text = (
        "blocks: {local: {heads: 8, mask: causal and window(256), "
        'let: {g: "x | linear | sigmoid"}}}'
    )
    loom = "block local { heads = 8; mask = causal and window(256); let g = x | linear | sigmoid }"
    assert parse_yaml(text) == parse(loom)


def test_a_list_of_mappings_keeps_the_order():
    text = "block a { let b = 1; heads = b; let c = 2; base = 3; branches = 4 }\n"
    text += "let d = 5\nblock e {}"
    yaml = format_yaml(parse(text))
    assert parse_yaml(yaml) == parse(text)
    assert "- base = 3" in yaml
    assert yaml.count("blocks:") == 2


@pytest.mark.parametrize("text", ["", "# c", "---\n", "{}", "[]", "let: {}", "\ufeff"])
def test_nothing_is_a_file(text):
    assert parse_yaml(text).items == ()


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("let: {a: b + cc}", "cc"),
        ('let: {a: "b + cc"}', "cc"),
        ("let: {a: 'b + cc'}", "cc"),
        ("let:\n  a: |\n    b + cc\n", "|\n    b + cc\n"),
        ('let: {a: "b + \\x63c"}', '"b + \\x63c"'),
        ("let: {a: [b, cc]}", "[b, cc]"),
    ],
)
def test_spans_point_into_the_yaml(text, marked):
    source = Source("a.yaml", text)
    value = parse_yaml(source).items[0].value
    span = value.span if isinstance(value, syntax.ListOf) else value.right.span
    assert text[span.start : span.end] == marked


@pytest.mark.parametrize(
    ("text", "code", "help"),
    [
        ("a: &x 1", "L112", "write the value again"),
        ("let: {a: *x}", "L112", "write the value again"),
        ("let: {a: !!int 1}", "L112", "leave the tag away"),
        ("let: {a: 1}\n---\nlet: {}", "L112", "use a file for each"),
        ("let: {[a]: 1}", "L112", "put the key in quotes"),
        ("let: {a: 1, a: 2}", "L113", "to write statements in any order, use a list of mappings"),
        ("blocks:\n  a:\n  - base: b\n  - base: c", "L113", ""),
        ("blocks:\n  a:\n    heads = 4\n", "L114", "YAML writes `heads: 4`"),
        ("block a {\n  heads = 4\n}\n", "L114", "this is Loom: let the file's name end in `.loom`"),
        ("bloks: {}", "L115", "did you mean `blocks`?"),
        ("blocks: [a]", "L114", "write `blocks: {name: …}`"),
        ("blocks: {a: 8}", "L114", "write a mapping, `{}` where there is nothing to say"),
        ("blocks: {a: {heads: {b: 1}}}", "L114", ""),
        ("blocks: {a: {heads: }}", "L114", "write one, or leave the key away"),
        ("blocks: {a: {branch: 1}}", "L115", "did you mean `branches`?"),
        ("blocks: {a: {kv heads: 1}}", "L115", "a name belongs here"),
        ("scores: {a: {value: s, where: t}}", "L115", "write `value: … where …`"),
        ("- foo", "L114", "write `blocks:`, `models:` …"),
        ("let:\n  a: b: c", "L111", "put the expression in quotes"),
        ("let:\n\ta: 1", "L111", "indent with spaces"),
        ('let: {a: "\\UFFFFFFFF"}', "L111", ""),
        ("let: {a: 1 +}", "L101", "an expression belongs here"),
        ("let: {a: $}", "L102", ""),
        ("let: {a: " + "[" * 70 + "]" * 70 + "}", "L103", ""),
        ('let: {a: [[["' + "[" * 62 + "]" * 62 + '"]]]}', "L103", ""),
        ("blocks:\n  a:\n  - let: {b: 1}\n  - [c]", "L114", "write mappings"),
        ('let: {"a[1]": 2}', "L114", "use `param` or `const`"),
    ],
)
def test_what_is_refused(text, code, help):
    with pytest.raises(LoomError) as caught:
        parse_yaml(text)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert found.help == help or not help


def test_errors_are_collected_in_order():
    with pytest.raises(LoomError) as caught:
        parse_yaml("blocks:\n  a:\n    heads: 8 +\n    heads: (\n    let: 3\nfoo: 1\n")
    codes = [each.code for each in caught.value.diagnostics]
    assert codes == ["L101", "L113", "L101", "L114", "L115"]


@pytest.mark.parametrize(
    "value",
    ['"text"', "| silu", "[a] * 2", "-x", "- x", "a # b", "not a", '"a: b"', "'", "[a[1], b]", "[]",
     "[[a], b]", '"#"', '"\\"', "[f(a, b), c]", "a == b", "x.k", "1..2", '"\ud83d"'],
)  # fmt: skip
def test_scalars_are_quoted_where_yaml_needs_it(value):
    try:
        file = parse(f"let a = {value}")
    except LoomError:
        return
    text = format_yaml(file)
    assert parse_yaml(text) == file
    assert format_loom(parse_yaml(text)) == format_loom(file)


def test_long_keys_are_explicit():
    params = ", ".join(f"p{n} = {n}" for n in range(300))
    file = parse(f"mask a({params}) = i < p0\nblock b({params}) {{ heads = 8 }}")
    assert parse_yaml(format_yaml(file)) == file
