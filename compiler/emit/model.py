"""The model around the blocks: embeddings, pre-norm layers, head."""

from __future__ import annotations

from collections.abc import Mapping

from ..facts.decoding import obstacle
from ..model import Block, Model
from ..text.text import call, indent
from .caches import begins_within, own_rows

_SWIGLU = '''class {prefix}FeedForward(nn.Module):
    """down(silu(gate x) * up x), {width} → {hidden} → {width}."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear({width}, {hidden}, bias=False)
        self.up_proj = nn.Linear({width}, {hidden}, bias=False)
        self.down_proj = nn.Linear({hidden}, {width}, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))'''

_GELU = '''class {prefix}FeedForward(nn.Module):
    """down(gelu(up x)), {width} → {hidden} → {width}."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear({width}, {hidden}, bias=False)
        self.down_proj = nn.Linear({hidden}, {width}, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))'''

_NORMS = {"rms": "nn.RMSNorm({width}, eps=1e-06)", "layer": "nn.LayerNorm({width}, eps=1e-05)"}


def classes(
    model: Model, name: str, which: Mapping[Block, str], encoder: str = "", prefix: str = ""
) -> list[str]:
    """Return the text of the classes around the blocks; `which` names each block's class.

    `encoder` is the class of the encoder; an encoder's own classes begin with a `prefix`.
    """
    made = []
    if model.ffn is not None:
        template = _SWIGLU if model.ffn.kind == "swiglu" else _GELU
        made.append(template.format(prefix=prefix, width=model.width, hidden=model.ffn.hidden))
    made.append("\n".join(_layer(model, prefix)))
    made.append("\n".join(_model(model, name, which, encoder, f"{prefix}Layer")))
    return made


def _norm(model: Model) -> str:
    return _NORMS[model.norm].format(width=model.width) if model.norm != "none" else ""


def _layer(model: Model, prefix: str) -> list[str]:
    normed = "self.{}(x)" if model.norm != "none" else "x"
    init = ["super().__init__()"]
    if model.norm != "none":
        init.append(f"self.attn_norm = {_norm(model)}")
    init.append("self.attn = attn")
    if model.ffn is not None:
        if model.norm != "none":
            init.append(f"self.ffn_norm = {_norm(model)}")
        init.append(f"self.ffn = {prefix}FeedForward()")
    shares = _shares(model)
    attended = f"self.attn({normed.format('attn_norm')}, {'shared=shared, ' * shares}**given)"
    body = [f"y, shared = {attended}"] if shares else []
    made = f"x + {_dropped(model, 'y' if shares else attended)}"
    if model.ffn is not None:
        fed = f"self.ffn({normed.format('ffn_norm')})"
        body.append(f"x = {made}")
        made = f"x + {_dropped(model, fed)}"
    body.append(f"return {made}{', shared' * shares}")
    what = "attention, then the feed-forward network" if model.ffn is not None else "attention"
    return [
        f"class {prefix}Layer(nn.Module):",
        f'    """One layer: {what}, each around a residual."""',
        "",
        "    def __init__(self, attn: nn.Module) -> None:",
        *indent(init, 2),
        "",
        *(_SHARING if shares else ["    def forward(self, x: Tensor, **given: object) -> Tensor:"]),
        *indent(body, 2),
    ]


_SHARING = [
    "    def forward(",
    "        self, x: Tensor, shared: dict[str, Tensor], **given: object",
    "    ) -> tuple[Tensor, dict[str, Tensor]]:",
]


def _shares(model: Model) -> bool:
    """Say whether layers of the model read the ones below."""
    return any(block.shared is not None for block in model.layers)


def _dropped(model: Model, text: str) -> str:
    return f"F.dropout({text}, {model.dropout!r}, self.training)" if model.dropout else text


def _takes(model: Model, tokens: str) -> str:
    """Return what a model takes, for people."""
    if model.vocab is not None:
        return f"tokens [b, {tokens}]"
    return f"features [b, {tokens}, {model.width}]"


def _model(
    model: Model, name: str, which: Mapping[Block, str], encoder: str, layer: str
) -> list[str]:
    shape = _takes(model, "n")
    if model.encoder is not None:
        shape += f", context {_takes(model.encoder, 'm')}"
    out = {
        "lm": f"logits [b, n, {model.vocab}]",
        "classify": f"logits [b, {model.classes}]",
        "none": f"features [b, n, {model.width}]",
    }[model.head]
    return [
        f"class {name}(nn.Module):",
        f'    """{shape} → {out}."""',
        "",
        "    def __init__(self) -> None:",
        *indent(_constructor(model, which, encoder, layer), 2),
        "",
        *indent(_init_cache(model)),
        "",
        *indent(_auxiliary(model, which)),
        "    def forward(",
        "        self,",
        f"        {_first(model)}: Tensor,",
        "        *,",
        "        context: Tensor | None = None,",
        "        attention_mask: Tensor | None = None,",
        "        context_mask: Tensor | None = None,",
        "        segments: Tensor | None = None,",
        "        cu_seqlens: Tensor | None = None,",
        "        positions: Tensor | None = None,",
        f"        cache: {'Cache | None' if decodes(model) else 'None'} = None,",
        "        batch: Batch | None = None,",
        "    ) -> Tensor:",
        *indent(_forward(model), 2),
    ]


def _first(model: Model) -> str:
    return "tokens" if model.vocab is not None else "x"


