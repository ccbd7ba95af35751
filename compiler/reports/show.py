"""What `headloom show` prints: parts, graph, mask, cost."""

from __future__ import annotations

from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..algebra.tiles import FULL, PARTIAL, classify
from ..facts.cost import cost
from ..model import Block, Model, Pairwise, Patches
from ..pipeline import lower
from ..plan.plan import Target
from .picture import describe, graph_lines, mask_picture


def layer_name(layer: Block) -> str:
    """Return what a layer is made of: `pre(local, swiglu)`."""
    parts = ", ".join(
        layer_name(each.what) if each.what.kind == "layer" else each.what.name
        for each in layer.parts
        if each.what.kind != "stage"
    )
    return f"{layer.name}({parts})"


def _patches(patches: Patches) -> str:
    """Return what is cut of images, for people."""
    height, width = patches.size
    grid = "" if patches.grid is None else f" in {patches.grid[0]} rows of {patches.grid[1]}"
    return f"patches of {patches.channels} × {height} × {width}{grid}"


def show(what: Block | Model, tokens: int, console: Console | None = None) -> None:
    """Print a block or model for a person."""
    console = console or Console(highlight=False)
    if isinstance(what, Model):
        console.print(
            f"[bold]{what.name}[/]: {len(what.layers)} layers of width {what.width}"
            + (f", vocabulary {what.vocab}" if what.vocab else "")
            + (f", {_patches(what.patches)}" if what.patches else "")
        )
        console.print("layers: " + " ".join(map(layer_name, what.run)))
        if what.encoder is not None:
            console.print(
                f"encoder: {what.encoder.name}, "
                f"{len(what.encoder.layers)} layers of width {what.encoder.width}"
            )
    blocks = what.blocks
    for block in blocks:
        _show_block(block, tokens, console)
    console.print(costs(what, tokens))


def _show_block(block: Block, tokens: int, console: Console) -> None:
    parts = Table.grid(padding=(0, 2))
    for name, value in [*describe(block), *_tiles(block, tokens)]:
        parts.add_row(Text(name, "cyan"), Text(value))
    panels = [Panel(parts, title=block.name, expand=False)]
    for name, mixing in block.mixings.items():
        picture = mask_picture(mixing)
        if picture:
            title = "queries ↓ keys →" if len(block.mixings) == 1 else f"{name}: queries ↓ keys →"
            panels.append(Panel(Text("\n".join(picture)), title=title, expand=False))
    console.print(Columns(panels))
    for line in graph_lines(lower(block, Target("torch"))):
        console.print(f"  {line}", style="dim", markup=False, soft_wrap=True)


def _tiles(block: Block, tokens: int) -> list[tuple[str, str]]:
    """Say how much of the map a kernel with tiles of 128 would have to visit."""
    lines = []
    for name, mixing in block.mixings.items():
        if not isinstance(mixing.mix, Pairwise) or not {mixing.queries, mixing.keys} <= {"n", "m"}:
            continue
        found = classify(mixing.mix.mask, tokens, tokens, heads=mixing.heads)
        rows, columns = found.shape
        own = "" if len(block.mixings) == 1 else f" of {name}"
        lines.append(
            (
                f"tiles{own} at {tokens:,}",
                f"{found.count(FULL) / (rows * columns):.1%} full, "
                f"{found.count(PARTIAL) / (rows * columns):.1%} partial",
            )
        )
    return lines


def costs(what: Block | Model, tokens: int) -> Table:
    """Return the table of what it costs at some lengths."""
    table = Table(title="cost", title_justify="left")
    table.add_column("")
    lengths = sorted({1024, tokens, 4 * tokens})
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    found = cost(what)
    table.add_row("parameters", *[f"{found.params:,}"] * len(lengths))
    table.add_row("flops, forward", *(f"{found.flops(n):.3g}" for n in lengths))
    table.add_row("cache bytes, float32", *(f"{found.cache_bytes(n):,}" for n in lengths))
    table.add_row("activation bytes", *(f"{found.activation_bytes(n):,}" for n in lengths))
    return table


def as_json(what: Block | Model, tokens: int) -> dict[str, Any]:
    """Return the same for a program."""
    found = cost(what)
    blocks = what.blocks
    answer: dict[str, Any] = {
        "name": what.name,
        "kind": "model" if isinstance(what, Model) else "block",
        "width": what.width,
        "tokens": tokens,
        "params": found.params,
        "flops": found.flops(tokens),
        "cache_bytes": found.cache_bytes(tokens),
        "activation_bytes": found.activation_bytes(tokens),
        "blocks": [
            {
                "name": block.name,
                **{name: value for name, value in describe(block) if name},
                "graph": graph_lines(lower(block, Target("torch"))),
            }
            for block in blocks
        ],
    }
    if isinstance(what, Model):
        answer["layers"] = [layer_name(layer) for layer in what.run]
        answer["encoder"] = None if what.encoder is None else what.encoder.name
    return answer
