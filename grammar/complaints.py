"""What the lexer and the parser complain about, in the words of someone who writes Loom.

Lark says "Unexpected token Token('$END', '')"; we say where the text stops, what would have
been accepted there, and blank the statement at fault so that the rest can be read too.

    block a {          error[L101]: the text ends too early
      heads = 8          = help: close the `{` of line 1
"""

from __future__ import annotations

import re

from lark import Token, UnexpectedInput
from lark.exceptions import UnexpectedCharacters

from .diagnostics import Diagnostic, did_you_mean
from .source import Piece

END = "nothing follows"
AS_YAML = "this is YAML: let the file's name end in `.yaml`"
APART = "something new begins here"

_STARTS = {
    "block": "block NAME { … }", "layer": "layer NAME { … }", "ffn": "ffn NAME { … }",
    "model": "model NAME { … }", "search": "search { … }",
    "mask": "mask NAME = …", "score": "score NAME = …", "normalize": "normalize NAME = …",
    "similarity": "similarity NAME = …", "weights": "weights NAME = …",
    "mix": "mix NAME { … }", "stage": "stage NAME = | …",
    "let": "let NAME = …",
}  # fmt: skip
_ITEMS = ("block", "layer", "ffn", "model", "search")
_WANTED = (
    ("RBRACE", "close the `{`"), ("RPAR", "close the `(`"), ("RSQB", "close the `[`"),
    ("NUMBER", "an expression belongs here"), ("EQUAL", "write `name = expression`"),
    ("LBRACE", "write `{ … }`"), ("NAME", "a name belongs here"),
)  # fmt: skip
_OPERATORS = frozenset(("PLUS", "STAR", "SLASH", "SLASHES", "PERCENT", "AT", "POWER", "COMPARE"))
_VALUES = frozenset(("NUMBER", "STRING"))
_CLOSING = {"RBRACE": "{", "RPAR": "(", "RSQB": "["}
_BEGINS = re.compile(
    r"(let|param|const|state|branch|block|layer|ffn|model|mask|similarity|score|normalize|weights|mix|stage)"
    r"[ \t]+(?!(?:or|and|not)\b)[A-Za-z_]|search[ \t]*\{|[A-Za-z_]\w*[ \t]*(=(?!=)|<-)"
)
_VALUE = re.compile(r"[^\n;{}#]*")  # the rest of a setting
_DEFINES = re.compile(r"\w+[ \t]*[=({]")  # what follows the kind of a definition
_BRACKETS = re.compile(r'"[^"\n]*"|#[^\n]*|[][(){}]')


def explain(problem: UnexpectedInput, piece: Piece) -> Diagnostic:
    """Turn a lexer's or parser's complaint into a diagnostic in the user's terms."""
    if isinstance(problem, UnexpectedCharacters):
        return _bad_character(problem, piece)
    token: Token | None = getattr(problem, "token", None)
    expected = _accepted(problem)
    if token is None or token.type == "$END":
        at = max(0, len(piece.text.rstrip()) - 1)
        help = _wanted(expected - {"NEWLINE"}, piece, len(piece.text))
        return Diagnostic("L101", "the text ends too early", piece.span(at, at + 1), END, help)
    start = token.start_pos or 0
    span = piece.span(start, start + max(1, len(token)))
    if missing := _missing(token, expected, piece):
        return Diagnostic(
            "L101",
            f"{missing} is missing before `{token}`",
            span,
            APART,
            "write one statement a line, or `;` between them",
        )
    if token.type == "NEWLINE":
        help = _wanted(expected, piece, start)
        return Diagnostic("L101", "the line ends too early", piece.span(start, start + 1), "", help)
    help = _instead(token, expected, piece)
    return Diagnostic("L101", f"`{token}` is not expected here", span, "", help)


def _missing(token: Token, expected: set[str], piece: Piece) -> str:
    """Return what two statements, or two values, on one line lack between them."""
    start = token.start_pos or 0
    before = _before(piece.text, start)
    if "NEWLINE" not in expected or "_BLOCK" in expected or before in _STARTS:
        return ""
    if _BEGINS.match(piece.text, start):  # `let NAME`, `block NAME`, `NAME = …`, `NAME <- …`
        return "`;` or a new line"
    value = token.type in _VALUES or str(token).isidentifier()
    if not value or before.isidentifier() or before == "}":
        return ""
    return "`;`, a new line or an operator"


def _before(text: str, at: int) -> str:
    """Return what stands of a statement before an offset; `}` where it is nothing but that."""
    start = _statement_start(text, at)
    return text[start:at].strip() or text[max(0, start - 1) : start]