def decodes(model: Model) -> bool:
    """Say whether a model can go on token by token."""
    return model.head != "classify" and _obstacle(model) is None


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
    return [
        f"{head}Cache:",
        '    """Return what the layers keep, still empty; without a length it grows."""',
        "    kept = (layer.attn.init_cache(batch, length) for layer in self.layers)",
        "    parts = {str(at): each for at, each in enumerate(kept)}",
        "    return Cache(self, batch, **parts)",
    ]


def _auxiliary(model: Model, which: Mapping[Block, str]) -> list[str]:
    """Write the method that brings together what layers add to the loss, if any does."""
    names = dict.fromkeys(which[block] for block in model.layers if block.regularize is not None)
    if not names:
        return []
    kinds = next(iter(names)) if len(names) == 1 else f"({', '.join(names)})"
    return [
        "def auxiliary_loss(self) -> Tensor:",
        '    """Return what the last forward pass in training adds to the loss, once."""',
        "    attention = (layer.attn for layer in self.layers)",
        f"    losses = (each.auxiliary_loss() for each in attention if isinstance(each, {kinds}))",
        "    return torch.stack(list(losses)).sum()",
        "",
    ]


def _constructor(model: Model, which: Mapping[Block, str], encoder: str, layer: str) -> list[str]:
    lines = ["super().__init__()"]
    if model.encoder is not None:
        lines.append(f"self.encoder = {encoder}()")
    if model.vocab is not None:
        lines += _table("embed_tokens", model.vocab, model.width)
    if model.embed_position == "learned":
        lines += _table("embed_positions", model.positions, model.width)
    blocks = ", ".join(f"{which[block]}()" for block in model.layers)
    text = f"self.layers = nn.ModuleList({layer}(attn) for attn in ({blocks},))"
    if len(text) > 84:
        lines += [
            "attention = (",
            *(f"    {which[block]}()," for block in model.layers),
            ")",
            f"self.layers = nn.ModuleList({layer}(attn) for attn in attention)",
        ]
    else:
        lines.append(text)
    if model.norm != "none":
        lines.append(f"self.norm = {_norm(model)}")
    if model.head == "lm" and not model.tie:
        lines.append(f"self.lm_head = nn.Linear({model.width}, {model.vocab}, bias=False)")
    if model.head == "classify":
        lines.append(f"self.head = nn.Linear({model.width}, {model.classes})")
    return lines


def _table(name: str, rows: int, width: int) -> list[str]:
    """Write an embedding whose values are drawn once: nn.Embedding would draw others first."""
    drawn = f"torch.empty({rows}, {width}).normal_(std=0.02)"
    return call(f"self.{name} = nn.Embedding.from_pretrained", [drawn, "freeze=False"])


def _forward(model: Model) -> list[str]:
    first, cached = _first(model), decodes(model)
    if model.vocab is not None:
        lines = [
            f"if {first}.ndim != 2:",
            '    raise ValueError(f"`tokens` must be [b, n], it is {list(tokens.shape)}")',
        ]
    else:
        lines = [f'expect("x", x, {model.width}, self)']
    if model.head == "classify":
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
    args = ["attention_mask", "segments", "cu_seqlens", "positions"]
    args += ["cuts=False"] if model.marks else []
    args += ["rows=True"] if any(own_rows(block) for block in model.layers) else []
    if cached and not all(map(begins_within, model.layers)):
        args.append("begins=False")
    head = ["self", first, "cache"] if cached else [first, "None"]
    opened = call(f"batch = {'begin' if cached else 'Batch'}", [*head, *args])
    lines += ["outer = batch is None"] if model.head != "classify" else []
    lines += ["if batch is None:", *indent([*opened, f"{first} = batch.take({first})"])]
    lines += _context(model, cached)
    if model.vocab is not None:
        lines.append(f"x = embedded(self.embed_tokens, tokens)  # [b, n, {model.width}]")
    if model.embed_position == "learned":
        lines.append("x = x + at_positions(self.embed_positions, batch)")
    elif model.embed_position == "sinusoidal":
        lines.append(f"x = x + sinusoidal(batch.positions, {model.width}, x.dtype)")
    if model.dropout:
        lines.append(f"x = {_dropped(model, 'x')}")
    if _shares(model):
        lines += ["shared: dict[str, Tensor] = {}  # what a layer reads of the one below"]
    both = ", shared" * _shares(model)
    given = [
        f"x{both}",
        *(["context=context", "far=far"] if _crosses(model) else []),
        "batch=batch",
    ]
    if cached:
        lines += [
            "caches = [None] * len(self.layers) if cache is None else cache",
            "for layer, kept in zip(self.layers, caches, strict=True):",
        ]
        given.append("cache=kept")
    else:
        lines.append("for layer in self.layers:")
    lines += indent(call(f"x{both} = layer", given))
    if model.norm != "none":
        lines.append("x = self.norm(x)")
    if model.head == "classify":
        return [
            *lines,
            "x = mean_tokens(x, batch.run)[:, 0]",
            f"return self.head(x)  # [b, {model.classes}]",
        ]
    if model.head == "lm":
        logits = "F.linear(x, self.embed_tokens.weight)" if model.tie else "self.lm_head(x)"
        lines.append(f"x = {logits}  # [b, n, {model.vocab}]")
    return [
        *lines,
        f"return {'finish(x, batch, cache)' if cached else 'batch.give(x)'} if outer else x",
    ]


def _crosses(model: Model) -> bool:
    return model.encoder is not None or any(b.context_width is not None for b in model.layers)


def _context(model: Model, cached: bool) -> list[str]:
    """Write the lines that lay a context out, and send it through the encoder."""
    if not _crosses(model):
        return [
            "if context is not None or context_mask is not None:",
            '    raise ValueError("this model reads no `context`")',
        ]
    lines = ["far = None"]
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
