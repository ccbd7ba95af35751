"""Tiles of attention compiled by `torch.compile`: their weights, and the derivative of these.

Each is compiled once for all lengths, heads and tiles, when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles import several

COMPILED_TILES: dict[Any, Any] = {}


class CompiledTile(NamedTuple):
    """The weights of a tile, and these with the gradients of some of what they are made of."""

    weigh: Callable[..., Any]
    gradients: Callable[..., Any]


def compiled_tile(weigh: Callable[..., Any]) -> CompiledTile:
    """Return the compiled form of a function, or of a method that reads nothing of its module."""
    function = getattr(weigh, "__func__", weigh)
    if function not in COMPILED_TILES:
        module = (None,) if function is not weigh else ()

        def forth(leaves: list[Any]) -> tuple[Tensor, ...]:
            return several(function(*module, *leaves))

        def back(some: list[int], leaves: list[Any], outer: list[Tensor]) -> Any:
            def made_of(*inputs: Tensor) -> tuple[Tensor, ...]:
                every = list(leaves)
                for at, each in zip(some, inputs, strict=True):
                    every[at] = each
                return forth(every)

            found: Any = torch.func.vjp(made_of, *[leaves[at] for at in some])
            made, pulled = found
            theirs = (grad.to(x.dtype) for grad, x in zip(outer, made, strict=True))
            return made[0], pulled(tuple(theirs))

        fast, slope = compiled_alike(forth), compiled_alike(back)
        COMPILED_TILES[function] = CompiledTile(
            lambda *leaves: fast(detached(leaves)),
            lambda some, leaves, outer: slope(some, detached(leaves), detached(outer)),
        )
    made: CompiledTile = COMPILED_TILES[function]
    return made


def detached(given: Any) -> list[Any]:
    """Return what is given, none of it with a history, which would be compiled for by itself."""
    return [x.detach() if isinstance(x, Tensor) else x for x in given]


def compiled_alike(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled for tensors of all sizes but 0 and 1, of which no two are one.

    Raises `RuntimeError` where it cannot be compiled.
    """
    compiler: Any = torch.compile  # whose types do not know all that it takes
    made = compiler(function, dynamic=True, fullgraph=True, isolate_recompiles=True)

    def called(*given: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental import _config as shapes

        try:
            with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return made(*given)
        except TorchDynamoException as problem:
            why = " ".join(str(problem).partition("\n\nSet TORCHDYNAMO")[0].split())
            raise RuntimeError(
                'the tiles of an attention could not be compiled, as `optimize = "max"` asks: '
                f"{why}; install a C++ compiler (g++, or the one "
                'that CXX names), or compile the module with `optimize = "default"`'
            ) from problem

    return called
