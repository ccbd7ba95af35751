"""Sixteen documents packed into a row, beside one document as long: whole layers on the CPU.

    python benchmarks/packed.py                        # a table, some minutes
    python benchmarks/packed.py --threads 1 --repeats 7 --json

Width 512, eight heads of 64, 4,096 tokens, batch 1, float32, forward and backward. Every
repetition times a row packed and whole, in turn; reported are medians and their ratio.

Predicted: at most 1.1 for every recurrence. A decay that is there already is made zero where a
document begins, which costs one pass over it; a recurrence without any gets one of zeros and
ones, and with it the chunked form that fades.

Found on two cores (two threads, medians of nine): no decay 1.06, a number a token 1.03, a number
a row 1.07, delta 1.05, gated delta 1.05 with the backward pass (1.06 to 1.10 forward). Delta was
1.19 while a packed short convolution looped over its taps; it makes once more only the tokens
that read across a border.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

import headloom as hl

DEFINED = """
mix fading { let a = x | linear(heads) | sigmoid; state S[head_dim, value_dim] = 0
  S <- a * S + outer(k, v); o <- q @ S }
mix by_rows { let a = x | linear | split | sigmoid; state S[head_dim, value_dim] = 0
  S <- a * S + outer(k, v); o <- q @ S }
mix delta { let b = x | linear(heads) | sigmoid; state S[head_dim, value_dim] = 0
  S <- S + outer(b * k, v - k @ S); o <- q @ S }
"""
CONVS = "; ".join(f"{name} = x | linear | conv(4) | split | l2_norm" for name in "qk")
ROWS = {
    "no decay": "mix = linear; mask = causal",
    "a number a token": "mix = fading; mask = causal",
    "a number a row": "mix = by_rows; mask = causal",
    "delta": f"mix = delta; mask = causal; {CONVS}",
    "gated delta": f"mix = gated_delta; mask = causal; {CONVS}",
}


def timed(body: str, tokens: int, documents: int, repeats: int) -> dict[str, float]:
    """Return the seconds of both, forward and with backward, and the ratios of packed to whole."""
    block = hl.compile(
        hl.load(f"{DEFINED}block a {{ width = 512; heads = 8; {body} }}", format="loom"),
        "a",
        backend="torch",
        seed=0,
    )
    x = (0.1 * torch.randn(1, tokens, 512)).requires_grad_()
    packed = {"segments": torch.arange(tokens)[None] * documents // tokens}
    found: dict[str, list[float]] = {}
    for at in range(repeats + 1):
        for name, given in (("whole", {}), ("packed", packed)):
            start = time.perf_counter()
            y = block(x, **given)
            forward = time.perf_counter() - start
            y.sum().backward()
            both = time.perf_counter() - start
            if at:  # the first warms up
                found.setdefault(f"{name}, forward", []).append(forward)
                found.setdefault(f"{name}, both", []).append(both)
    medians = {name: median(times) for name, times in found.items()}
    return medians | {
        f"ratio, {name}": medians[f"packed, {name}"] / medians[f"whole, {name}"]
        for name in ("forward", "both")
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name, body in ROWS.items():
        found[name] = timed(body, args.tokens, args.documents, args.repeats)
        if not args.json:
            forward, both = (found[name][f"ratio, {each}"] for each in ("forward", "both"))
            print(f"{name:20} forward {forward:.2f} x, with backward {both:.2f} x", flush=True)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
