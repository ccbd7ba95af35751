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
            before = copy(lexer_state)
            try:
                token = self.next_token(lexer_state, parser_state)
            except EOFError:
                return
            taken = states[parser_state.position]
            if token.type not in taken and token.type not in self._always:
                token = self._read_again(before, lexer_state, self._of(frozenset(taken))) or token
            yield token

    def _of(self, taken: frozenset[str]) -> BasicLexer:
        """Return the lexer of some terminals."""
        if taken not in self._narrow:
            conf = copy(self._conf)
            conf.terminals = [each for each in self.terminals if each.name in taken | self._always]
            self._narrow[taken] = BasicLexer(conf)
        return self._narrow[taken]

    @staticmethod
    def _read_again(before: LexerState, state: LexerState, lexer: BasicLexer) -> Token | None:
        """Read a token in another way; where there is none the parser is to refuse the first."""
        try:
            token = lexer.next_token(before)
        except (UnexpectedCharacters, EOFError):
            return None
        state.line_ctr, state.last_token = before.line_ctr, before.last_token
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
