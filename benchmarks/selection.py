"""Chosen groups of keys beside plain causal attention, on the CPU, without a layer around.

    python benchmarks/selection.py                          # 16,384 tokens, a minute
    python benchmarks/selection.py --tokens 4096 16384 65536 --repeats 3
    python benchmarks/selection.py --threads 1 --processor  # on a busy machine
    python benchmarks/selection.py --step                   # one more token, with a cache
    python benchmarks/selection.py --memory                 # peak of a process of its own

Eight heads of 64, batch 1, float32; groups of 64 keys, of which each query reads the 16 best by
their mean key, its own and the one before. What is timed is the attention of the block, choice and
all, in turn with `scaled_dot_product_attention`; reported are medians of the ratios. Queries and
keys are drawn, so no two choices are alike, which is the worst case.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import headloom as hl

CHOSEN = """
block chosen {
  heads = 8; head_dim = 64; mask = causal
  let kb = k | pool(mean, size = 64)
  select = top(16, dot(q[h, i], kb[h, j // 64]), size = 64, always = blocks(64) or window(64))
}
block plain { heads = 8; head_dim = 64; mask = causal }
"""


def block(name: str) -> Any:
    """Return a block of the text above."""
    return hl.compile(hl.load(CHOSEN, format="loom"), name, width=512, backend="torch", seed=0)


def attention(module: Any, operands: list[Tensor]) -> Tensor:
    """Return what the block's attention gives for q, k and v, the pooling of keys included."""
    q, k, v = operands
    pooled = k.unflatten(2, (-1, 64)).mean(3)
    done: Tensor = module.attend_gathered(q, k, v, pooled)
    return done


def plain(operands: list[Tensor]) -> Tensor:
    """Return plain causal attention."""
    return F.scaled_dot_product_attention(*operands, is_causal=True)


def measured(
    clock: Callable[[], float],
    run: Callable[[list[Tensor]], Tensor],
    given: list[Tensor],
    both: bool,
) -> float:
    """Return the seconds of one run, forward or forward and backward."""
    leaves = [x.clone().requires_grad_(both) for x in given]
    begun = clock()
    done = run(leaves)
    if both:
        done.sum().backward()
    return clock() - begun


def compare(tokens: int, repeats: int, clock: Callable[[], float]) -> None:
    """Print how many times as fast chosen groups are, forward and both ways."""
    module = block("chosen")
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 8, tokens, 64, generator=generator) for _ in range(3)]
    for both in (False, True):
        ratios, ours = [], []
        for _ in range(repeats):
            mine = measured(clock, lambda x: attention(module, x), given, both)
            theirs = measured(clock, plain, given, both)
            ratios.append(theirs / mine)
            ours.append(mine)
        way = "forward and backward" if both else "forward"
        print(f"{tokens:>7,} tokens, {way:<20} {median(ratios):.2f} × as fast as plain, "
              f"{1000 * median(ours):,.0f} ms")  # fmt: skip


def step(tokens: int, repeats: int, clock: Callable[[], float]) -> None:
    """Print what one more token takes with a cache, beside a block without a selection."""
    seconds: dict[str, list[float]] = {"chosen": [], "plain": []}
    modules = {name: block(name).eval() for name in seconds}
    x = torch.randn(1, tokens + repeats, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        caches = {}
        for name, module in modules.items():
            caches[name] = module.init_cache(1, tokens + repeats)
            for at in range(0, tokens, 4096):
                module(x[:, at : min(at + 4096, tokens)], cache=caches[name])
        for at in range(tokens, tokens + repeats):
            for name, module in modules.items():
                begun = clock()
                module(x[:, at : at + 1], cache=caches[name])
                seconds[name].append(clock() - begun)
    ratio = median(b / a for a, b in zip(seconds["chosen"], seconds["plain"], strict=True))
    chosen = 18 * 64 * 2 * 64 * 8 * 4
    pooled = tokens // 64 * 64 * 8 * 4
    print(f"{tokens:>7,} tokens, one more: {ratio:.2f} × as fast as plain; of keys and values it "
          f"reads {(chosen + pooled) / chosen:.2f} × what its groups hold")  # fmt: skip


def memory(tokens: int, name: str) -> None:
    """Print the peak of this process in MiB, after a forward and a backward pass."""
    module = block(name)
    x = torch.randn(1, tokens, 512, requires_grad=True)
    module(x).sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor", action="store_true", help="take the processor's time")
    parser.add_argument("--step", action="store_true", help="measure one token with a cache")
    parser.add_argument("--memory", action="store_true", help="measure the peak of a process")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor else time.perf_counter
    for tokens in asked.tokens:
        if asked.alone:
            memory(tokens, asked.alone)
        elif asked.memory:
            peaks = [_peak(count, "chosen") for count in (64, tokens)]
            print(f"{tokens:>7,} tokens: {peaks[1] - peaks[0]:,} MiB above those of 64")
        elif asked.step:
            step(tokens, asked.repeats, clock)
        else:
            compare(tokens, asked.repeats, clock)


def _peak(tokens: int, name: str) -> int:
    command = [sys.executable, __file__, "--tokens", str(tokens), "--alone", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
