"""syntax.File → model.Architecture: everything a text can get wrong, found at once.

    arch = check(parse(text))             # raises LoomError with every finding
    arch.blocks["local"].head_dim         # 64
    block(arch, "local", width=512)       # the same block at another width

A file with holes is a space; it is checked by checking plain files in which every
alternative of every hole occurs (see `search.space`, which calls back here).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ...grammar import syntax
from ...grammar.diagnostics import Diagnostic, LoomError, did_you_mean, error
from ...grammar.functions import HOLES
from ...grammar.source import NOWHERE
from ...grammar.syntax import Expr, File, Name
from ..model import Architecture, Block, Model
from .around import Around
from .blocks import Sizes, elaborate_block
from .layers import elaborate_part
from .library import Library
from .models import NORMS, elaborate_model
from .patches import takes_images
from .scope import Findings

DEFAULT_WIDTH = 64  # of a layer that stands alone


def check(file: File) -> Architecture:
    """Check a plain file. Raises `LoomError` with all findings."""
    _plain(file)
    findings = Findings()
    _unique(file, findings)
    _conditions(file, findings)
    library = Library.of(file)
    blocks: dict[str, Block] = {}
    models: dict[str, Model] = {}
    warnings: list[Diagnostic] = []
    own = (each for each in file.items if isinstance(each, syntax.Block))
    for item in own:
        name = item.name
        if any(param.default is None for param in item.params):
            continue  # it has no sizes until a model calls it
        with findings.guard(), _bounded(item):
            try:
                call = Name(name, item.span)
                blocks[name] = _alone(library, item.kind, call, Sizes(), warnings)
            except LoomError as problem:
                _of_a_layer(file, item, problem, warnings)
    for name, each in library.models.items():
        if any(param.default is None for param in each.params):
            continue
        with findings.guard(), _bounded(each):
            models[name] = elaborate_model(library, Name(name, each.span), warnings)
    findings.settle()
    return Architecture(file, blocks, models, tuple(dict.fromkeys(warnings)))


def _of_a_layer(
    file: File, item: syntax.Block, problem: LoomError, warnings: list[Diagnostic]
) -> None:
    """Pass over what only a model can check, in which it is checked (W004).

    A layer takes lanes where its model has them, and a block may read the layer below.
    """
    if item.kind == "layer" and item.name in _used(file):
        return
    on_a_grid = any(isinstance(each, syntax.Model) and takes_images(each) for each in file.items)
    if on_a_grid and item.name in _used(file) and "L214" in {e.code for e in problem.diagnostics}:
        return  # the grid is that of the model's images
    if not any(each.code == "L224" for each in problem.diagnostics):
        raise problem
    if item.name in _used(file):
        return
    warnings.append(
        Diagnostic(
            "W004",
            f"`{item.name}` reads the layer below, and no model uses it",
            item.span,
            "it has not been checked",
            "put it in a model, above another block",
            severity="warning",
        )
    )
    others = [each for each in problem.diagnostics if each.code != "L224"]
    if others:
        raise LoomError(others)


def _used(file: File) -> set[str]:
    """Return every name that models, lets, searches and the bases of blocks mention."""
    exprs = [item.base for item in file.items if isinstance(item, syntax.Block) and item.base]
    for item in file.items:
        if isinstance(item, syntax.Model | syntax.Let | syntax.Search):
            exprs += [expr for _, expr in syntax.expressions(item)]
    nodes = [node for expr in exprs for node in syntax.walk(expr)]
    called = {node.function for node in nodes if isinstance(node, syntax.Call)}
    return called | {node.id for node in nodes if isinstance(node, Name)}


@contextmanager
def _bounded(item: syntax.Block | syntax.Model) -> Iterator[None]:
    """Definitions that use definitions can nest deeper than any expression may be written."""
    try:
        yield
    except RecursionError:
        raise error(
            "L213",
            f"`{item.name}` expands into too much",
            item.span,
            "its definitions nest too deeply",
        ) from None


def is_space(file: File) -> bool:
    """Say whether a file has holes or a search block, which `search` knows how to read."""
    return any(isinstance(item, syntax.Search) for item in file.items) or any(_holes(file))


def _plain(file: File) -> None:
    """Refuse a file that leaves something open outside of its search block (L223)."""
    for node in _holes(file):
        raise error(
            "L223",
            "this is a space, not an architecture",
            node.span,
            f"`{node.function}` leaves something open",
            "`headloom search` draws from it, and so does `hl.search`",
        )


def _holes(file: File) -> Iterator[syntax.Call]:
    """Yield what is left open outside of the search block."""
    for item in file.items:
        if not isinstance(item, syntax.Search):
            for node in (
                each for _, expr in syntax.expressions(item) for each in syntax.walk(expr)
            ):
                if isinstance(node, syntax.Call) and node.function in HOLES:
                    yield node


def _unique(file: File, findings: Findings) -> None:
    seen: set[tuple[str, str]] = set()
    for item in file.items:
        kind = "definition" if isinstance(item, syntax.Definition) else "item"
        name = getattr(item, "name", "search")
        key = (item.kind if isinstance(item, syntax.Definition) else kind, name)
        with findings.guard():
            if key in seen:
                raise error(
                    "L211", f"`{name}` is defined twice", item.span, "", "choose another name"
                )
        seen.add(key)


def _conditions(file: File, findings: Findings) -> None:
    """Refuse a `where` that fixes no threshold (L220)."""
    for item in file.items:
        owner = item.kind if isinstance(item, syntax.Definition) else ""
        for each, _ in syntax.expressions(item):
            if isinstance(each, syntax.Setting | syntax.Result) and each.where is not None:
                with findings.guard():
                    if getattr(each, "name", owner) != "normalize":
                        raise error(
                            "L220",
                            "only a normaliser has a condition",
                            each.where.span,
                            "",
                            "leave the `where` out",
                        )


def block(
    arch: Architecture,
    name: str | Expr,
    width: int | None = None,
    context_width: int | None = None,
) -> Block:
    """Return a block at a given width. Raises `LoomError` (L218 where there is no such block)."""
    call = Name(name) if isinstance(name, str) else name
    library = Library.of(arch.file)
    item = library.item(call)
    with _bounded(item):
        return _alone(library, item.kind, call, Sizes(width, context_width))


def _alone(
    library: Library,
    kind: str,
    call: Expr,
    sizes: Sizes,
    warnings: list[Diagnostic] | None = None,
) -> Block:
    """Return a block, a layer or a feed-forward that is in no model."""
    if kind == "block":
        return elaborate_block(library, call, sizes, warnings)

    def block(call: Expr, width: int) -> Block:
        return elaborate_block(library, call, replace(sizes, width=width))

    width = DEFAULT_WIDTH if sizes.width is None else sizes.width
    return elaborate_part(library, call, Around(width, block, norm=Name(NORMS["rms"])))


def find(
    arch: Architecture,
    name: str | None,
    width: int | None = None,
    context_width: int | None = None,
) -> Block | Model:
    """Return the block or model of a name; without one, the only model, or the only block."""
    if name is None:
        name = _only(arch)
    if name in arch.models:
        return arch.models[name]
    if name in arch.blocks and width is None and context_width is None:
        return arch.blocks[name]
    library = Library.of(arch.file)
    if library.kind_of(Name(name)) is None:
        known = [*arch.models, *library.blocks, *library.layers, *library.ffns]
        have = ", ".join(f"`{each}`" for each in known) or "nothing"
        raise error(
            "L218",
            f"there is no block or model `{name}`",
            arch.file.span or NOWHERE,
            "",
            did_you_mean(name, known, f"this file has {have}"),
        )
    return block(arch, name, width, context_width)


def _only(arch: Architecture) -> str:
    for names in (list(arch.models), list(arch.blocks)):
        if len(names) == 1:
            return names[0]
    known = [*arch.models, *arch.blocks]
    if not known:
        raise error("L218", "this file has no block and no model", arch.file.span)
    raise error(
        "L218",
        "which of these is meant?",
        arch.file.span,
        ", ".join(known),
        f"write FILE:{known[0]}",
    )
