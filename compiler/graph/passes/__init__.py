"""Passes: pure functions Graph → Graph, one a module, each opening with an example.

`PASSES` is the order; `choose`, which needs to know the target, comes last in the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from ...model import Block
from ..build import build
from ..graph import Graph
from .drop_dead import drop_dead
from .drop_identities import drop_identities
from .fold_scale import fold_scale
from .fuse_attend import fuse_attend
from .share import share

Pass = Callable[[Graph], Graph]

PASSES: tuple[Pass, ...] = (drop_identities, share, fuse_attend, fold_scale, drop_dead)

__all__ = ["PASSES", "Pass", "simplest"]


@lru_cache(maxsize=256)
def simplest(block: Block) -> Graph:
    """Return the graph of a block after all passes."""
    graph = build(block)
    for each in PASSES:
        graph = each(graph)
    return graph
