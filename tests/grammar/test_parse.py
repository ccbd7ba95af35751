from __future__ import annotations

import pytest

from headloom.grammar import syntax
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse, parse_expression, parse_piece, read
from headloom.grammar.source import Piece, Source
from headloom.grammar.syntax import Binary, Call, Compare, Name, Number, Pipe, Unary

i, j, x = Name("i"), Name("j"), Name("x")


def problems(text: str) -> list[tuple[str, int, int, str]]:
    with pytest.raises(LoomError) as caught:
        parse(text)
    found = caught.value.diagnostics
    return [(each.code, *each.span.source.position(each.span.start), each.help) for each in found]


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("x | linear(4) | silu", Pipe(x, (Call("linear", (Number(4),)), Name("silu")))),
        ("| linear", Pipe(None, (Name("linear"),))),
        ("i - j - 1", Binary("-", Binary("-", i, j), Number(1))),
        ("2 ** i ** j", Binary("**", Number(2), Binary("**", i, j))),
        ("-i ** 2", Unary("-", Binary("**", i, Number(2)))),
        ("2 ** -i", Binary("**", Number(2), Unary("-", i))),
        ("not i < j", Unary("not", Compare((i, j), ("<",)))),
        ("0 <= i <-1", Compare((Number(0), i, Unary("-", Number(1))), ("<=", "<"))),
        ("1..2", syntax.Range(Number(1), Number(2))),
        ("x.k", syntax.Attribute(x, "k")),
        ("x[i, j]", syntax.Index(x, (i, j))),
        ("f(i, k = j,)", Call("f", (i,), (syntax.Keyword("k", j),))),
        ("[i, j,]", syntax.ListOf((i, j))),
        ('"a # b"', syntax.String("a # b")),
    ],
)
def test_expressions(text, tree):
    assert parse_expression(text) == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [("10_000", 10_000), ("64Ki", 65536), ("1.5K", 1500), (".5", 0.5), ("1e-4", 1e-4),
     ("1000000000000", 10**12), ("2M", 2_000_000)],
)  # fmt: skip
def test_numbers(text, value):
    number = parse_expression(text)
    assert isinstance(number, Number)
    assert (number.value, type(number.value), number.text) == (value, type(value), text)


@pytest.mark.parametrize("name", ["model", "search", "block", "mask", "where"])
def test_a_setting_may_be_called_like_an_item(name):
    (block,) = parse(f"block a {{\n  a = 1\n  b = 2\n  {name} = 3\n}}").items
    assert block.body[2] == syntax.Setting(name, Number(3))


def test_lines_go_on_where_they_are_unfinished():
    text = "block a {\n q = x\n   # why\n   | linear(\n  4\n)\n m = i\n   or j\n k =\n  2\n}"
    (block,) = parse(text).items
    assert [each.name for each in block.body] == ["q", "m", "k"]


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# only a comment", "  \t\n", "\ufeff# mark", ";;"],
)
def test_nothing_is_a_file(text):
    assert parse(text) == syntax.File(())


def test_line_ends_and_tabs_of_other_systems():
    text = "block a {\n  heads = 8\n\tmask = i # c\n    or j\n}\n"
    assert parse(text.replace("\n", "\r\n")) == parse("\ufeff" + text) == parse(text)


def test_spans_point_at_the_words():
    source = Source("a.loom", "\ufefflet a = 1 + (b)\n")
    (let,) = parse(source).items
    right = let.value.right
    assert source.text[right.span.start : right.span.end] == "(b)"
    assert right.span.where == "a.loom:1:14"


def test_a_piece_stands_in_its_source():
    source = Source("a.yaml", "mask: causal and near(8)")
    call = parse_piece(Piece(source, 6, 24, source.text[6:]), "expression").right
    assert source.text[call.span.start : call.span.end] == "near(8)"
    inexact = parse_piece(Piece(source, 6, 24, "a + b", exact=False), "expression")
    assert (inexact.right.span.start, inexact.right.span.end) == (6, 24)


GOES_ON = "a line goes on inside `( )`, and after an operator: end the line above with it"


