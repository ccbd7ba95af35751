"""Ids of the last tokens together: hashed n-grams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .op import Mismatch, Op, Option, Options, Run
from .shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1


def factors(seed: int, last: int) -> tuple[int, ...]:
    """Return an odd number below 2**32 for each of the last tokens (splitmix64, Steele 2014)."""
    found = []
    for at in range(1, last + 1):
        z = (seed + 0x9E3779B97F4A7C15 * at) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        found.append(((z ^ (z >> 31)) >> 32) | 1)
    return tuple(found)


class Bucket(Op):
    """`bucket(count, seed, last)`: which of `count` buckets the `last` tokens up to each are in.

    The ids times a factor each are joined by exclusive or; the rest by `count` is the bucket. A
    token before the first of its sequence has the id 0. The factors follow from the seed.
    """

    name = "bucket"
    options = (
        Option("count", "size", required=True),
        Option("seed", "number", 0),
        Option("last", "size", 2),
    )
    by_sequence = True

    def needs(self, out: Shape, inputs: Sequence[Shape], options: Options) -> Shape | None:
        return None

    def shape(self, inputs: Sequence[Shape], options: Options) -> Shape:
        seed = options["seed"]
        if seed != int(seed) or seed < 0:
            raise Mismatch("a seed is a whole number from 0", f"seed = {seed}", at="seed")
        if options["last"] > 64:
            raise Mismatch("a bucket is of 64 tokens at most", f"last = {options['last']}")
        return inputs[0]

    def eager(
        self, inputs: Sequence[Tensor], options: Options, weights: Mapping[str, Tensor], run: Run
    ) -> Tensor:
        import torch
        from torch.nn import functional

        (ids,), last = inputs, options["last"]
        n = ids.shape[-2]
        mixed = torch.zeros_like(ids)
        for back, factor in enumerate(factors(int(options["seed"]), last)):
            earlier = functional.pad(ids, (0, 0, back, 0))[..., :n, :]
            mixed = mixed ^ (earlier * factor)
        count: int = options["count"]
        return mixed % count

    def text(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"{self._call(inputs[0], options)}, {self.run_of(shapes[0])})"

    def resumed(
        self, inputs: Sequence[str], shapes: Sequence[Shape], options: Options, module: str
    ) -> str:
        return f"{self._call(inputs[0], options)}, known, before)"

    @staticmethod
    def _call(given: str, options: Options) -> str:
        return f"buckets({given}, {options['count']}, {factors(options['seed'], options['last'])}"

    def lookback(self, options: Options) -> int:
        return int(options["last"]) - 1
