"""The model around the layers: embedding, the layers in order, the head."""

from __future__ import annotations

from itertools import groupby

from ...ops import OPS
from ..facts.decoding import obstacle
from ..graph.graph import Node
from ..graph.operations import Stage, Whole
from ..graph.passes import simplest
from ..model import Block, Model, Patches
from ..text.text import call, indent
from .caches import begins_within, own_rows
from .layers import Classes, Once, modules, takes_batch, wholes
from .stages import Stages


def model_class(model: Model, name: str, classes: Classes, encoder: str = "") -> list[str]:
    """Return the lines of a model's class; `encoder` is the class of its encoder."""
    shape = _takes(model, "n")
    if model.encoder is not None:
        shape += f", context {_takes(model.encoder, 'm')}"
    out = model.head.out.shape
    what = "features" if out.dim == model.width and model.vocab is None else "logits"
    gives = f"{what} [b, {out.dim}]" if model.classifies else f"{what} [b, n, {out.dim}]"
    return [
        f"class {name}(nn.Module):",
        f'    """{shape} → {gives}."""',
        "",
        "    def __init__(self) -> None:",
        *indent(_constructor(model, classes, encoder), 2),
        "",
        *indent(_init_cache(model)),
        "",
        *indent(_auxiliary(model, classes)),
        "    def forward(",
        "        self,",
        f"        {_first(model)}: Tensor,",
        "        *,",
        "        context: Tensor | None = None,",
        *(["        condition: Tensor | None = None,"] if model.condition else []),
        "        attention_mask: Tensor | None = None,",
        "        context_mask: Tensor | None = None,",
        "        segments: Tensor | None = None,",
        "        cu_seqlens: Tensor | None = None,",
        "        positions: Tensor | None = None,",
        f"        cache: {'Cache | None' if decodes(model) else 'None'} = None,",
        "        batch: Batch | None = None,",
        "    ) -> Tensor:",
        *indent(_forward(model, classes), 2),
    ]


class _End(Stages):
    """What is done before the layers, or after them, in the model's own forward pass."""

    def __init__(self, block: Block, classes: Classes) -> None:
        super().__init__(simplest(block))
        self.classes = classes

    def modules(self, once: Once) -> list[str]:
        return modules(self.graph, once, "all")

    def lines(self) -> list[str]:
        """Write it: what stood in `x` is made what stands there after it."""
        end = self.graph.node(self.graph.output)
        if not isinstance(end.op, Stage | Whole):
            return []
        told = any(node.op.definition.by_sequence for node in self.graph.of(Stage))
        lines = ["run = batch.run"] if told else []
        return [*lines, *self.assigned(), *self._assign(end, "x =")]

    def handed(self, node: Node[Whole]) -> list[str]:
        return ["batch=batch"] if takes_batch(node.op.what) else []


def _takes(model: Model, tokens: str) -> str:
    """Return what a model takes, for people."""
    if model.vocab is not None:
        return f"tokens [b, {tokens}]"
    if model.patches is not None:
        return f"images [b, {model.patches.channels}, height, width]"
    return f"features [b, {tokens}, {model.width}]"


def _first(model: Model) -> str:
    """Return what the first argument is called."""
    if model.vocab is not None:
        return "tokens"
    return "x" if model.patches is None else "images"


def _cut(name: str, patches: Patches) -> str:
    """Return the call that cuts images, or leaves what is cut already."""
    image = "" if patches.image is None else f", {patches.image}"
    return f'cut_patches("{name}", {name}, {patches.channels}, {patches.size}{image})'


def decodes(model: Model) -> bool:
    """Say whether a model can go on token by token."""
    return not model.classifies and _obstacle(model) is None


def _obstacle(model: Model) -> str | None:
    return next((why for each in model.layers if (why := obstacle(each)) is not None), None)


def _init_cache(model: Model) -> list[str]:
    head = "def init_cache(self, batch: int, length: int | None = None) -> "
    if not decodes(model):
        why = _obstacle(model) or "a classifier answers once a sequence"
        return [
            f"{head}None:",
            f'    """Raise `ValueError`: {why}."""',
            f'    raise ValueError("this model cannot decode: {why}")',
        ]
    if model.memory is not None:
        return [
            f"{head}Cache:",
            '    """Return what the layers keep, still empty; without a length it grows."""',
            f"    room = None if length is None else length + {model.memory}",
            f"    kept = (layer.init_cache(batch, room) for layer in {_run(model)})",
            "    parts = {str(at): each for at, each in enumerate(kept)}",
            "    cache = Cache(self, batch, **parts)",
            f"    cache.front = {model.memory}",
            "    return cache",
        ]
    return [
        f"{head}Cache:",
        '    """Return what the layers keep, still empty; without a length it grows."""',
        f"    kept = (layer.init_cache(batch, length) for layer in {_run(model)})",
        "    parts = {str(at): each for at, each in enumerate(kept)}",
        "    return Cache(self, batch, **parts)",
    ]


