"""Experts on the CPU beside the dense feed-forward that does the same work for each token.

    python benchmarks/experts.py                     # a table, a minute
    python benchmarks/experts.py --experts 64 --top 8 --hidden 256 --json
    python benchmarks/experts.py --threads 1 --processor        # on a busy machine

Width 512, 2048 tokens, float32, two threads: `moe(8, 2)` with experts of 1024 hidden features, and
`swiglu` with 2048, alone, forward and with the backward pass. Every repetition times both once, in
turn; reported are medians and their ratio.

Asked: at most 1.3 times the dense one. Found in one thread by its processor's time, as others used
the machine: 1.07 forward, 1.12 both ways; 64 small experts of which 8 run take 1.67 and 1.74, as
products of 256 rows by 256 features are slower ones. With two threads on a machine that others use,
each of the many products waits for both, and the ratio says little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import headloom as hl

TEXT = """
block a {{ heads = 8; mask = causal }}
ffn few : moe({experts}, {top}, expert = swiglu(hidden = {hidden})) {{}}
model sparse {{ width = {width}; layers = [pre(none, few)] }}
model dense  {{ width = {width}; layers = [pre(none, swiglu(hidden = {top} * {hidden}))] }}
"""


def feed_forward(name: str, args: argparse.Namespace) -> nn.Module:
    """Return the feed-forward of the one layer of a model."""
    text = TEXT.format(**vars(args))
    found: nn.Module = hl.compile(hl.load(text, format="loom"), name, seed=0).layers[0].ffn
    return found.eval()


def forward(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def both_ways(module: nn.Module, x: Tensor) -> None:
    y = module(x)
    y.backward(torch.ones_like(y))
    for each in (x, *module.parameters()):
        each.grad = None


def timed(
    run: Callable[[nn.Module, Tensor], None],
    module: nn.Module,
    x: Tensor,
    clock: Callable[[], float],
) -> float:
    start = clock()
    run(module, x)
    return clock() - start


def measure(args: argparse.Namespace) -> list[dict[str, float | str]]:
    """Return the medians of both, in milliseconds, and their ratio."""
    modules = {name: feed_forward(name, args) for name in ("dense", "sparse")}
    x = torch.randn(1, args.tokens, args.width, requires_grad=True)
    clock = time.process_time if args.processor else time.perf_counter
    rows: list[dict[str, float | str]] = []
    for run in (forward, both_ways):
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(args.repeats + 2):
            for name, module in modules.items():
                times[name].append(timed(run, module, x, clock))
        medians = {name: 1e3 * statistics.median(each[2:]) for name, each in times.items()}
        ratio = medians["sparse"] / medians["dense"]
        rows.append({"pass": run.__name__, **medians, "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"experts": 8, "top": 2, "hidden": 1024, "width": 512, "tokens": 2048,
                        "repeats": 9, "threads": 2}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processor", action="store_true", help="time of the processor alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['pass']:10}  dense {row['dense']:7.1f} ms  sparse {row['sparse']:7.1f} ms  "
              f"{row['ratio']:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
