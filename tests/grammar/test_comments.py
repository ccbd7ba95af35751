from __future__ import annotations

import re

import pytest
from hypothesis import given, settings

from headloom.grammar.format import format_loom, format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse
from headloom.grammar.syntax import Comments

from .strategies import files

LOOM = """\
# file
block a(w = 64, # inside
  v = 2) {  # beside a
  # above heads
  heads = 8  # beside heads

  q = x
    # inside q
    | linear  # beside q
  branch b { # beside b
    k = 1; v = 2 # beside v
    # closing b
  } # after b
  # closing a
} # after a
# above near
mask near = abs(i - j) < 4 # beside near
# closing file
"""

YAML = """\
# file
blocks:  # group
  a(w = 64):  # beside a
    # above heads
    heads: 8  # beside heads
    q: x  # beside q
    branches:
      b: # beside b
        k: 1
        v: 2 # beside v
        # closing b
    # closing a
# above near
masks:
  near: abs(i - j) < 4 # beside near
# closing file
"""


def test_every_comment_of_loom_finds_its_node():
    file = parse(LOOM)
    block, near = file.items
    heads, q, branch = block.body
    assert block.comments == Comments(("# file", "# inside"), "# beside a")
    assert heads.comments == Comments(("# above heads",), "# beside heads")
    assert q.comments == Comments(("# inside q",), "# beside q")
    assert branch.comments == Comments((), "# beside b")
    assert branch.body[1].comments == Comments((), "# beside v")
    assert branch.closing == ("# closing b", "# after b")
    assert block.closing == ("# closing a", "# after a")
    assert near.comments == Comments(("# above near",), "# beside near")
    assert file.closing == ("# closing file",)


def test_every_comment_of_yaml_finds_its_node():
    file = parse_yaml(YAML)
    block, near = file.items
    heads, q, branch = block.body
    assert block.comments == Comments(("# file", "# group"), "# beside a")
    assert heads.comments == Comments(("# above heads",), "# beside heads")
    assert q.comments == Comments((), "# beside q")
    assert branch.comments == Comments((), "# beside b")
    assert branch.body[1].comments == Comments((), "# beside v")
    assert branch.closing == ("# closing b",)
    assert block.closing == ("# closing a",)
    assert near.comments == Comments(("# above near",), "# beside near")
    assert file.closing == ("# closing file",)


@pytest.mark.parametrize(
    "text",
    ["let a = 1 # c", "# c", "# c\nlet a = 1", "let a = f( # c\n  1)", "block a { b = 1 } # c",
     "block a { # c\n}", "block a {\n# c\n}", "block a { b = 1; # c\n c = 2 }", "let a = # c\n 1",
     'let a = "# d" # c', "mask a { # c\n i }", "search { # c\n}", "# c\r\nlet a = 1\r\n"],
)  # fmt: skip
def test_no_comment_is_lost(text):
    formatted = format_loom(parse(text))
    assert formatted.count("# c") == 1
    assert "# c" in format_yaml(parse(text))
    assert format_loom(parse(formatted)) == formatted


@pytest.mark.parametrize(
    "text",
    ["let: {a: 1} # c", "let: # c\n  a: 1", "# c\n", "let: {a: [1, # c\n 2]}", "let: {a: '1 # c'}",
     "blocks:\n  a: {} # c", "blocks:\n  a: {}\n    # c", "let:\n  a: | # c\n    1", "--- # c\n",
     "mixers:\n  a:\n  # c\n  - q", "mixers:\n  a:\n  - q # c\n", "search: {} # c",
     "blocks:\n  a:\n    base: b # c\n    q: x", "blocks:\n  a:\n    q: 'x' # c\n"],
)  # fmt: skip
def test_no_comment_of_yaml_is_lost(text):
    formatted = format_yaml(parse_yaml(text))
    assert formatted.count("# c") == 1
    assert format_yaml(parse_yaml(formatted)) == formatted


@settings(derandomize=True, deadline=None, max_examples=30)
@given(files())
def test_comments_pass_from_form_to_form(file):
    count = len(re.findall("#", format_loom(file)))
    assert len(re.findall("#", format_loom(parse_yaml(format_yaml(file))))) == count


def test_gaps_between_comments_stay():
    text = "# what this file is\n\n# about a\nblock a {\n  # one\n\n  # two\n  heads = 8\n}\n"
    file = parse(text)
    assert file.items[0].comments.above == ("# what this file is", "", "# about a")
    assert file.items[0].body[0].comments.above == ("# one", "", "# two")
    assert format_loom(file) == text
    assert format_loom(parse_yaml(format_yaml(file))) == text
