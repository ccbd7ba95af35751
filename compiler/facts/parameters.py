"""The tensors a block or a model owns: their names, shapes and first values.

The names are the keys of every module's state dict (the reference, the emitted file, what
`load` builds), so that weights move freely between them:

    >>> [each.name for each in weights(block)]
    ['q_proj.weight', 'k_proj.weight', 'v_proj.weight', 'slope', 'o_proj.weight']

What training moves without a gradient is among them. Constants (`const`) are not: the text
determines them, so a module keeps them in buffers outside its state dict. torch is imported only
where values are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ...grammar.expr import rebuild
from ...grammar.source import Span
from ...grammar.syntax import Call, Expr, Name
from ...ops import OPS, Weight
from ..model import Apply, Block, Flow, Model, Part, flow_nodes

if TYPE_CHECKING:
    import torch


def owned(apply: Apply | Part, seen: set[Span] | None = None) -> tuple[Weight, ...]:
    """Return the tensors of one operation or part, under their full names in the block.

    A part that is among those `seen` has the tensors of the first of them.
    """
    if isinstance(apply, Part):
        seen = set() if seen is None else seen
        if apply.once is not None:
            if apply.once in seen:
                return ()
            seen.add(apply.once)
        return _prefixed(apply.module, weights(apply.what, seen))
    shapes = [each.shape for each in apply.inputs]
    return tuple(
        replace(each, name=f"{apply.module}.{each.name}")
        for each in OPS[apply.op].weights(shapes, dict(apply.options))
    )


def weights(block: Block, seen: set[Span] | None = None) -> tuple[Weight, ...]:
    """Return a block's tensors but constants: those of its streams, its own, those of `out`."""
    seen = set() if seen is None else seen
    found: dict[str, Weight] = {}
    for flow in [each.flow for each in block.streams]:
        found.update({each.name: each for each in _of_flow(flow, seen)})
    found.update({each.name: each for each in block.tensors if each.learned or each.moved})
    for flow in block.flows[len(block.streams) :]:
        found.update({each.name: each for each in _of_flow(flow, seen)})
    if block.experts is None:
        return tuple(found.values())
    count = block.experts.count
    return tuple(replace(each, shape=(count, *each.shape)) for each in found.values())


def _of_flow(flow: Flow, seen: set[Span]) -> Iterator[Weight]:
    for node in flow_nodes(flow):
        if isinstance(node, Apply | Part):
            yield from owned(node, seen)


def constants(block: Block) -> tuple[Weight, ...]:
    """Return the tensors that the text fixes: buffers that are not in the state dict."""
    return tuple(each for each in block.tensors if not (each.learned or each.moved))


def model_weights(model: Model) -> tuple[Weight, ...]:
    """Return a model's tensors but constants, the input's first and the head's last."""
    width = model.width
    found: list[Weight] = []
    seen: set[Span] = set()
    if model.encoder is not None:
        found += _prefixed("encoder", model_weights(model.encoder))
    if model.vocab is not None:
        found.append(Weight("embed_tokens.weight", (model.vocab, width), "embedding"))
    if model.patches is not None:
        found += weights(model.patches.embed, seen)
    if model.embed_position == "learned":
        found.append(Weight("embed_positions.weight", (model.positions, width), "embedding"))
    found += weights(model.embed, seen)
    if model.memory is not None:
        found.append(Weight("memory", (model.memory, width), "embedding"))
    for at, layer in enumerate(model.layers):
        found += _prefixed(f"layers.{at}", weights(layer, seen))
    tied = {each.name for each in found}
    return (*found, *(each for each in weights(model.head, seen) if each.name not in tied))


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


def _prefixed(prefix: str, tensors: tuple[Weight, ...]) -> tuple[Weight, ...]:
    return tuple(replace(each, name=f"{prefix}.{each.name}") for each in tensors)