def _auxiliary(model: Model, classes: Classes) -> list[str]:
    """Write the method that brings together what layers add to the loss, if any does."""
    kinds = _adding(model, classes)
    if not kinds:
        return []
    return [
        "def auxiliary_loss(self) -> Tensor:",
        '    """Return what the last forward pass in training adds to the loss, once."""',
        f"    adding = (each for each in self.layers.modules() if isinstance(each, {kinds}))",
        "    losses = (each.auxiliary_loss() for each in adding)",
        "    return torch.stack(list(losses)).sum()",
        "",
    ]


def _adding(model: Model, classes: Classes) -> str:
    """Return the classes of what adds to the loss, "" where nothing does."""
    parts = [*model.uses, *wholes(model.run)]
    names = dict.fromkeys(classes[each] for each in parts if each.regularize is not None)
    return next(iter(names), "") if len(names) <= 1 else f"({', '.join(names)})"


def _constructor(model: Model, classes: Classes, encoder: str) -> list[str]:
    lines, once = ["super().__init__()"], Once(classes)
    if model.encoder is not None:
        lines.append(f"self.encoder = {encoder}()")
    if model.vocab is not None:
        lines += _table("embed_tokens", model.vocab, model.width)
    if model.patches is not None:
        lines += _End(model.patches.embed, classes).modules(once)
    if model.embed_position == "learned":
        lines += _table("embed_positions", model.positions, model.width)
    layers = []
    lines += _End(model.embed, classes).modules(once)
    if model.memory is not None:
        size = f"{model.memory}, {model.width}"
        lines.append(f"self.memory = nn.Parameter(torch.empty({size}).normal_(std=0.02))")
    for text, same in groupby([once.made(layer) for layer in model.layers]):
        times = len(list(same))
        layers += [text] if times == 1 else [f"*({text} for _ in range({times}))"]
    listed = call("self.layers = nn.ModuleList", [f"[{', '.join(layers)}]"])
    if max(map(len, listed)) > 88:
        listed = [
            "self.layers = nn.ModuleList(",
            "    [",
            *(f"        {each}," for each in layers),
            "    ]",
            ")",
        ]
    return [*lines, *once.flushed(), *listed, *_End(model.head, classes).modules(once)]


def _table(name: str, rows: int, width: int) -> list[str]:
    """Write an embedding as the stage `embed` makes it."""
    made = OPS["embed"].constructor((), {"count": rows, "features": width})
    return [f"self.{name} = {made}"]


