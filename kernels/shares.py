"""How the gradients of learned tensors are gathered, as data.

Every place where a learned tensor is read has its share in the tensor's gradient: the sum,
over the pairs that read an element there, of what the result changes with it.

    t[i, h], z[h], bias     one read, by plain names: a sum over rows, then an einsum
    g[j], gain[j, h]        likewise, a sum over columns
    t[i, h // 2], w[3]      a sum over rows, added to the gradient once for each tile
    beta[doc[j]]            a sum over columns, added likewise
    table[h, i - j]         added tile by tile, for no row or column reads one element alone

The last three kinds are scattered: they are added to a buffer of the tensor's own shape, in
float32 and by atomic operations, so that their last bits may differ between runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..grammar.derive import derivative
from ..grammar.expr import names
from ..grammar.syntax import Index, Name, Number
from .places import on_own_axis, surely_inside
from .spec import Attend, Tensor, index_names, reads

Along = Literal["rows", "columns", "pairs"]


@dataclass(frozen=True, slots=True)
class Share:
    """One read of a learned tensor: where its derivative is summed, and how that ends.

    `einsum` turns the sums [b, heads, n or m] into the gradient; without one they scatter.
    """

    tensor: Tensor
    read: Index | Name
    along: Along
    einsum: str = ""


def shares(spec: Attend, along: str = "") -> list[Share]:
    """Return every share, or those of one kind, what ends in an einsum first."""
    found = _learned(spec)
    counted = [tensor for tensor, _ in found]
    made = [_share(spec, *each, alone=counted.count(each[0]) == 1) for each in found]
    made.sort(key=lambda share: not share.einsum)
    return [share for share in made if along in ("", share.along)]


def learned_sums(spec: Attend) -> tuple[dict[str, str], dict[str, str]]:
    """Return the learned tensors summed over rows and over columns, each with its einsum.

    `t[i, h]` with a batch axis is `{"t": "bhi->bih"}`: what turns [b, H, n] into its gradient.
    """
    rows, columns = (
        {each.tensor.name: each.einsum for each in shares(spec, along) if each.einsum}
        for along in ("rows", "columns")
    )
    return rows, columns


def scattered(spec: Attend) -> tuple[str, ...]:
    """Return the learned tensors whose gradients are buffers that shares are added to."""
    return tuple(dict.fromkeys(each.tensor.name for each in shares(spec) if not each.einsum))


def _learned(spec: Attend) -> list[tuple[Tensor, Index | Name]]:
    """Return the reads of learned tensors that the result changes with, in the tensors' order."""
    parts = [expr for part, expr, _ in spec.parts() if part != "mask"]
    every = dict.fromkeys(
        (tensor, read)
        for expr in parts
        for tensor, read in reads(expr, spec.tensors)
        if tensor.differentiable and any(derivative(other, read) != Number(0) for other in parts)
    )
    return sorted(every, key=lambda each: spec.tensors.index(each[0]))


def crowded(spec: Attend) -> bool:
    """Say whether tiles hold much more than usual, so that they have to be smaller.

    An element that every pair reads anew takes its address, and where it is learned or may lie
    outside its tensor, more than that.
    """
    return any(
        tensor.differentiable or not all(_inside(tensor, read, spec))
        for _, expr, _ in spec.parts()
        for tensor, read in reads(expr, spec.tensors)
        if _along(read) == "pairs"
    )


def _inside(tensor: Tensor, read: Index | Name, spec: Attend) -> list[bool]:
    items = read.items if isinstance(read, Index) else ()
    placed = zip(items, tensor.shape, strict=True)
    return [surely_inside(item, size, spec.heads) for item, size in placed]


def _along(read: Index | Name) -> Along:
    """Say over what a read is summed: over rows, where its index is the same for every key."""
    found = names(read)
    of_row = not found.isdisjoint({"i", "seen", "sum"})
    if "s" in found or ("j" in found and of_row):
        return "pairs"
    return "columns" if "j" in found else "rows"


def _share(spec: Attend, tensor: Tensor, read: Index | Name, alone: bool) -> Share:
    indices, along = index_names(read), _along(read)
    items = read.items if isinstance(read, Index) else ()
    placed = zip(items, tensor.shape, strict=True)
    plain = all(on_own_axis(item, size, spec.heads) for item, size in placed)
    if along == "pairs" or not (alone and plain and len(set(indices)) == len(indices)):
        return Share(tensor, read, along)
    target = "".join((*(("b",) if tensor.batched else ()), *indices))
    return Share(tensor, read, along, f"bh{'j' if along == 'columns' else 'i'}->{target}")
