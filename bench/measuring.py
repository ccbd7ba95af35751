"""Times that can be compared: everyone in turn, in every repetition, the first one in turn too.

    interleaved({"headloom": Timed(ours), "flex": Timed(theirs)}, repeats=5)

Whatever else the machine does meets them alike. What takes less than some milliseconds is run
several times between two looks at the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil

ENOUGH = 0.02  # seconds between two looks at the clock
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
    """Return the seconds of one run of each, `repeats` samples; one more warms up."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for at in range(-1, repeats):
        turn = max(at, 0) % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            seconds = sample(timed[name], clock)
            if at >= 0:
                found[name].append(seconds)
    return {name: tuple(each) for name, each in found.items()}


def sample(timed: Timed, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one run, from one look at the clock to the next."""
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
    sample(product)
    return 2 * size**3 / min(sample(product) for _ in range(8 if on_gpu else 4))
