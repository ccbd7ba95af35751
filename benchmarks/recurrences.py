"""Recurrences in chunks of tokens on the CPU, beside their token-by-token text and softmax.

    python benchmarks/recurrences.py                   # a table, some minutes on a busy core
    python benchmarks/recurrences.py --tokens 1024 4096 --repeats 3 --json
    python benchmarks/recurrences.py --layers "scalar decay" "gated delta" --tokens 1024 65536 \\
        --threads 2 --backward

Four heads of 64, width 256, batch 1, float32. A layer is the whole block, its
projections included; `sdpa` is the block with causal softmax attention of the same sizes, which
ends in scaled_dot_product_attention. Every repetition times each row once, in turn; reported are
medians, in microseconds a token, and their ratios. Token by token is measured at the first length
alone, as its time a token does not change.

Predicted, before the first run: in chunks, time a token stays as it is from 1k to 16k tokens;
a hundred times faster than token by token at scalar decay, fifty times for the delta rule;
softmax is faster up to 2k tokens, slower from 8k on.

In levels (`by lam`, 15 of them) time a token grows with the logarithm of the sequence.

Found: the crossing with softmax near 1k (scalar decay) to 4k (the delta rule). From 1k to 64k
tokens, time a token grows by at most 11 % forward; with backward by nothing (scalar decay), 17 %
(delta) and 35 % (rows), which is the operating system giving and taking pages: where glibc keeps
its memory (MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184) it does not grow
at all. The gain over token by token was predicted far too high: forward it is 2 to 9 times,
forward and backward 13 to 27 times; the projections are a good part of what is left.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler.lowerings import choose

MIXERS = """
mix decayed {
  let alpha = x | linear(heads) | sigmoid
  state S[head_dim, value_dim] = 0
  S <- alpha * S + outer(k, v)
  o <- q @ S
}
mix rows {
  let alpha = x | linear(heads * head_dim) | sigmoid | split
  state S[head_dim, value_dim] = 0
  S <- alpha * S + outer(k, v)
  o <- q @ S
}
mix levels {
  let alpha = x | linear(heads) | sigmoid
  let lam = x | linear(heads * 15) | softplus | split
  state S[head_dim, value_dim] = 0 by lam
  S <- alpha * S + outer(k, v)
  o <- q @ S
}
mix delta_levels {
  let alpha = x | linear(heads) | sigmoid
  let beta = x | linear(heads) | sigmoid
  let lam = x | linear(heads * 15) | softplus | split
  state S[head_dim, value_dim] = 0 by lam
  S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)
  o <- q @ S
}
"""
BLOCK = "block b {{ width = 256; heads = 4; mask = causal; k = x | linear | split | l2_norm; {} }}"
MIX = {
    "plain sums": "mix = linear",
    "scalar decay": "mix = decayed",
    "decay of rows": "mix = rows",
    "gated delta": "mix = gated_delta",
    "scalar decay, levels": "mix = levels",
    "gated delta, levels": "mix = delta_levels",
    "sdpa": "position = none",
}


def layer(name: str, *, chunked: bool = True) -> nn.Module:
    """Return a block; where it is not to run in chunks, by the text it had without them."""
    arch = hl.load(MIXERS + BLOCK.format(MIX[name]), format="loom")
    if chunked:
        return hl.compile(arch, "b", backend="torch", seed=0)
    found = choose.of_node
    choose.of_node = lambda *_: "asked for token by token"
    try:
        return hl.compile(arch, "b", backend="torch", seed=0)
    finally:
        choose.of_node = found


def seconds(module: nn.Module, x: Tensor, backward: bool) -> float:
    begun = time.perf_counter()
    if backward:
        module(x).square().mean().backward()
    else:
        with torch.no_grad():
            module(x)
    return time.perf_counter() - begun


def measured(
    names: list[str], lengths: list[int], repeats: int, backward: bool
) -> list[dict[str, object]]:
    layers = {name: layer(name) for name in names}
    slow = {}
    if "sdpa" in names:
        slow = {f"{name}, by token": layer(name, chunked=False) for name in names if name != "sdpa"}
    for name, module in slow.items():
        x = torch.randn(1, 100, 256)
        torch.testing.assert_close(
            module(x), layers[name.removesuffix(", by token")](x), rtol=1e-3, atol=1e-4
        )
    rows: list[dict[str, object]] = []
    for n in lengths:
        x = torch.randn(1, n, 256)
        now = {**layers, **(slow if n == lengths[0] else {})}
        times: dict[str, list[float]] = {name: [] for name in now}
        for at in range(repeats + 1):
            for name, module in now.items():
                taken = seconds(module, x, backward)
                times[name] += [taken] if at else []
        micro = {name: 1e6 * median(each) / n for name, each in times.items()}
        for name, each in micro.items():
            ratio = micro.get("sdpa", float("nan")) / each
            rows.append(
                {
                    "tokens": n,
                    "layer": name,
                    "us_a_token": each,
                    "sdpa_over_it": ratio,
                    "backward": backward,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", nargs="+", choices=MIX, default=list(MIX), help="without sdpa, none by token"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = measured(given.layers, given.tokens, given.repeats, given.backward)
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{'':26}{'tokens':>8}{'µs a token':>12}{'sdpa / it':>11}")
    for row in rows:
        print("{layer:26}{tokens:8,}{us_a_token:12.1f}{sdpa_over_it:11.2f}".format(**row))


if __name__ == "__main__":
    main()
