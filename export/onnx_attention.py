"""Attentions that were written out become one operator: `Attention`, with a mask or a soft cap.

before    p = Softmax(cap * Tanh(MatMul(q * c, k.mT)) + mask);  y = MatMul(p, v)
after     y = Attention(q, k, v, mask, scale = c * cap, softcap = cap)

Where heads share keys, the queries of a group are laid one after the other by `Reshape`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule


@dataclass(frozen=True)
class Logits:
    """One way to write logits: what it reads beside q and k, its text, and the mask it adds."""

    reads: tuple[str, ...]
    text: Callable[..., Any]  # of op, the product of q and k as a function of q, q, and these
    mask: Callable[..., Any] | None = None  # of op and these


def _cap(op: Any, product: Any, q: Any, c: Any, cap: Any) -> Any:
    return op.Mul(op.Tanh(product(op.Mul(q, c))), cap)


LOGITS = (
    Logits(
        ("c", "cap", "mask"),
        lambda op, product, q, c, cap, mask: op.Add(_cap(op, product, q, c, cap), mask),
        lambda _, c, cap, mask: mask,  # noqa: ARG005
    ),
    Logits(("c", "cap"), _cap),
    Logits(
        ("bias", "mask"),
        lambda op, product, q, bias, mask: op.Add(op.Add(product(q), bias), mask),
        lambda op, bias, mask: op.Add(mask, bias),
    ),
    Logits(
        ("bias", "mask"),
        lambda op, product, q, bias, mask: op.Add(op.Sub(product(q), bias), mask),
        lambda op, bias, mask: op.Sub(mask, bias),
    ),
    Logits(
        ("mask",),
        lambda op, product, q, mask: op.Add(product(q), mask),
        lambda _, mask: mask,
    ),
)
SHAPES = ("queries", "scores", "weights", "values")  # what is laid out anew by groups of heads


def _rule(logits: Logits, grouped: bool) -> RewriteRule:
    """Return the rule of one way to write logits."""
    names = ("q", "k", "v", *logits.reads, *(SHAPES if grouped else ()))

    def before(op: Any, *given: Any) -> Any:
        found = dict(zip(names, given, strict=True))

        def shaped(x: Any, by: str, **named: Any) -> Any:
            return op.Reshape(x, found[by], **named) if grouped else x

        def product(q: Any) -> Any:
            made = op.MatMul(shaped(q, "queries"), found["k"])
            return shaped(made, "scores", _outputs=["maps"])

        own = [found[name] for name in logits.reads]
        p = op.Softmax(logits.text(op, product, found["q"], *own), axis=-1)
        made = op.MatMul(shaped(p, "weights"), found["v"])
        return shaped(made, "values", _outputs=["y"])

    def after(op: Any, q: Any, k: Any, v: Any, **found: Any) -> Any:
        own = {name: found[name] for name in logits.reads}
        mask = [] if logits.mask is None else [logits.mask(op, **own)]
        scale, more = 1.0, {}
        if "cap" in own:
            cap = _number(own["cap"]) or 0.0
            scale, more = (_number(own["c"]) or 0.0) * cap, {"softcap": cap}
        k = op.Transpose(k, perm=[0, 1, 3, 2])
        return op.Attention(q, k, v, *mask, scale=scale, **more)

    parameters = (Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in ("op", *names))
    before.__signature__ = Signature(list(parameters))  # type: ignore[attr-defined]
    return RewriteRule(before, after, _fits)


def _fits(_: Any, q: ir.Value, k: ir.Value, v: ir.Value, **found: ir.Value) -> bool:
    """Say whether these have four dimensions, and the mask is one of every pair."""
    sizes = {name: _sizes(each) for name, each in {"q": q, "k": k, "v": v, **found}.items()}
    if any(len(sizes[name]) != 4 for name in ("q", "k", "v")):
        return False
    (batch, heads, tokens, _), (_, groups, _, keys) = sizes["q"], sizes["k"]
    _, values, _, dim = sizes["v"]
    if not (isinstance(heads, int) and isinstance(groups, int) and groups == values):
        return False
    if heads % groups or (heads != groups and "maps" not in found):
        return False
    shapes = {"maps": (batch, heads, tokens, keys), "y": (batch, heads, tokens, dim)}
    if any(name in found and sizes[name] != shape for name, shape in shapes.items()):
        return False
    if any(name in found and _number(found[name]) is None for name in ("c", "cap")):
        return False
    if any(not 1 <= len(sizes[name]) <= 4 for name in ("bias", "mask") if name in found):
        return False
    return "mask" not in found or sizes["mask"][-2:] == (tokens, keys)


def _sizes(value: ir.Value) -> tuple[Any, ...]:
    """Return a shape, () where it is not known."""
    return () if value.shape is None else tuple(value.shape)


def _number(value: ir.Value) -> float | None:
    """Return a constant of one number."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))


RULES = tuple(_rule(each, grouped) for each in LOGITS for grouped in (False, True))
