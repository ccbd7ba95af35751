"""Mechanisms along the tokens beside plain causal attention, on the CPU, without a layer around.

    python benchmarks/along.py                        # 4,096 tokens, a minute or two
    python benchmarks/along.py --tokens 1024 4096 --names path wall --repeats 9
    python benchmarks/along.py --threads 1 --processor    # on a busy machine
    python benchmarks/along.py --memory               # peak of a process of its own, as n doubles

Eight heads of 64, batch 1, float32. What is timed is the attention of a block of the zoo, on what
the block hands to it, forward and both ways, in turn with `scaled_dot_product_attention`;
reported are medians of the ratios.

Found on two cores of an EPYC that others use, in one thread by its processor's time, 4,096 tokens,
forward and both ways over plain: forgetting 1.10 and 1.12, path 2.7 and 2.8, wall 2.3 and 2.8,
selective 3.5 and 3.8, stick-breaking 3.2 and 2.7. In two threads, while they
were free: forgetting 1.11 and 1.13, path 2.7 and 3.1.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headloom as hl

WIDTH, HEADS = 512, 8
NAMES = ("forgetting", "path", "wall", "stick_breaking", "selective")
Run = Callable[[], Tensor]
Clock = Callable[[], float]


def text_of(name: str) -> str:
    """Return a block of the zoo of eight heads of 64."""
    text = re.sub(r"\bwidth( *)= 32", rf"width\1= {WIDTH}", hl.zoo(name).text)
    return re.sub(r"\bheads( *)= 4", rf"heads\1= {HEADS}", text)


def attended(name: str, tokens: int) -> tuple[Run, list[Tensor]]:
    """Return what an attention computes on what its block hands to it, and its leaves."""
    module: Any = hl.compile(hl.load(text_of(name), format="loom"), name, backend="torch", seed=0)
    found: dict[str, Any] = {}
    paths = ("attend_keyed", "attend_faded", "attend")
    path = next(each for each in paths if hasattr(module, each))
    method = getattr(module, path)

    def recorded(*given: Any) -> Any:
        found["given"] = [x.detach() if isinstance(x, Tensor) else x for x in given]
        return method(*given)

    setattr(module, path, recorded)
    with torch.no_grad():
        module(torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1)))
    given = found["given"]
    leaves = [x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2]
    leaves = [x for x in leaves if x.dtype == torch.float32]

    def run() -> Tensor:
        done = method(*given)
        return done[0] if isinstance(done, tuple) else done

    return run, leaves


def plain(tokens: int) -> tuple[Run, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, HEADS, tokens, 64, generator=generator) for _ in range(3)]
    return lambda: F.scaled_dot_product_attention(*given, is_causal=True), given


def seconds(run: Run, leaves: list[Tensor], both: bool, clock: Clock) -> float:
    """Return how long a forward pass takes, or one with the backward pass."""
    for each in leaves:
        each.requires_grad_(both).grad = None
    begun = clock()
    with torch.set_grad_enabled(both):
        made = run()
        if both:
            made.sum().backward()
    return clock() - begun


def table(tokens: int, names: list[str], repeats: int, clock: Clock) -> None:
    rows = {"plain": plain(tokens), **{name: attended(name, tokens) for name in names}}
    print(f"{tokens:,} tokens{'':10}{'ms':>10}{'/ plain':>9}{'both, ms':>11}{'/ plain':>9}")
    times = {(name, both): [] for name in rows for both in (False, True)}
    for at in range(repeats + 1):
        for (name, both), found in times.items():
            taken = seconds(*rows[name], both, clock)
            found += [taken] if at else []
    for name in rows:
        line = f"{name:22}"
        for both in (False, True):
            own = times[name, both]
            ratio = median(a / b for a, b in zip(own, times["plain", both], strict=True))
            line += f"{1e3 * median(own):{11 if both else 10}.1f}{ratio:9.2f}"
        print(line)


def peak(name: str, tokens: int) -> int:
    """Run one forward and backward pass of a block; return the peak resident bytes."""
    torch.set_num_threads(1)
    module: nn.Module = hl.compile(hl.load(text_of(name), format="loom"), name, backend="torch")
    module(torch.randn(1, tokens, WIDTH, requires_grad=True)).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(name: str, sizes: list[int]) -> None:
    """Print the peak of processes of their own, less that of 64 tokens."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed is given back
    found = []
    for tokens in (64, *sizes):
        args = [sys.executable, __file__, "--one", name, str(tokens)]
        done = subprocess.run(args, capture_output=True, text=True, check=True, env=env)
        found.append(int(done.stdout) / 2**20)
    above = [each - found[0] for each in found[1:]]
    ratios = " ".join(f"{b / a:.2f}" for a, b in pairwise(above))
    print(f"{name:22}" + "".join(f"{each:10.0f}" for each in above) + f" MiB, ratios {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="its time, not that of a clock")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(peak(given.one[0], int(given.one[1])))
        return
    if given.memory:
        for name in given.names:
            memory(name, [2048, 4096, 8192] if given.tokens == [4096] else given.tokens)
        return
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.processor else time.perf_counter
    for tokens in given.tokens:
        table(tokens, given.names, given.repeats, clock)


if __name__ == "__main__":
    main()
