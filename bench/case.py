"""What is measured: a description, its sizes, and what is done with it.

    case = Case("block a { heads = 8; mask = causal }", "a", tokens=4096, run="backward")

A case is plain data, so that a fresh process can be told to run it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..compiler.checking.check import find
from ..compiler.facts.cost import cost
from ..compiler.loading import load
from ..compiler.model import Block, Model, Pairwise
from ..grammar.expr import rebuild
from ..grammar.syntax import Binary, Expr, Index, Name, Number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHOWN = {
    "forward": "forward",
    "backward": "forward and backward",
    "decode": "one decoded token",
    "compiling": "text to module",
}
_PASSES = {"forward": 1, "backward": 3}  # a backward pass is two forward ones


@dataclass(frozen=True, slots=True)
class Case:
    """A block or model at a length; `run` is one of `SHOWN`.

    `tokens` are those of a row, or of the cache before the decoded token. `documents` packs
    so many equal ones into a row (as `segments`); 0 gives none. `optimize` is for ours alone.
    """

    text: str
    name: str | None = None
    tokens: int = 1024
    run: str = "forward"
    width: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    documents: int = 0
    optimize: str = "default"

    @property
    def what(self) -> Block | Model:
        """The checked block or model. Raises `LoomError`."""
        return find(load(self.text, "loom"), self.name, self.width)

    def of_length(self, tokens: int) -> Case:
        return replace(self, tokens=tokens)


def torch_dtype(case: Case) -> torch.dtype:
    """Return PyTorch's dtype of a case."""
    import torch

    found: torch.dtype = getattr(torch, case.dtype)
    return found


def inputs(case: Case, what: Block | Model) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the arguments of a call, the same for everyone: x [b, n, width] or tokens [b, n]."""
    import torch

    n = case.tokens
    draw = torch.Generator().manual_seed(0)
    blocks = what.blocks
    if isinstance(what, Model) and what.vocab is not None:
        x = torch.randint(what.vocab, (case.batch, n), generator=draw).to(case.device)
    else:
        taken = what.taken if isinstance(what, Model) else what.width
        x = torch.randn(case.batch, n, taken, generator=draw)
        x = x.to(case.device, torch_dtype(case))
    given: dict[str, Tensor] = {}
    widths = [each.context_width for each in blocks if each.context_width is not None]
    encoder = what.encoder if isinstance(what, Model) else None
    if encoder is not None and encoder.vocab is not None:
        given["context"] = torch.randint(encoder.vocab, (case.batch, n), generator=draw)
    elif widths or encoder is not None:
        width = encoder.taken if encoder is not None else widths[0]
        context = torch.randn(case.batch, n, width, generator=draw)
        given["context"] = context.to(torch_dtype(case))
    if case.documents:
        given["segments"] = torch.arange(n) * case.documents // n
    return x, {name: each.to(case.device) for name, each in given.items()}


def flops(case: Case) -> int:
    """Return the operations of a run, by the pairs that see each other; none is counted twice.

    A decoded token is the last one of a sequence that is one token longer.
    """
    what, n = case.what, case.tokens
    if case.run == "compiling":
        return 0
    if case.run == "decode":
        return case.batch * (cost(what).flops(n + 1) - cost(what).flops(n))
    if not case.documents:
        one = cost(what).flops(n)
    elif what.marks and isinstance(what, Block):
        one = cost(_documents_known(what, n // case.documents)).flops(n)
    else:  # each document is a sequence of its own
        one = case.documents * cost(what).flops(n // case.documents)
    return _PASSES[case.run] * case.batch * one


def _documents_known(block: Block, length: int) -> Block:
    """Write `t // length` for `doc[t]`, so that a mask of equal documents is counted exactly."""

    def known(expr: Expr) -> Expr:
        if isinstance(expr, Index) and expr.base == Name("doc"):
            return Binary("//", expr.items[0], Number(length))
        return rebuild(expr, known)

    def changed(mix: Pairwise) -> Pairwise:
        return replace(mix, mask=known(mix.mask))

    return block.remixed(changed)
