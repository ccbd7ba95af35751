"""Text → tokens, as Lark's parser asks for them, without the line ends that end no statement."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from lark import Token
from lark.common import LexerConf
from lark.exceptions import UnexpectedCharacters
from lark.lexer import BasicLexer, LexerState
from lark.parsers.lalr_parser_state import ParserState


class TokenReader(BasicLexer):
    """Reads the first terminal that fits among those that the parser takes where it stands.

    So does Lark's contextual lexer, which compiles an expression of terminals for each of the
    parser's states. Here one of all terminals is enough, but for the few places where the first
    that fits is not taken: `model` where it is the name of a setting, `<-` in `x<-1 and y`.
    """

    __future_interface__ = 2  # Lark hands `lex` the parser's state

    def __init__(self, conf: LexerConf) -> None:
        super().__init__(conf)
        self._conf = conf
        self._always = {*conf.ignore, *LineEnds.always_accept}
        self._narrow: dict[frozenset[str], BasicLexer] = {}

    def lex(self, lexer_state: LexerState, parser_state: ParserState[int]) -> Iterator[Token]:
        """Yield the tokens of a text, each when the parser has taken those before."""
        states = parser_state.parse_conf.parse_table.states
        while True:
            try:
                token = self.next_token(lexer_state, parser_state)
            except EOFError:
                return
            taken = states[parser_state.position]
            if token.type not in taken and token.type not in self._always:
                token = self._read_again(token, lexer_state, frozenset(taken))
            yield token

    def _read_again(self, token: Token, state: LexerState, taken: frozenset[str]) -> Token:
        """Read one of the taken terminals in place of a token; where none fits, give it back.

        It is of one line: those that are not are always taken.
        """
        if taken not in self._narrow:
            conf = copy(self._conf)
            conf.terminals = [each for each in self.terminals if each.name in taken | self._always]
            self._narrow[taken] = BasicLexer(conf)
        at, length = state.line_ctr, len(token)
        at.char_pos, at.column = at.char_pos - length, at.column - length
        try:
            return self._narrow[taken].next_token(state)
        except UnexpectedCharacters:
            at.char_pos, at.column = at.char_pos + length, at.column + length
            return token


class TooDeepError(Exception):
    """Its argument is the bracket that is one too many."""


class LineEnds:
    """Drop the line ends that do not end a statement.

    They do not inside ( ) and [ ] and after an operator; the grammar itself passes over those
    that stand before a `|`, `or`, `and` or `where`.
    """

    always_accept = ("NEWLINE",)
    _unfinished = frozenset(
        {"OR", "AND", "NOT", "COMPARE", "EQUAL", "VBAR", "COMMA", "COLON", "_BECOMES"}
    ) | {"PLUS", "MINUS", "STAR", "SLASH", "SLASHES", "PERCENT", "AT", "POWER"}

    def __init__(self, most: int) -> None:
        self._most = most  # open brackets

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        depth = 0
        last = ""
        for token in stream:
            if token.type == "NEWLINE":
                if depth == 0 and last not in self._unfinished:
                    yield token
                continue
            if token.type in ("LPAR", "LSQB"):
                depth += 1
                if depth > self._most:
                    raise TooDeepError(token)
            elif token.type in ("RPAR", "RSQB"):
                depth = max(0, depth - 1)
            last = token.type
            yield token
