"""Models: a list of layers, and what stands around them.

layers = ([local] * 5 + [global]) * 2      → twelve layers `pre(local, swiglu(8/3))` …, in order
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

from ...grammar import syntax
from ...grammar.diagnostics import Diagnostic, did_you_mean, error
from ...grammar.expr import rebuild
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, ListOf, Name
from ...ops import OPS, Shape
from ..model import (
    MAPS,
    Apply,
    Block,
    Flow,
    Model,
    Part,
    Patches,
    applies,
    flow_mapped,
    flow_nodes,
)
from .around import NONE, Around
from .blocks import Draft, Sizes, draft_block
from .depth import Depth, Layer
from .flows import Target, elaborate
from .handed import stack
from .inheritance import SETTINGS as OF_BLOCKS
from .layers import composed, elaborate_part, whole
from .library import Library, bind, is_once, named, parsed, put, standard, standard_names
from .moving import several_times
from .patches import read_patches
from .scope import Findings, Scope
from .spellings import instead
from .taken import expect_read

SETTINGS = {
    "vocab": "none", "width": "", "layers": "", "layer": "pre", "ffn": "swiglu(8/3)",
    "norm": "rms", "embed": "x", "embed_position": "none", "tie": "false", "head": "",
    "dropout": "0", "patches": "none", "encoder": "none", "lanes": "none",
    "condition_width": "width", "memory": "none",
}  # fmt: skip
NORMS = {"rms": "rms_norm", "layer": "layer_norm"}  # what stages are called as a model's norm
HEADS = {  # the heads that have names, as pipelines
    "lm": "x | norm | linear(vocab)",
    "classify": "x | norm | mean_tokens | linear(classes, bias = true)",
    "none": "x | norm",
}
OF_LANES = {"x": "x | mean_heads"}  # what each of these begins with where there are lanes
MAX_LAYERS = 1024
_Place = tuple[Expr, object]  # a layer of the list, and whose weights it has where not its own


@cache
def _defaults() -> dict[str, Expr]:
    return parsed("model", SETTINGS)


@cache
def _heads() -> dict[str, Expr]:
    return parsed("heads", HEADS)


@cache
def _of_lanes() -> dict[str, Expr]:
    return parsed("lanes", OF_LANES)


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
        self.dropout, self.condition = 0.0, 1
        self.lanes: int | None = None
        self.memory: int | None = None
        self.vocab: int | None = None
        self.patches: Patches | None = None
        self.steps: tuple[int, ...] = ()
        self.shared: set[Span] = set()  # the places of `once` that are layers of the list
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
        self.findings.settle()
        width = self.scope.size(self.get("width"), "`width`")
        self.width = self.scope.numbers["width"] = width
        layers: tuple[Block, ...] = ()
        encoder: Model | None = None
        embed: Block | None = None
        head: Block | None = None
        embed_position, positions = "none", 0
        with guard():
            self.vocab = self._vocab()
        with guard():
            self.patches = self._patches()
        with guard():
            encoder = self._encoder(warnings)
        with guard():
            self.dropout = self._dropout()
        with guard():
            self.lanes = self._lanes()
        with guard():
            memory = self.get("memory")
            self.memory = None if memory == NONE else self.scope.size(memory, "`memory`")
        with guard():
            self.condition = self.scope.size(self.get("condition_width"), "`condition_width`")
        with guard():
            layers = self._layers(width, encoder, warnings)
        with guard():
            embed_position, positions = self._position()
        with guard():
            embed = self._end("embed", self.get("embed"), {})
        with guard():
            head = self._head(self.vocab)
        if self.findings.diagnostics:
            return None
        assert embed is not None
        assert head is not None
        return Model(
            self.syntax.name,
            self.vocab,
            width,
            layers,
            embed,
            head,
            embed_position,
            positions,
            self.dropout,
            self.syntax.span,
            encoder,
            self.lanes,
            self.condition if any("condition" in each.reads for each in layers) else None,
            self.steps,
            self.memory,
            self.patches,
        )

    def _patches(self) -> Patches | None:
        """Return what the model cuts of images, and the linear map of a patch (L238)."""

        def compose(pipeline: Expr, given: Shape) -> Block:
            return replace(self._end("embed", pipeline, {}, given), given=given)

        value = self.get("patches")
        found = read_patches(value, self.scope, compose)
        if found is not None and self.vocab is not None:
            raise error(
                "L238",
                "a model takes tokens or images",
                value.span,
                f"`vocab` is {self.vocab}",
                "leave out `vocab` or `patches`",
            )
        return found

    def _lanes(self) -> int | None:
        lanes = self.get("lanes")
        return None if lanes == NONE else self.scope.size(lanes, "`lanes`")

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
        grid = None if self.patches is None else self.patches.grid
        if head == "learned" and grid is not None and count < grid[0] * grid[1]:
            raise error(
                "L238",
                "an image has more patches than there are learned positions",
                value.span,
                f"{count} positions, {grid[0]} × {grid[1]} = {grid[0] * grid[1]} patches",
                f"write `learned({grid[0] * grid[1]})`",
            )
        return head, count

    def _dropout(self) -> float:
        rate = float(self.scope.number(self.get("dropout"), "`dropout`"))
        if not 0 <= rate < 1:
            raise error("L219", "a dropout rate lies in 0 <= p < 1", self.get("dropout").span)
        return rate

    # the two ends

    def _head(self, vocab: int | None) -> Block:
        """Return what is done to what the layers give, its last linear map tied where asked."""
        sizes = {} if vocab is None else {"vocab": vocab}
        if "head" not in self.settings:
            pipeline = self._of_lanes(_heads()["none" if vocab is None else "lm"])
        elif not isinstance(self.get("head"), Name | Call):
            pipeline = self.get("head")
        else:
            name, count, value = self._call("head", tuple(HEADS))
            pipeline = self._of_lanes(_heads()[name])
            if name == "lm" and vocab is None:
                raise error("L222", "a language-model head needs a `vocab`", value.span)
            if name == "classify" and not count:
                raise error(
                    "L209",
                    "`classify` needs the number of classes",
                    value.span,
                    "",
                    "write `classify(10)`",
                )
            sizes |= {"classes": count}
        head = _with_own_names(self._end("head", pipeline, sizes))
        if self._word("tie", ("true", "false")) == "false":
            return head
        tied = _tied(head, vocab)
        if tied == head:
            raise error(
                "L222",
                "only a language-model head can be tied",
                self.get("tie").span,
                "" if vocab is None else f"no `linear({vocab})` without a bias is in `head`",
            )
        return tied

    def _of_lanes(self, head: Expr) -> Expr:
        """Return a head that begins with the mean of all lanes, where there are such."""
        return head if self.lanes is None else put(head, _of_lanes())

    def _end(
        self, kind: str, pipeline: Expr, sizes: Mapping[str, int], given: Shape | None = None
    ) -> Block:
        """Return a pipeline of the model's own, before its layers or after them."""
        around = replace(self._around(self.width), offered={})
        given = given or Shape("n", self.width, self.lanes if kind == "head" else None)
        scope = Scope(
            self.library,
            self.findings,
            numbers={"width": self.width, "features": self.width, **sizes},
            inputs={"x": given},
            title=self.syntax.name,
            around=around,
            whole=whole,
        )
        shape = Shape("n", self.width) if kind == "embed" else None
        flow = elaborate(scope, pipeline, Target(kind, shape))
        block = composed(kind, kind, scope, [], flow, pipeline.span)
        if block.uses:
            raise error(
                "L226",
                f"tokens do not mix in `{kind}`",
                pipeline.span,
                f"`{block.uses[0].name}` is a block",
                "put it into `layers`",
            )
        for node in applies(block.out):
            op = OPS[node.op]
            shapes = [each.shape for each in node.inputs]
            if op.reads_earlier(shapes, dict(node.options)) or op.positional:
                raise error(
                    "L226",
                    f"`{node.op}` reads other tokens, which `{kind}` cannot",
                    node.span,
                    "it takes one token at a time",
                    "put it into a layer",
                )
        return replace(block, given=given) if given.heads is not None else block

    def _around(self, width: int, at: int = 0, depth: int = 1) -> Around:
        norm = self.get("norm")
        if is_once(norm):
            norm = rebuild(norm, _named_norm)
        norm = _named_norm(norm)
        return Around(
            width,
            self._no_block,
            at,
            depth,
            self.lanes,
            self._offered(at),
            norm,
            self.dropout,
            self.vocab,
        )

    def _offered(self, at: int) -> dict[str, Shape]:
        """Return what a layer may read beside the stream that comes in."""
        offered = {"condition": Shape("1", self.condition), "turn": Shape("1", 1)}
        if self.lanes is None:
            offered["earlier"] = Shape("n", self.width, at + 1)
        if self.get("vocab") != NONE and self.memory is None:
            offered["tokens"] = Shape("n", 1)
        return offered

    @staticmethod
    def _no_block(call: Expr, width: int) -> Block:  # noqa: ARG004  where no block can be a part
        raise error("L226", "tokens mix in `layers` alone", call.span, "", "put it there")

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
        gives, features = encoder.head.out.shape, Shape("n", encoder.width)
        if gives != features:
            raise error(
                "L227",
                "an encoder gives features",
                call.span,
                f"the head of `{name}` gives {gives}, needed is {features}",
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
        calls = self._places()
        made: dict[Expr, Block] = {}
        drafts: dict[int, Draft] = {}  # of the blocks in layers, by their identity
        layers: list[Block] = []
        below: list[Layer] = []
        reads_layer = self._reads("layer", "earlier")
        reads_below = bool(self.library.read_above)
        for at, call in enumerate(calls):
            under = Depth(self.syntax.name, at, below, self.steps)

            def block(part: Expr, width: int, at: int = at, under: Depth = under) -> Block:
                offered = self._offered(at)
                grid = None if self.patches is None else self.patches.grid
                front = self.memory or 0
                sizes = Sizes(width, context_width, at, len(calls), under, offered, front, grid)
                draft = draft_block(self.library, part, sizes)
                self._one_a_token(draft, part)
                made = draft.finish()
                drafts[id(made)] = draft
                return made

            with self.findings.guard():
                layer = made.get(call)
                if layer is None or reads_layer or reads_below:
                    around = self._around(width, at, len(calls))
                    around = replace(around, block=block, below=under)
                    layer = made[call] = elaborate_part(self.library, self._standing(call), around)
                layers.append(layer)
                scopes = {id(each): drafts[id(each)].scope for each in layer.uses}
                below.append(Layer(layer, scopes))
            if reads_below and len(layers) <= at:
                return ()  # what stands above cannot be checked without it
        self.findings.settle()
        seen: set[int] = set()

        def finish(block: Block, shared: tuple[str, ...]) -> Block:
            quiet = None if id(block) in seen else warnings
            seen.add(id(block))
            return drafts[id(block)].finish(shared, quiet)

        def has(block: Block, name: str) -> bool:
            return name in MAPS or name in drafts[id(block)].scope.streams

        done = stack(layers, self.steps, finish, has)
        expect_read(done)
        self._require_one(done)
        if any(layer.moving and self.steps.count(at) > 1 for at, layer in enumerate(done)):
            raise several_times(self.get("layers").span)
        if encoder is not None and not any(layer.context_width for layer in done):
            self._unread(warnings)
        return done

    def _places(self) -> list[Expr]:
        """Return the different layers of the list; `steps` is their order, some of them again."""
        listed = self._list(self.get("layers"))
        if not listed:
            raise error("L203", "a model needs at least one layer", self.get("layers").span)
        calls: list[Expr] = []
        numbers: dict[object, int] = {}
        steps = []
        for call, key in listed:
            at = len(calls) if key is None else numbers.setdefault(key, len(calls))
            if at == len(calls):
                calls.append(call)
            steps.append(at)
        self.steps = tuple(steps)
        self.shared = {key for _, key in listed if isinstance(key, Span)}
        if len(steps) > len(calls) and self._reads("earlier"):
            raise error(
                "L224",
                "a layer that runs again has other layers below it each time",
                self.get("layers").span,
                "layers of this file read `earlier`",
                "leave `loop` and `once` out, or read a layer: `at(0).out`",
            )
        return calls

    def _require_one(self, layers: tuple[Block, ...]) -> None:
        """Check that what places share is the same in all of them (L240)."""
        found: dict[Span, Block] = {}
        for part in (part for layer in layers for part in _parts(layer)):
            if part.once is None:
                continue
            if part.once in self.shared:
                raise error(
                    "L240",
                    "this is a layer and a part of one",
                    part.once,
                    "",
                    "write `once` for each of them",
                )
            first = found.setdefault(part.once, part.what)
            if first != part.what:
                raise error(
                    "L240",
                    "what is shared is not the same everywhere",
                    part.once,
                    _apart(first, part.what),
                    "it takes streams of one width, and reads neither `layer` nor what other "
                    "layers do not share with it",
                )

    def _standing(self, call: Expr) -> Expr:
        """Return the layer that a block or feed-forward of the list stands in."""
        kind, layer, ffn = self.library.kind_of(call), self.get("layer"), self.get("ffn")
        if kind == "layer":
            return call
        if kind == "ffn":
            return Call("pre", (NONE, call), (), call.span)
        item = self.library.item(layer, "layer")
        self.library.item(call, "block")
        given = layer.args if isinstance(layer, Call) else ()
        keywords = layer.keywords if isinstance(layer, Call) else ()
        open_ = [each for each in item.params if each.default is None][len(given) :]
        parts = (call, ffn)[: len(open_)]
        return Call(item.name, (*given, *parts), keywords, call.span)

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

    def _reads(self, *names: str) -> bool:
        """Say whether any text reads one of some names, so that no layer is like another."""
        library, known = self.library, {id(each) for each in standard()}
        tables = (library.blocks, library.layers, library.ffns, library.definitions)
        items = (each for table in tables for each in table.values() if id(each) not in known)
        exprs = [expr for item in items for _, expr in syntax.expressions(item)]
        return not standard_names().isdisjoint(names) or any(
            isinstance(node, Name) and node.id in names
            for expr in (*exprs, *library.lets.values(), self.get("layers"))
            for node in syntax.walk(expr)
        )

    def _list(self, expr: Expr) -> list[_Place]:
        """Return the layers of a list expression."""
        match expr:
            case ListOf(items):
                done = [place for item in items for place in self._list(item)]
            case Binary("+", left, right):
                done = self._list(left) + self._list(right)
            case Binary("*", times, ListOf() as items) | Binary("*", items, times):
                count = self.scope.size(times, "a number of layers")
                done = self._repeat(expr, self._list(items), count)
            case Call("each", (times, item), ()):
                count = self.scope.size(times, "a number of layers")
                done = self._repeat(expr, self._list(item), count)
            case Call("loop", (times, item), ()):
                count = self.scope.size(times, "a number of turns")
                inner = [
                    (call, (id(expr), at) if key is None else key)
                    for at, (call, key) in enumerate(self._list(item))
                ]
                done = self._repeat(expr, inner, count)
            case Call("once", (item,), ()):
                done = [(item, expr.span)]
            case Name() | Call():
                done = [(expr, None)]
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
    def _repeat(expr: Expr, calls: list[_Place], count: int) -> list[_Place]:
        if len(calls) * count > MAX_LAYERS:
            raise error(
                "L203",
                "this is more layers than a model can have",
                expr.span,
                f"{len(calls) * count:,}, the limit is {MAX_LAYERS:,}",
            )
        return calls * count


def _named_norm(norm: Expr) -> Expr:
    """Return the stage that a norm's name stands for."""
    return Name(NORMS.get(norm.id, norm.id), norm.span) if isinstance(norm, Name) else norm


def _parts(block: Block) -> Iterator[Part]:
    """Yield the parts of a block, and theirs."""
    for part in block.parts:
        yield part
        yield from _parts(part.what)


def _apart(one: Block, other: Block) -> str:
    """Say what is another in two blocks of one text."""
    if one.x != other.x:
        return f"`{one.name}` takes {one.x}, and {other.x} elsewhere"
    for name in ("shared", "borrows", "lends", "serves"):
        if getattr(one, name) != getattr(other, name):
            return f"layers above read other streams of `{one.name}` in one place than in another"
    return f"`{one.name}` reads where it stands"


def _tied(head: Block, vocab: int | None) -> Block:
    """Return a head whose map to the vocabulary is the embedding's; itself where it has none."""

    def change(node: Flow) -> Flow:
        if isinstance(node, Apply) and node.op == "linear":
            options = dict(node.options)
            if options["features"] == vocab and not options["bias"]:
                return replace(node, op="tied", module="embed_tokens")
        return node

    return replace(head, out=flow_mapped(head.out, change))


def _with_own_names(head: Block) -> Block:
    """Name the modules of a head `norm` and `lm_head`, or `head` where it tells classes."""
    names = [node.module for node in flow_nodes(head.out) if isinstance(node, Apply | Part)]
    maps = [each for each in names if each.startswith("head_proj")]
    own = {"head_norm": "norm"}
    own |= {maps[-1]: "lm_head" if head.out.shape.tokens == "n" else "head"} if maps else {}

    def named(node: Apply | Part) -> Flow:
        return replace(node, module=own.get(node.module, node.module))

    return replace(head, out=flow_mapped(head.out, named))


def find_model(library: Library, call: Expr) -> syntax.Model:
    """Return the model a name or call means (L218)."""
    return named(library.models, "model", call)