def _forward(model: Model, classes: Classes) -> list[str]:
    cached = decodes(model)
    first = "tokens" if model.vocab is not None else "x"
    if model.vocab is not None:
        lines = [
            f"if {first}.ndim != 2:",
            '    raise ValueError(f"`tokens` must be [b, n], it is {list(tokens.shape)}")',
        ]
    else:
        lines = [] if model.patches is None else [f"x = {_cut('images', model.patches)}"]
        lines += [f'expect("{_first(model)}", x, {model.taken}, self)']
    if model.classifies:
        lines += [
            "if segments is not None or cu_seqlens is not None:",
            '    raise ValueError("a classifier has one answer for each row; "',
            '                     "lay sequences out in rows of their own")',
        ]
    if not cached:
        why = _obstacle(model) or "a classifier answers once a sequence"
        lines += [
            "if cache is not None:",
            f'    raise ValueError("this model cannot decode: {why}")',
        ]
    if kinds := _adding(model, classes):
        lines += [
            "for each in self.layers.modules():",
            f"    if isinstance(each, {kinds}):",
            "        each.auxiliary = None",
        ]
    args = ["attention_mask", "segments", "cu_seqlens", "positions"]
    args += ["cuts=False"] if model.marks else []
    apart = model.memory is not None  # each sequence has learned tokens of its own
    args += ["rows=True"] if apart or any(map(own_rows, model.layers)) else []
    if cached and (apart or not all(map(begins_within, model.layers))):
        args.append("begins=False")
    head = ["self", first, "cache"] if cached else [first, "None"]
    opened = call(f"batch = {'begin' if cached else 'Batch'}", [*head, *args])
    lines += ["outer = batch is None"] if not model.classifies else []
    if cached and model.condition is not None:
        opened += ["if cache is not None:", "    cache.also(condition=condition)"]
    lines += ["if batch is None:", *indent([*opened, f"{first} = batch.take({first})"])]
    lines += _context(model, cached)
    if model.vocab is not None:
        lines.append(f"x = embedded(self.embed_tokens, tokens)  # [b, n, {model.width}]")
    if model.patches is not None:
        lines += _End(model.patches.embed, classes).lines()
    if model.embed_position == "learned":
        lines.append("x = x + at_positions(self.embed_positions, batch)")
    elif model.embed_position == "sinusoidal":
        lines.append(f"x = x + sinusoidal(batch.positions, {model.width}, x.dtype)")
    lines += _End(model.embed, classes).lines()
    if model.dropout:
        lines.append(f"x = F.dropout(x, {model.dropout!r}, self.training)")
    if apart:
        lines.append("x, within = in_front(self.memory, x, batch)")
    if apart and _crosses(model):
        lines += ["if far is not None:", "    context, far = by_rows(context, far, batch)"]
    if model.stacked:
        lines += ["shared: tuple[dict[str, Tensor], ...] = ()  # what each gives to those above"]
    if model.lanes is not None:
        lines.append(f"x = x[:, None].expand(-1, {model.lanes}, -1, -1)  # {_stream(model)}")
    lines += _offered(model)
    given = [
        "x",
        *(["shared=shared"] if model.stacked else []),
        *(["context=context", "far=far"] if _crosses(model) else []),
        *(["**more"] if model.reads else []),
        "batch=within" if apart else "batch=batch",
    ]
    if cached:
        lines.append(f"caches = [None] * {len(model.steps)} if cache is None else cache")
        given.append("cache=kept")
    along = {"layer": _run(model)}
    along |= {"kept": "caches"} if cached else {}
    along |= {"turn": str(model.turns)} if "turn" in model.reads else {}
    if len(along) == 1:
        lines.append(f"for layer in {_run(model)}:")
    else:
        lines += call(f"for {', '.join(along)} in zip", [*along.values(), "strict=True"], "):")
    if "turn" in model.reads:
        lines.append('    offered["turn"] = x.new_full((x.shape[0], 1, 1), turn)')
    if "earlier" in model.reads:
        lines += [
            '    if "earlier" in getattr(layer, "reads", ()):',
            '        offered["earlier"] = torch.stack(earlier, 1)',
        ]
    if model.reads:
        lines.append("    more = {name: offered[name] for name in getattr(layer, 'reads', ())}")
    lines += indent(call(f"x{', handed' * model.stacked} = layer", given))
    lines += ["    shared = (*shared, handed)"] if model.stacked else []
    lines += ["    earlier.append(x)"] if "earlier" in model.reads else []
    if apart:
        lines.append("x = without_front(x, within, batch)")
    lines += _End(model.head, classes).lines()
    if model.classifies:
        return [*lines, f"return x[:, 0]  # [b, {model.head.out.shape.dim}]"]
    return [
        *lines,
        f"return {'finish(x, batch, cache)' if cached else 'batch.give(x)'} if outer else x",
    ]


def _run(model: Model) -> str:
    """Return the layers in the order they are run."""
    if model.steps == tuple(range(len(model.layers))):
        return "self.layers"
    return f"[self.layers[at] for at in {model.steps}]"


def _stream(model: Model) -> str:
    return f"[b, {model.lanes}, n, {model.width}]"


def _offered(model: Model) -> list[str]:
    """Write what is given to the layers that read it."""
    lines = []
    if model.condition is not None:
        wanted = f"[b, {model.condition}]"
        lines += [
            f"if condition is None or condition.shape[1:] != ({model.condition},):",
            "    given = None if condition is None else list(condition.shape)",
            f'    raise ValueError(f"`condition` must be {wanted}, it is {{given}}")',
        ]
    texts = {"condition": "batch.of_rows(condition)[:, None]", "tokens": "tokens[..., None]"}
    if model.reads:
        named = [f'"{name}": {text}' for name, text in texts.items() if name in model.reads]
        lines.append(f"offered = {{{', '.join(named)}}}")
    if "earlier" in model.reads:
        lines.append("earlier = [x]  # the embedding, and what each layer gave")
    return lines


def _crosses(model: Model) -> bool:
    return model.encoder is not None or any(each.context_width is not None for each in model.layers)


def _context(model: Model, cached: bool) -> list[str]:
    """Write the lines that lay a context out, and send it through the encoder."""
    if not _crosses(model):
        return [
            "if context is not None or context_mask is not None:",
            '    raise ValueError("this model reads no `context`")',
        ]
    lines = ["far = None"]
    if model.encoder is not None and model.encoder.patches is not None:
        lines += [
            "if context is not None:",
            f"    context = {_cut('context', model.encoder.patches)}",
        ]
    if cached:
        lines.append("context = context if cache is None else cache.reading(context)")
    lines += [
        "if context is not None:",
        "    far = batch.of_context(context, context_mask)",
        "    context = far.take(context)",
    ]
    if model.encoder is not None:
        lines.append("    context = self.encoder(context, batch=far)")
        missing = "else:" if not cached else "elif cache is None or cache.context is None:"
        needed = _takes(model.encoder, "m")
        lines += [missing, f'    raise ValueError("`context` is needed: {needed}")']
    return lines
