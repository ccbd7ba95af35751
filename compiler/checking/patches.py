"""What a model that takes images says of them: `patches(16)`, `patches((8, 4), channels = 1)`.

The linear map of what one patch shows is a block of the model's own, as its two ends are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...grammar import syntax
from ...grammar.diagnostics import error
from ...grammar.parse import parse_expression
from ...grammar.syntax import Call, Expr, ListOf, Name, Number, Parameter
from ...ops import Shape
from ..model import Apply, Block, Flow, Part, Patches, flow_mapped
from .library import bind
from .scope import Scope

NONE = Name("none")
PARAMETERS = (Parameter("size"), Parameter("channels", Number(3)), Parameter("image", NONE))
MODULE = "patch_embed"  # what the linear map is called
Compose = Callable[[Expr, Shape], Block]  # the block of a pipeline, of what comes in


def read_patches(value: Expr, scope: Scope, compose: Compose) -> Patches | None:
    """Return what `patches` says; None for `none`. Raises `LoomError` (L209, L238)."""
    if value == NONE:
        return None
    if not isinstance(value, Call) or value.function != "patches":
        raise error("L238", "this says no patches", value.span, "", "write `patches(16)`")
    given = bind("patches", PARAMETERS, value, value.span)
    size = _sides(given["size"], scope, "`size`")
    channels = scope.size(given["channels"], "`channels`")
    image = None if given["image"] == NONE else _sides(given["image"], scope, "`image`")
    for side, whole, one in zip(("height", "width"), image or (), size, strict=False):
        if whole % one:
            raise error(
                "L238",
                f"the {side} of a patch must divide that of the image",
                given["image"].span,
                f"{side} {whole}, patches of {one}, remainder {whole % one}",
            )
    shape = Shape("n", channels * size[0] * size[1])
    return Patches(size, channels, _named(compose(_MAP, shape)), image)


_MAP = parse_expression("x | linear(width, bias = true)")


def _sides(value: Expr, scope: Scope, what: str) -> tuple[int, int]:
    """Return (height, width), both of them where there is one number."""
    match value:
        case ListOf((height, width)):
            return scope.size(height, what), scope.size(width, what)
        case ListOf():
            raise error("L238", f"{what} is a number, or (height, width)", value.span)
        case _:
            side = scope.size(value, what)
            return side, side


def _named(block: Block) -> Block:
    def named(node: Apply | Part) -> Flow:
        return replace(node, module=MODULE) if node.module else node

    return replace(block, out=flow_mapped(block.out, named))


def takes_images(item: syntax.Model) -> bool:
    """Say whether a model's text has patches."""
    return any(
        isinstance(each, syntax.Setting) and each.name == "patches" and each.value != NONE
        for each in item.body
    )
