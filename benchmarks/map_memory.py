"""Peak memory of attention on the materialised path, forward and backward, as tokens double.

    python benchmarks/map_memory.py --tokens 2048 4096 8192

What the kernels cannot carry (here: an L1 similarity, head mixing, weights edited by their row)
is computed for some queries at a time, and again in the backward pass: memory should double
with the tokens, where the map itself would take four times as much. Each measurement is the
peak resident size of a process of its own, less that of the same process at 64 tokens. glibc is
told to give large blocks back (MALLOC_MMAP_THRESHOLD_): freed ones would count otherwise.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from itertools import pairwise

import torch

import headloom as hl

SPECS = {
    "l1": "similarity = l1",
    "mix_heads": "param w[heads, heads] = normal(1); score = mix_heads(s, w)",
    "row_edit": "weights = where(rank_keys(p) < 64, p, 0) / sum_keys(p)",
    "convolve": "param c[heads, 3, 5] = normal(1); score = convolve(s, c)",
}


def peak(name: str, tokens: int) -> int:
    """Run one forward and backward pass; return the process's peak resident bytes."""
    torch.set_num_threads(1)
    text = f"block b {{ width = 64; heads = 4; mask = causal; {SPECS[name]} }}"
    module = hl.compile(hl.load(text, format="loom"), "b", backend="torch")
    x = torch.randn(1, tokens, 64, requires_grad=True)
    module(x).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, tokens: int) -> int:
    args = [sys.executable, __file__, "--one", name, str(tokens)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(args, capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(peak(given.one[0], int(given.one[1])))
        return
    print(f"{'':12}" + "".join(f"{n:>12,}" for n in given.tokens) + "   MiB above 64 tokens")
    for name in SPECS:
        base = measured(name, 64)
        sizes = [(measured(name, n) - base) / 2**20 for n in given.tokens]
        ratios = " ".join(f"{b / a:.2f}" for a, b in pairwise(sizes))
        print(f"{name:12}" + "".join(f"{each:12.0f}" for each in sizes) + f"   ratios {ratios}")


if __name__ == "__main__":
    main()
