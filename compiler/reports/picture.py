"""Pictures in text: a mask as blocks, a graph as lines.

█▄··         each row is a query, each column a key; two rows share a line of text:
███▄         █ both see the key, ▀ the upper one, ▄ the lower one, · neither
"""

from __future__ import annotations

import numpy as np

from ...grammar.expr import FALSE, TRUE
from ...grammar.show import show
from ...grammar.syntax import Expr
from ..algebra.masks import extent
from ..algebra.normalizers import exponential
from ..algebra.points import visible_pairs
from ..graph.graph import AnyNode
from ..graph.operations import Attend, Scan, Stage, StatisticOf
from ..model import Block, Keep, Mixing, Pairwise, Select
from ..plan.plan import Plan

_HALVES = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def mask_picture(mixing: Mixing, cells: int = 32) -> list[str]:
    """Return the mask of any head as lines of text; [] for a recurrence or a mask of streams.

    A mask that reaches further back than the picture is wide is shown scaled down: a cell is
    then a square of tokens, visible where any pair in it is.
    """
    if not isinstance(mixing.mix, Pairwise) or "n" not in (mixing.queries, mixing.keys):
        return []
    back = extent(mixing.mix.mask).back or 0
    step = min(16, max(1, -(-2 * (back + 1) // cells)))
    tokens = cells * step
    seen = visible_pairs(mixing, tokens, tokens, np.zeros((1, tokens), np.int64))
    if seen is None or seen.shape[1:] != (tokens, tokens):
        return []
    rows = seen[0].reshape(cells, step, cells, step).any(3).any(1).tolist()
    lines = [
        "".join(_HALVES[bool(a), bool(b)] for a, b in zip(top, bottom, strict=True))
        for top, bottom in zip(rows[::2], rows[1::2], strict=True)
    ]
    return [*lines, f"a cell is {step} tokens"] if step > 1 else lines


def graph_lines(plan: Plan) -> list[str]:
    """Return one line a node: name, dimensions, operation, inputs, what it was told."""
    nodes = plan.graph.nodes
    names = [node.name for node in nodes]
    wide = max(map(len, names), default=0)
    shapes = {node.name: f"[{', '.join(map(str, node.dims))}]" for node in nodes}
    most = max(map(len, shapes.values()), default=0)
    return [
        f"{node.name:<{wide}} : {shapes[node.name]:<{most}} = {node.op.name}"
        f"({', '.join(node.inputs)}){_told(node, plan.path(node))}"
        for node in nodes
    ]


def _told(node: AnyNode, path: str | None) -> str:
    shown = [f"self.{node.module}"] if node.module else []
    match node.op:
        case Stage(_, options):
            shown += [each for name, value in options for each in _option(name, value)]
        case Attend(mix):
            form = exponential(mix.normalize)
            shown.append(f"scale: {mix.scale}")
            shown += _option("similarity", mix.similarity) + _option("score", mix.score)
            shown += _option("mask", mix.mask)
            shown += [] if mix.select is None else [f"select: {_selected(mix.select)}"]
            shown += [] if mix.keep is None else [f"keep: {_held(mix.keep)}"]
            shown.append(f"normalize: {mix.normalize.name}{' (exponential)' if form else ''}")
            shown += _option("weights", mix.weights)
            shown.append(f"rate: {mix.dropout}")
        case Scan(mix):
            shown.append(f"mix: {mix.name}")
        case StatisticOf(kind, expr):
            shown += [f"kind: {kind}", *_option("expr", expr)]
    shown += [] if path is None else [f"path: {path}"]
    return f"   # {'; '.join(shown)}" if shown else ""


def _selected(select: Select) -> str:
    """Write a selection as the language has it, the heads that share it as a number."""
    said = [f"{select.kind}({select.amount:g}, {show(select.score)}"]
    said += [f"size = {select.size}"] if select.size > 1 else []
    said += [f"rows = {select.rows}"] if select.rows > 1 else []
    said += [f"heads = {select.share}"] if select.share > 1 else []
    said += [f"always = {show(select.always)}"] if select.always != FALSE else []
    said += ["counted = true"] if select.counted else []
    said += [f"among = {show(select.among)}"] if select.among != TRUE else []
    said += [f"within = {select.within}"] if select.within else []
    return f"{', '.join(said)})"


def _held(keep: Keep) -> str:
    """Write what stays held as the language has it, the heads that share it as a number."""
    said = [f"top({keep.count}, {show(keep.score)}"]
    said += [f"heads = {keep.share}"] if keep.share > 1 else []
    said += [f"always = {show(keep.always)}"] if keep.always != FALSE else []
    return f"{', '.join(said)})"


def _option(name: str, value: object) -> list[str]:
    if value is None or value == TRUE:
        return []
    return [f"{name}: {show(value) if isinstance(value, Expr) else value}"]


def describe(block: Block) -> list[tuple[str, str]]:
    """Return what a reader wants to know of a block first, as (name, value) pairs."""
    heads = f"{block.heads} × {block.head_dim}"
    if block.kv_heads != block.heads:
        heads += f", {block.kv_heads} key/value heads"
    if block.value_heads != block.kv_heads:
        heads += f", {block.value_heads} value heads"
    if block.value_dim != block.head_dim:
        heads += f", values of {block.value_dim}"
    lines = [("width", str(block.width)), ("heads", heads)]
    if block.context_width is not None:
        lines.append(("context width", str(block.context_width)))
    if block.below:
        lines.append(("layers below", "gave " + ", ".join(block.below)))
    if block.shared:
        lines.append(("layers above", "read " + ", ".join(block.shared)))
    if block.lends:
        lines.append(("kept keys", "read above: " + ", ".join(block.lends)))
    if block.borrows:
        lines.append(("kept keys", "read below, by " + ", ".join(block.borrows)))
    for name, mixing in block.mixings.items():
        mix = mixing.mix
        if len(block.mixings) > 1:
            q = mixing.inputs[0].shape
            lines.append(
                (
                    name,
                    f"{mixing.heads} heads, {mixing.queries} × {mixing.keys} tokens"
                    if q.heads
                    else "",
                )
            )
        if isinstance(mix, Pairwise):
            lines += [
                ("score", show(mix.score)),
                ("mask", show(mix.mask)),
                ("normalize", mix.normalize.name),
            ]
        else:
            lines.append(("mix", mix.name))
            lines += [("", f"{each.name} <- {show(each.value)}") for each in mix.updates]
    return lines
