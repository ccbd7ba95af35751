"""Whatever the text, the answer is a tree or a `LoomError`, and soon."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headloom.grammar.diagnostics import LoomError
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import MAX_BYTES, parse, parse_expression, read

N = 50_000
SOON = 20.0  # seconds; the worst takes less than two here

some = settings(derandomize=True, deadline=None, max_examples=200)
words = st.lists(
    st.sampled_from(
        ["block", "mask", "model", "search", "let", "branch", "param", "where", "not", "or", "a",
         "{", "}", "(", ")", "[", "]", "=", "==", "<-", "|", "..", ":", ",", ";", "\n", "8", "-",
         '"', "#", "\r", "\t", "\\", "&a", "*a", "- ", "? ", ": ", "'", "!!int", "%", "\x85"]
    ),
    max_size=30,
).map(" ".join)  # fmt: skip


def attempt(read_text, text):
    found = None
    try:
        read_text(text)
    except LoomError as problem:
        found = problem
    if found is not None:
        assert found.diagnostics
        assert str(found)
        assert all(each.to_json()["line"] >= 1 for each in found.diagnostics)


@some
@given(st.text() | words)
def test_any_text(text):
    attempt(parse, text)
    attempt(parse_expression, text)
    attempt(parse_yaml, text)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "a.loom"
    path.write_bytes(content)
    attempt(lambda each: parse(read(each)), path)
    attempt(lambda each: parse_yaml(read(each)), path)


@pytest.mark.parametrize(
    "text",
    [
        "(" * N + "x" + ")" * N, "[" * N + "]" * N, "(" * N, "-" * N + "x", "not " * (N // 2) + "x",
        "1" + "+1" * N, "1" + "**2" * (N // 2), "a" + "[0" * N, "f(" * N + ")" * N, "a" + ".b" * N,
        "9" * N, "1" * N + "x", "x" + " | f" * (N // 2), '"' + "a" * N, "a" + " < a" * (N // 2),
        "\n" * N + "?", "# c\n" * (N // 2), "{" * N, "branch a {" * (N // 10),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_huge_texts_are_answered_soon(text):
    start = time.monotonic()
    for whole in (f"let a = {text}", text):
        attempt(parse, whole)
    assert time.monotonic() - start < SOON


@pytest.mark.parametrize(
    "text",
    [
        "let: {a: " + "[" * N + "]" * N + "}", "{" * N, "- " * N, "? " * N, "[" * N, "'" + "a" * N,
        "\n".join(" " * depth + "a:" for depth in range(500)),
        "let: {" + "a: 1, " * (N // 10) + "}",
        "let:\n" + "".join(f"  a{n}: {n}  # c\n" for n in range(5000)), "#\n" * N, "\n" * N,
        "blocks:\n" + "".join(f"  a{n}: {{}}\n" for n in range(5000)) + "# c\n" * 5000,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_huge_yaml_is_answered_soon(text):
    start = time.monotonic()
    attempt(parse_yaml, text)
    assert time.monotonic() - start < SOON


def test_an_alias_bomb_does_not_go_off():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    start = time.monotonic()
    with pytest.raises(LoomError, match="L112"):
        parse_yaml("\n".join(lines))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("read_text", [parse, parse_yaml, parse_expression])
def test_too_large_a_text_is_refused_at_once(read_text):
    with pytest.raises(LoomError, match="L001"):
        read_text("a" * (MAX_BYTES + 1))


def test_large_sizes_are_only_numbers():
    (block,) = parse("block a { heads = 1000000000000 }").items
    assert block.body[0].value.value == 10**12
