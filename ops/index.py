"""`index`: where each token stands, [tokens, 1], counted as positions are.

It counts from 0 in each sequence, goes on with a cache, and is what `positions=` says at a call.
It stays float32 where the block is in less, which holds whole numbers up to 2^24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .norms import wide
from .op import Op, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Index(Op):
    name = "index"
    positional = True
    bare = True
    wide = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        return Shape(inputs[0].tokens, 1)

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        (x,) = inputs
        at = run.places(x).expand(x.shape[0], x.shape[-2])
        return at[..., None].to(wide(x).dtype)

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"places_of({self.positions_of(shapes[0])}, {inputs[0]})"