def _instead(token: Token, expected: set[str], piece: Piece) -> str:
    """Return what to write where a token is not expected."""
    start = token.start_pos or 0
    before = _before(piece.text, start)
    if "_BLOCK" in expected:
        if piece.text[start + len(token) :].lstrip(" ").startswith(":"):
            return AS_YAML
        tops = ", ".join(f"`{each}`" for each in _STARTS.values())
        return did_you_mean(str(token), _STARTS) or f"at the top level stand: {tops}"
    if token.type in _OPERATORS and not piece.text[:start].rpartition("\n")[2].strip():
        return "a line goes on inside `( )`, and after an operator: end the line above with it"
    if token.startswith("=") and piece.text[max(0, start - 1)] == "=":
        return "write `=` to set, `==` to compare"
    if "NEWLINE" in expected and before.isidentifier() and before not in _ITEMS:
        if token.type == "COLON":
            value = _VALUE.match(piece.text, start + 1)
            written = (value[0].strip() if value else "") or "…"
            return f"write `{before} = {written}`; `{before}: {written}` is YAML"
        value_follows = token.type in _VALUES or token.isidentifier()
        if value_follows and not _DEFINES.match(piece.text, start):
            return f"write `{before} = {token}`"
    if token.type in _CLOSING and not _opened(piece, start, _CLOSING[token.type]):
        return "nothing is open that it closes"
    return _wanted(expected, piece, start)


def _bad_character(problem: UnexpectedCharacters, piece: Piece) -> Diagnostic:
    at = problem.pos_in_stream or 0
    char = piece.text[at]
    span = piece.span(at, at + 1)
    if char == '"':
        return Diagnostic("L102", "this string does not end", span, "", 'close it with `"`')
    if char.isdigit():
        help = "a name begins with a letter, a number ends in K, M, G, Ki, Mi, Gi or a digit"
        return Diagnostic("L102", "this number cannot be read", span, "", help)
    if char.isalpha():
        help = "names are made of a-z, A-Z, 0-9 and _"
    else:
        help = {"'": 'strings stand in `"`', "&": "write `and`", "!": "write `not`"}.get(char, "")
    return Diagnostic("L102", f"{char!r} does not belong in a description", span, "", help)


def _accepted(problem: UnexpectedInput) -> set[str]:
    """Return the terminals that could have stood here.

    What a state of an LALR table expects includes what only other roads to it allow, so that
    the parser tries each one (`accepts`) where it can.
    """
    return set(getattr(problem, "accepts", ()) or getattr(problem, "expected", ()) or ())


def _wanted(expected: set[str], piece: Piece, at: int) -> str:
    if "NEWLINE" in expected and "NUMBER" not in expected and piece.text[at : at + 1] != "}":
        words = piece.text[_statement_start(piece.text, at) : at].split()
        # `block b`: not two names that should not share a line, but a brace left open above.
        if not ("RBRACE" in expected and len(words) == 1 and words[0] in _STARTS):
            return "write one statement a line, or `;` between them"
    for terminal, help in _WANTED:
        if terminal in expected:
            bracket = _CLOSING.get(terminal)
            return help + (_opened(piece, at, bracket) if bracket else "")
    return ""


def _opened(piece: Piece, at: int, bracket: str) -> str:
    """Return ` of line 3`: where the innermost open bracket of a kind stands."""
    stack: list[int] = []
    for match in _BRACKETS.finditer(piece.text, 0, at):
        if match[0] in "{([":
            stack.append(match.start())
        elif match[0] in "})]" and stack:
            stack.pop()
    for start in reversed(stack):
        if piece.text[start] == bracket:
            line, _ = piece.source.position(piece.span(start, start + 1).start)
            return f" of line {line}"
    return ""


def _statement_start(text: str, at: int) -> int:
    return max(text.rfind(mark, 0, at) for mark in "\n;{}") + 1


def with_separator(text: str, at: int) -> tuple[str, bool]:
    """Put the `;` that is missing in place of the space before an offset."""
    if text[max(0, at - 1)] not in " \t":
        return text, False
    return f"{text[: at - 1]};{text[at:]}", True


def without_statement(text: str, at: int) -> tuple[str, bool]:
    """Replace the statement around an offset by spaces, so that the rest can be read too."""
    at = min(at, max(0, len(text) - 1))
    start = _statement_start(text, at)
    ends = [end for mark in "\n;}" if (end := text.find(mark, at)) >= 0]
    end = min(ends, default=len(text))
    middle = text[start:end]
    if not middle.strip() or "{" in middle:
        return text, False
    return text[:start] + " " * (end - start) + text[end:], True
