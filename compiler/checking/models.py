"""Models: layers as a list of blocks, and what stands around them.

layers = ([local] * 5 + [global]) * 2      → twelve blocks, in order
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from ...grammar import syntax
from ...grammar.diagnostics import Diagnostic, did_you_mean, error
from ...grammar.syntax import Binary, Call, Expr, ListOf, Name
from ...ops import Shape
from ..model import Block, FeedForward, Model
from .blocks import Draft, Sizes, draft_block
from .inheritance import SETTINGS as OF_BLOCKS
from .library import Library, bind, parsed, put, statement_exprs
from .previous import stack
from .scope import Findings, Scope
from .spellings import instead

SETTINGS = {
    "vocab": "none", "width": "", "layers": "", "ffn": "swiglu(8/3)", "norm": "rms",
    "embed_position": "none", "tie": "false", "head": "", "dropout": "0", "patches": "none",
    "encoder": "none",
}  # fmt: skip
MAX_LAYERS = 1024


@cache
def _defaults() -> dict[str, Expr]:
    return parsed("model", SETTINGS)


def elaborate_model(
    library: Library,
    call: Expr,
    warnings: list[Diagnostic] | None = None,
    around: tuple[str, ...] = (),
) -> Model:
    """Return the checked model that `name` or `name(args)` stands for.

    `around` are the models whose encoder this one is, or the encoder of their encoder.
    """
    reader = _Reader(library, call, around)
    model = reader.read(warnings)
    reader.findings.settle()
    assert model is not None
    return model


class _Reader:
    def __init__(self, library: Library, call: Expr, around: tuple[str, ...]) -> None:
        self.library, self.findings, self.around = library, Findings(), around
        self.syntax = find_model(library, call)
        self.settings: dict[str, Expr] = {}
        self.scope = Scope(library, self.findings)
        values = dict(library.lets)
        self._collect(call, values, [])

    def _collect(self, call: Expr, lets: Mapping[str, Expr], open_: list[str]) -> None:
        item = find_model(self.library, call)
        if item.name in open_:
            ring = " : ".join([*open_, item.name])
            raise error("L212", f"`{item.name}` inherits from itself", call.span, ring)
        values = {**lets, **bind(item.name, item.params, call, call.span)}
        if item.base is not None:
            self._collect(put(item.base, values), lets, [*open_, item.name])
        seen: set[str] = set()
        for statement in item.body:
            with self.findings.guard():
                name = getattr(statement, "name", "")
                if name in seen:
                    raise error("L211", f"`{name}` is set twice in one model", statement.span)
                seen.add(name)
                if isinstance(statement, syntax.Let):
                    values[name] = put(statement.value, values)
                elif isinstance(statement, syntax.Setting) and name in SETTINGS:
                    self.settings[name] = put(statement.value, values)
                else:
                    raise error(
                        "L202",
                        f"a model has no setting `{name}`",
                        statement.span,
                        "",
                        self._instead(statement),
                    )

    @staticmethod
    def _instead(statement: syntax.Statement) -> str:
        if isinstance(statement, syntax.Setting):
            return instead(statement, "model", SETTINGS, OF_BLOCKS)
        return "a model is made of settings and `let`"

    def get(self, name: str) -> Expr:
        return self.settings[name] if name in self.settings else _defaults()[name]

    def read(self, warnings: list[Diagnostic] | None) -> Model | None:
        guard = self.findings.guard
        for name in ("width", "layers"):
            if name not in self.settings:
                with guard():
                    raise error("L202", f"a model needs `{name}`", self.syntax.span)
        if self.get("patches") != Name("none"):
            with guard():
                raise error("L221", "`patches` is not available yet", self.get("patches").span)
        self.findings.settle()
        width = self.scope.size(self.get("width"), "`width`")
        self.width = self.scope.numbers["width"] = width
        vocab, ffn = None, None
        layers: tuple[Block, ...] = ()
        encoder: Model | None = None
        positions, classes, dropout = 0, 0, 0.0
        norm = embed_position = head = "none"
        tie = False
        with guard():
            vocab = self._vocab()
        with guard():
            encoder = self._encoder(warnings)
        with guard():
            layers = self._layers(width, encoder, warnings)
        with guard():
            ffn = self._ffn(width)
        with guard():
            norm = self._word("norm", ("rms", "layer", "none"))
        with guard():
            embed_position, positions = self._position()
        with guard():
            head, classes = self._head(vocab)
        with guard():
            tie = self._word("tie", ("true", "false")) == "true"
            if tie and head != "lm":
                raise error("L222", "only a language-model head can be tied", self.get("tie").span)
        with guard():
            dropout = float(self.scope.number(self.get("dropout"), "`dropout`"))
            if not 0 <= dropout < 1:
                raise error("L219", "a dropout rate lies in 0 <= p < 1", self.get("dropout").span)
        if self.findings.diagnostics:
            return None
        return Model(
            self.syntax.name,
            vocab,
            width,
            layers,
            ffn,
            norm,
            embed_position,
            positions,
            tie,
            head,
            classes,
            dropout,
            self.syntax.span,
            encoder,
        )

    def _vocab(self) -> int | None:
        vocab = self.get("vocab")
        return None if vocab == Name("none") else self.scope.size(vocab, "`vocab`")

    def _word(self, name: str, words: tuple[str, ...]) -> str:
        value = self.get(name)
        if not isinstance(value, Name) or value.id not in words:
            shown = ", ".join(f"`{each}`" for each in words)
            raise error(
                "L222",
                f"`{name}` is one of {shown}",
                value.span,
                "",
                did_you_mean(getattr(value, "id", ""), words),
            )
        return value.id

    def _call(self, name: str, words: tuple[str, ...]) -> tuple[str, int, Expr]:
        """Read `word`, or `word(number)`; the number is 0 where there is none."""
        value = self.get(name)
        head = value.id if isinstance(value, Name) else getattr(value, "function", "")
        if head not in words:
            shown = ", ".join(f"`{each}`" for each in words)
            raise error(
                "L222", f"`{name}` is one of {shown}", value.span, "", did_you_mean(head, words)
            )
        args = value.args if isinstance(value, Call) else ()
        if len(args) > 1 or (isinstance(value, Call) and value.keywords):
            raise error("L209", f"`{head}` takes one plain argument", value.span)
        return head, self.scope.size(args[0], f"`{head}`") if args else 0, value

    def _position(self) -> tuple[str, int]:
        head, count, value = self._call("embed_position", ("none", "learned", "sinusoidal"))
        if head == "learned" and not count:
            raise error(
                "L209",
                "`learned` needs the number of positions",
                value.span,
                "",
                "write `learned(1024)`",
            )
        return head, count

    def _head(self, vocab: int | None) -> tuple[str, int]:
        if "head" not in self.settings:
            return ("none" if vocab is None else "lm"), 0
        head, count, value = self._call("head", ("lm", "classify", "none"))
        if head == "lm" and vocab is None:
            raise error("L222", "a language-model head needs a `vocab`", value.span)
        if head == "classify" and not count:
            raise error(
                "L209",
                "`classify` needs the number of classes",
                value.span,
                "",
                "write `classify(10)`",
            )
        return head, count

    def _ffn(self, width: int) -> FeedForward | None:
        value = self.get("ffn")
        if value == Name("none"):
            return None
        if not isinstance(value, Call) or value.function not in ("swiglu", "gelu"):
            given = getattr(value, "function", getattr(value, "id", ""))
            raise error(
                "L222",
                "`ffn` is `swiglu(ratio)`, `gelu(ratio)` or `none`",
                value.span,
                "",
                did_you_mean(given, ("swiglu", "gelu", "none")),
            )
        if len(value.args) != 1 or value.keywords:
            raise error("L209", f"`{value.function}` takes one plain argument", value.span)
        ratio = float(self.scope.number(value.args[0], "the ratio"))
        hidden = 8 * max(1, round(ratio * width / 8))
        if ratio <= 0 or hidden > 1 << 24:
            raise error("L203", "the hidden width is out of range", value.span, f"ratio = {ratio}")
        return FeedForward(value.function, hidden)

    def _encoder(self, warnings: list[Diagnostic] | None) -> Model | None:
        """Return the model that the context passes through first (L227)."""
        call = self.get("encoder")
        if call == Name("none"):
            return None
        around = (*self.around, self.syntax.name)
        name = find_model(self.library, call).name
        if name in around:
            ring = " → ".join([*around, name])
            raise error("L212", f"`{name}` is its own encoder", call.span, ring)
        encoder = elaborate_model(self.library, call, warnings, around)
        if encoder.head != "none":
            raise error(
                "L227",
                "an encoder gives features",
                call.span,
                f"head = {encoder.head} in `{name}`",
                f"set `head = none` in `{name}`",
            )
        if any(block.context_width is not None for block in encoder.blocks):
            raise error(
                "L227", "an encoder has no context", call.span, f"a layer of `{name}` reads one"
            )
        return encoder

    def _layers(
        self, width: int, encoder: Model | None, warnings: list[Diagnostic] | None
    ) -> tuple[Block, ...]:
        context_width = None if encoder is None else encoder.width
        calls = self._list(self.get("layers"))
        if not calls:
            raise error("L203", "a model needs at least one layer", self.get("layers").span)
        place = f"it is layer 0 of `{self.syntax.name}`, the lowest"
        made: dict[Expr, Draft] = {}
        drafts: list[Draft] = []
        reads_layer, reads_below = self._reads_layer(), bool(self.library.read_above)
        for at, call in enumerate(calls):
            with self.findings.guard():
                draft = made.get(call)
                if draft is None or reads_layer or reads_below:
                    below = drafts[-1].scope if drafts else None
                    sizes = Sizes(width, context_width, at, len(calls), below, place)
                    draft = made[call] = draft_block(self.library, call, sizes)
                    self._one_a_token(draft, call)
                drafts.append(draft)
            if reads_below and len(drafts) <= at:
                return ()  # what stands above cannot be checked without it
        self.findings.settle()
        seen: set[Expr] = set()

        def finish(at: int, shared: tuple[str, ...]) -> Block:
            quiet = None if calls[at] in seen else warnings
            seen.add(calls[at])
            return drafts[at].finish(shared, quiet)

        layers = stack([partial(finish, at) for at in range(len(calls))])
        if encoder is not None and not any(block.context_width for block in layers):
            self._unread(warnings)
        return layers

    def _one_a_token(self, draft: Draft, call: Expr) -> None:
        """Check that a layer gives one output a token (L226)."""
        if draft.out.shape.tokens != "n":
            title = draft.scope.title
            raise error(
                "L226",
                f"`{title}` cannot be a layer",
                call.span,
                f"its output is {draft.out.shape}, a layer's {Shape('n', self.width)}",
                "make `out` of streams along the tokens",
            )

    def _unread(self, warnings: list[Diagnostic] | None) -> None:
        if warnings is not None:
            warnings.append(
                Diagnostic(
                    "W002",
                    "`encoder` is never used",
                    self.get("encoder").span,
                    "no layer reads the context",
                    severity="warning",
                )
            )

    def _reads_layer(self) -> bool:
        """Whether any text of the file reads `layer`; then every layer is elaborated anew."""
        library = self.library
        holders: list[syntax.Block | syntax.Definition] = [
            *library.blocks.values(),
            *library.definitions.values(),
        ]
        defaults = [each.default for holder in holders for each in holder.params]
        bases = [each.base for each in library.blocks.values()]
        exprs = [
            expr
            for holder in holders
            for statement in holder.body
            for expr in statement_exprs(statement)
        ]
        return any(
            isinstance(node, Name) and node.id == "layer"
            for expr in (*exprs, *defaults, *bases, *library.lets.values(), self.get("layers"))
            if expr is not None
            for node in syntax.walk(expr)
        )

    def _list(self, expr: Expr) -> list[Expr]:
        """Return the block calls of a list expression."""
        match expr:
            case ListOf(items):
                done = [call for item in items for call in self._list(item)]
            case Binary("+", left, right):
                done = self._list(left) + self._list(right)
            case Binary("*", times, ListOf() as items) | Binary("*", items, times):
                count = self.scope.size(times, "a number of layers")
                done = self._repeat(expr, self._list(items), count)
            case Call("each", (times, item), ()):
                count = self.scope.size(times, "a number of layers")
                done = self._repeat(expr, self._list(item), count)
            case Name() | Call():
                done = [expr]
            case _:
                raise error(
                    "L218",
                    "this is not a list of blocks",
                    expr.span,
                    "",
                    "write `[a, b] * 3 + [c]`",
                )
        return self._repeat(expr, done, 1)

    @staticmethod
    def _repeat(expr: Expr, calls: list[Expr], count: int) -> list[Expr]:
        if len(calls) * count > MAX_LAYERS:
            raise error(
                "L203",
                "this is more layers than a model can have",
                expr.span,
                f"{len(calls) * count:,}, the limit is {MAX_LAYERS:,}",
            )
        return calls * count


def find_model(library: Library, call: Expr) -> syntax.Model:
    """Return the model a name or call means (L218)."""
    name = call.id if isinstance(call, Name) else getattr(call, "function", "")
    if name not in library.models:
        have = ", ".join(f"`{each}`" for each in library.models) or "none"
        raise error(
            "L218",
            f"there is no model `{name}`",
            call.span,
            "",
            did_you_mean(str(name), library.models, f"this file has {have}"),
        )
    return library.models[name]