@pytest.mark.parametrize(
    ("text", "code", "line", "column", "help"),
    [
        ("blok a {}", "L101", 1, 1, "did you mean `block`?"),
        ("block a {\n  heads = 8\n", "L101", 2, 11, "close the `{` of line 1"),
        ("block a {\n  heads = 8\nblock b {\n}", "L101", 3, 7, "close the `{` of line 1"),
        ("block a {\n  q = f(4\n  k = 3\n}", "L101", 3, 3, "close the `(` of line 2"),
        ("let a = [1, 2", "L101", 1, 13, "close the `[` of line 1"),
        ("let a == 3", "L101", 1, 8, "write `=` to set, `==` to compare"),
        ("let a =\n", "L101", 1, 7, "an expression belongs here"),
        ("block a { heads 8 }", "L101", 1, 17, "write `heads = 8`"),
        ("block a { mask causal }", "L101", 1, 16, "write `mask = causal`"),
        ("block a { heads: 8 }", "L101", 1, 16, "write `heads = 8`; `heads: 8` is YAML"),
        ("blocks:\n  a: {}", "L101", 1, 1, "this is YAML: let the file's name end in `.yaml`"),
        ("blocka {}", "L101", 1, 1, "did you mean `block`?"),
        ("block a { } }", "L101", 1, 13, "nothing is open that it closes"),
        ("block a { b = 8", "L101", 1, 15, "close the `{` of line 1"),
        ("block a { b = 8\nmask near = i", "L101", 2, 6, "close the `{` of line 1"),
        ("block a { b = 8 8 }", "L101", 1, 17, "write one statement a line, or `;` between them"),
        ("block a {\n b = 8\n}\n}", "L101", 4, 1, ""),
        ("block a {\n  s = i\n  + j\n}", "L101", 3, 3, GOES_ON),
        ("block a {\n  s = i # c\n    ** 2\n}", "L101", 3, 5, GOES_ON),
        ("block é {}", "L102", 1, 7, "names are made of a-z, A-Z, 0-9 and _"),
        ('let a = "b', "L102", 1, 9, 'close it with `"`'),
        ("let a = 'b'", "L102", 1, 9, 'strings stand in `"`'),
        ("let a = b & c", "L102", 1, 11, "write `and`"),
        ("let a = \0", "L102", 1, 9, ""),
    ],
)
def test_the_first_error_is_placed_and_helped(text, code, line, column, help):
    first, *_ = problems(text)
    assert first[:3] == (code, line, column)
    assert first[3] == help or not help


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("block a { branch b { } branch c { } }", "branch"),
        ("block a { branch b { } heads = 8 }", "heads"),
        ("block a { heads = 8 kv_heads = 2 }", "kv_heads"),
        ("block a { branch b { heads = 8 kv_heads = 2 } }", "kv_heads"),
        ("block a { score = s mask = causal }", "mask"),
        ("block a { normalize = relu(s - tau) where sum == 1 heads = 4 }", "heads"),
        ("block a { let g = x let f = x }", "let"),
        ("block a { let g = x param z[heads] = 0 }", "param"),
        ("block a { let g = x const z = 0 }", "const"),
        ("mix m { let g = x state S = 0 }", "state"),
        ("mix m { state S = 0 S <- S + 1 }", "S"),
        ("block a { } block b { }", "block"),
        ("block a { } model b { }", "model"),
        ("block a { } search { trials = 1 }", "search"),
        ("block a { } let c = 1", "let"),
        ("mask a = causal mask b = window(3)", "mask"),
        ("mix m { o <- v } normalize n = s", "normalize"),
    ],
)
def test_statements_on_one_line_need_a_separator(text, word):
    with pytest.raises(LoomError) as caught:
        parse(text)
    (found,) = caught.value.diagnostics
    assert found.message == f"`;` or a new line is missing before `{word}`"
    assert found.help == "write one statement a line, or `;` between them"
    assert text[found.span.start : found.span.end] == word


def test_a_value_may_lack_an_operator():
    with pytest.raises(LoomError, match="`;`, a new line or an operator is missing before `split`"):
        parse("block a { q = x | linear split }")


def test_every_missing_separator_is_found_and_the_rest_is_read():
    text = "block a { heads = 8 kv_heads = 2 mask = = }\nblock b { } block c { }"
    assert [column for _, _, column, _ in problems(text)] == [21, 34, 41, 13]


def test_errors_are_collected_once_each():
    text = "block a { b = }\nblock c { d = 8 8 }\nblock e { f = (3 }\nlet g = $\n"
    assert [each[:3] for each in problems(text)] == [
        ("L101", 1, 15),
        ("L101", 2, 17),
        ("L101", 3, 18),
        ("L102", 4, 9),
    ]
    assert len(problems("block a {\n  q = f(4\n  k = 3\n  l = 4\n}")) == 1
    assert [each[0] for each in problems("let a = $\nlet b = 1e999\n")] == ["L102", "L104"]


def test_files_are_read_or_refused(tmp_path):
    path = tmp_path / "a.loom"
    path.write_text("let a = 1\n", encoding="utf-8")
    assert read(path).text == "let a = 1\n"
    for content in (b"\xff\xfe", b"#" * (1 << 18) + b"#"):
        path.write_bytes(content)
        with pytest.raises(LoomError, match="L001"):
            read(path)
    with pytest.raises(LoomError, match="L001"):
        read(tmp_path)
