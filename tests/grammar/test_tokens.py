from pathlib import Path
from typing import get_args

import pytest
from lark import Lark, UnexpectedInput

from headloom.grammar import parse
from headloom.grammar.tokens import LineEnds, TokenReader


def parser(lexer: str | type) -> Lark:
    grammar = Path(parse.__file__).with_name("loom.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        start=["start", *get_args(parse.Part)],
        lexer=lexer,
        postlex=LineEnds(256),
        maybe_placeholders=False,
    )


CONTEXTUAL, OURS = parser("contextual"), parser(TokenReader)


def outcome(text: str, by: Lark) -> object:
    try:
        return by.parse(text, start="start")
    except UnexpectedInput as problem:
        accepted = getattr(problem, "accepts", None)
        return type(problem), problem.pos_in_stream, str(getattr(problem, "token", "")), accepted


@pytest.mark.parametrize(
    "text",
    [
        "search { model = probe; task = by(where, state) }",
        "block a { mask = i<-1 and j < -i; score = let.block }",
        "mix m { state S[n] = 0 by where; S <- S<-1 }",
        "let by = 2\n  where // 3 # words\n\n  | state",
        "block a { heads = 8\n  or }",
        "block let { }",
        "block a { score = (i <- 1) }",
        "block a { heads = 8é }",
        'block a { heads = "8 }',
        "block a { heads = model",
        "model model : block(param = const) { where = 1 }",
        "",
    ],
)
def test_tokens_are_those_of_the_contextual_lexer(text: str) -> None:
    assert outcome(text, OURS) == outcome(text, CONTEXTUAL)


def test_the_library_is_read_alike() -> None:
    for path in (Path(parse.__file__).parent / "std").glob("*.loom"):
        text = path.read_text(encoding="utf-8")
        assert outcome(text, OURS) == outcome(text, CONTEXTUAL)
