"""The tensors a block or a model owns: their names, shapes and first values.

The names are the keys of every module's state dict (the reference, the emitted file, what
`load` builds), so that weights move freely between them:

    >>> [each.name for each in weights(block)]
    ['q_proj.weight', 'k_proj.weight', 'v_proj.weight', 'slope', 'o_proj.weight']

Constants (`const`) are not among them: the text determines them, so a module keeps them in
buffers outside its state dict. torch is imported only where values are drawn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ...grammar.expr import rebuild
from ...grammar.syntax import Call, Expr, Name
from ...ops import OPS, Op, Shape, Weight
from ..model import Apply, Block, Model, applies

if TYPE_CHECKING:
    import torch

NORMS = {"rms": "rms_norm", "layer": "layer_norm"}  # a model's norm → the operation it is


def owned(apply: Apply) -> tuple[Weight, ...]:
    """Return the tensors of one operation, under their full names in the block."""
    shapes = [each.shape for each in apply.inputs]
    return tuple(
        replace(each, name=f"{apply.module}.{each.name}")
        for each in OPS[apply.op].weights(shapes, dict(apply.options))
    )


def weights(block: Block) -> tuple[Weight, ...]:
    """Return a block's learned tensors: those of its streams, its own, those of `out`."""
    found: dict[str, Weight] = {}
    for flow in [each.flow for each in block.streams]:
        found.update({each.name: each for node in applies(flow) for each in owned(node)})
    found.update({each.name: each for each in block.tensors if each.learned})
    for flow in block.flows[len(block.streams) :]:
        found.update({each.name: each for node in applies(flow) for each in owned(node)})
    return tuple(found.values())


def constants(block: Block) -> tuple[Weight, ...]:
    """Return the tensors that the text fixes: buffers that are not in the state dict."""
    return tuple(each for each in block.tensors if not each.learned)


def model_weights(model: Model) -> tuple[Weight, ...]:
    """Return a model's learned tensors, the input's first and the head's last."""
    width = model.width
    found: list[Weight] = []
    if model.encoder is not None:
        found += _prefixed("encoder", model_weights(model.encoder))
    if model.vocab is not None:
        found.append(Weight("embed_tokens.weight", (model.vocab, width), "embedding"))
    if model.embed_position == "learned":
        found.append(Weight("embed_positions.weight", (model.positions, width), "embedding"))
    for at, block in enumerate(model.layers):
        layer = f"layers.{at}"
        found += _prefixed(f"{layer}.attn", weights(block))
        found += _prefixed(f"{layer}.attn_norm", norm_weights(model))
        if model.ffn is not None:
            hidden = model.ffn.hidden
            if model.ffn.kind == "swiglu":
                found.append(Weight(f"{layer}.ffn.gate_proj.weight", (hidden, width), "linear"))
            found.append(Weight(f"{layer}.ffn.up_proj.weight", (hidden, width), "linear"))
            found.append(Weight(f"{layer}.ffn.down_proj.weight", (width, hidden), "linear"))
            found += _prefixed(f"{layer}.ffn_norm", norm_weights(model))
    found += _prefixed("norm", norm_weights(model))
    if model.head == "lm" and not model.tie:
        assert model.vocab is not None
        found.append(Weight("lm_head.weight", (model.vocab, width), "linear"))
    if model.head == "classify":
        found.append(Weight("head.weight", (model.classes, width), "linear"))
        found.append(Weight("head.bias", (model.classes,), "zeros"))
    return tuple(found)


def norm_op(model: Model) -> Op | None:
    """Return the operation that a model's norms are, if it has any."""
    return OPS[NORMS[model.norm]] if model.norm in NORMS else None


def norm_weights(model: Model) -> tuple[Weight, ...]:
    """Return the tensors of one of a model's norms."""
    op = norm_op(model)
    return () if op is None else op.weights((Shape("n", model.width),), defaults(op))


def defaults(op: Op) -> dict[str, object]:
    """Return an operation's options as they are where none is written."""
    return {each.name: each.default for each in op.options}


def initial(
    weight: Weight, generator: torch.Generator, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Draw a tensor's first value on the CPU.

    Schemes: `linear` is nn.Linear's own (uniform in ±1/√in), `conv` that of nn.Conv1d,
    `embedding` normal with standard deviation 0.02, `ones`, `zeros`. Otherwise `init` is an
    expression, evaluated elementwise: `h` is the index along the first dimension, `normal(std)`
    draws. Everything is drawn in float64 and then cast: one seed gives the same weights in every
    dtype.
    """
    import torch

    from ...ops.pointwise import evaluate

    dtype = dtype or torch.get_default_dtype()
    size, wide = weight.shape, torch.float64
    match weight.init:
        case "linear":
            bound = 1 / math.sqrt(size[-1])
            unit = 2 * torch.rand(size, generator=generator, dtype=wide) - 1
            return (unit * bound).to(dtype)
        case "conv":
            bound = 1 / math.sqrt(math.prod(size[1:]))
            unit = 2 * torch.rand(size, generator=generator, dtype=wide) - 1
            return (unit * bound).to(dtype)
        case "embedding":
            return (0.02 * torch.randn(size, generator=generator, dtype=wide)).to(dtype)
        case "ones":
            return torch.ones(size, dtype=dtype)
        case "zeros":
            return torch.zeros(size, dtype=dtype)
        case str(scheme):
            raise ValueError(f"`{scheme}` is not a way to initialise a tensor")
        case init:
            pass

    values: dict[str, torch.Tensor] = {}
    if size:
        values["h"] = torch.arange(size[0], dtype=wide).reshape(-1, *[1] * (len(size) - 1))

    def draw(expr: Expr) -> Expr:
        if isinstance(expr, Call) and expr.function == "normal":
            (std,) = (evaluate(draw(each), values) for each in expr.args)
            name = f"draw {len(values)}"
            values[name] = std * torch.randn(size, generator=generator, dtype=wide)
            return Name(name)
        return rebuild(expr, draw)

    value = torch.as_tensor(evaluate(draw(init), values), dtype=wide)
    return value.expand(size).clone().to(dtype)


def _prefixed(prefix: str, tensors: tuple[Weight, ...]) -> list[Weight]:
    return [replace(each, name=f"{prefix}.{each.name}") for each in tensors]
