"""Times that can be compared: everyone once in every repetition, each time in another order.

    interleaved({"headloom": Timed(ours), "flex": Timed(theirs)}, repeats=5)

Whatever else the machine does meets them alike. What takes less than a moment is run several
times between two looks at the clock, and once before the first, as whoever ran before leaves
caches and memory as he needs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from random import Random

ENOUGH = 0.2  # seconds between two looks at the clock
_MOST = 200


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed, how many runs make one sample, and what waits until they are done."""

    run: Callable[[], object]
    calls: int = 1
    wait: Callable[[], None] = lambda: None


def calls_for(seconds: float) -> int:
    """Return how many runs of so many seconds make a sample long enough."""
    return max(1, min(_MOST, ceil(ENOUGH / max(seconds, 1e-9))))


def interleaved(
    timed: Mapping[str, Timed], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of one run of each, `repeats` samples."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    draw = Random(0)
    for _ in range(repeats):
        for name in draw.sample(list(timed), len(timed)):
            found[name].append(sample(timed[name], clock))
    return {name: tuple(each) for name, each in found.items()}


def sample(timed: Timed, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one run, from one look at the clock to the next."""
    if timed.calls > 1:
        timed.run()
    timed.wait()
    begun = clock()
    for _ in range(timed.calls):
        timed.run()
    timed.wait()
    return (clock() - begun) / timed.calls


def waiting(device: str) -> Callable[[], None]:
    """Return what waits for the device."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.synchronize
    return lambda: None


@cache
def ceiling(dtype: str, device: str, size: int = 0) -> float:
    """Return the operations a second of a product of square matrices, the best of some.

    It is measured once for a dtype and device, with the threads that are set.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 2048)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = Timed(lambda: a @ b, 1, waiting(device))
    sample(product)  # warms up
    return 2 * size**3 / min(sample(product) for _ in range(8 if on_gpu else 4))
