"""Multi-query associative recall: what was the value of this key?

A context of `pairs` key-value pairs is followed by filler in which every key comes once more;
at that place the model must answer the key's value. Two layers of attention solve it exactly;
a state of fixed size cannot when there are many pairs.

    context       k1 v1 k2 v2 · then · k2 · · k1 ·       tokens
                              targets   v2    v1         asked at the keys, nowhere else

Arora et al. 2023, *Zoology* (2312.04927), generator `multiquery_ar`; here every draw, the
noise too, comes from the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .task import IGNORED, Array, Task

if TYPE_CHECKING:
    import numpy as np


def mqar(
    vocab: int = 64,
    pairs: int = 4,
    length: int = 32,
    power: float = 0.01,
    noise: bool = False,
    seed: int = 0,
) -> Task:
    """Return the task. Keys are 1 … vocab/2 - 1, values vocab/2 … vocab - 1.

    The gap before a key's second place is drawn with probability ∝ power · gap^(power - 1),
    without replacement. `noise` fills what is empty with tokens drawn from the whole
    vocabulary, in place of 0. Raises `ValueError` where these do not fit together.
    """
    half = vocab // 2
    if pairs < 1:
        raise ValueError(f"`pairs` must be 1 or more; pairs = {pairs}")
    if length % 2 or 4 * pairs > length:
        raise ValueError(
            f"`length` must be even and 4 · pairs at least; pairs = {pairs}, length = {length}"
        )
    if half - 1 < pairs:
        raise ValueError(
            f"`vocab` must leave each pair a key of its own: 2 · (pairs + 1) = {2 * (pairs + 1)}"
            f" at least; vocab = {vocab}, pairs = {pairs}"
        )
    if power <= 0:
        raise ValueError(f"`power` must be more than 0; power = {power}")
    gaps = (length - 2 * pairs) // 2

    def sample(numbers: np.random.Generator, batch: int) -> tuple[Array, Array]:
        import numpy as np  # here, so that the checking of a search does not load it

        chance = power * np.arange(1, gaps + 1, dtype=np.float64) ** (power - 1)
        keys = 1 + _without_replacement(numbers, np.ones(half - 1), batch, pairs)
        values = half + _without_replacement(numbers, np.ones(vocab - half), batch, pairs)
        places = 2 * pairs + 2 * _without_replacement(numbers, chance, batch, pairs)
        tokens = np.zeros((batch, length), dtype=np.int64)
        targets = np.full((batch, length), IGNORED, dtype=np.int64)
        if noise:
            tokens = numbers.integers(0, vocab, (batch, length), dtype=np.int64)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return tokens, targets

    settings = {"vocab": vocab, "pairs": pairs, "length": length, "power": power, "noise": noise}
    return Task("mqar", vocab, length, seed, tuple(settings.items()), sample)


def _without_replacement(
    numbers: np.random.Generator,
    chance: np.ndarray[tuple[int], np.dtype[np.float64]],
    batch: int,
    count: int,
) -> Array:
    """Draw `count` different indices a row, one after the other with the given chances.

    The largest of log p + Gumbel noise are such a draw (Yellott 1977), for all rows at once.
    """
    import numpy as np

    keys = np.log(chance) + numbers.gumbel(size=(batch, len(chance)))
    drawn: Array = np.argsort(-keys, axis=1, kind="stable")[:, :count].astype(np.int64)
    return drawn
