"""Associative recall: a recurrence beside a window, and linear attention alone.

    python benchmarks/mqar.py                                # a table, some minutes
    python benchmarks/mqar.py --models hybrid --rates 3e-3 --json

`mqar.loom` has three models of two layers, width 64, one head and no feed-forward network: gated
delta rule and window attention, linear attention as published, and linear attention with the
short convolutions that the first one has. Each is trained with the same steps, batches and
learning rates, of which the best counts; accuracy is that of 1,024 examples held out.

Predicted, before the first run: the hybrid recalls all pairs after some hundred steps, window
first or last; linear attention, with or without convolutions, stays below 0.9.

Found, eight pairs in 64 tokens, 800 steps: the hybrid 1.000 for each of three seeds at rate 3e-3,
after about 40 seconds of one core; linear attention 0.166, 0.165 and 0.149 at 1e-3, 3e-3 and 1e-2.
It knows which values were there and not whose they are: its loss ends at the logarithm of eight.
The order of the hybrid's layers matters: window first, it was still at 0.15 after as many steps.
With convolutions linear attention reached 0.88 at 3e-3, so that most of what the published form
lacks here is a look at the token before. With 256 words and sixteen pairs, 700 steps were too few
for the hybrid.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

import headloom as hl
from headloom.search.tasks.mqar import mqar
from headloom.search.trainer import train
from headloom.search.training import Training

MODELS = {
    "hybrid": "gated delta rule, window of 8",
    "linear_": "linear attention",
    "short_linear": "linear attention, convolutions",
}


def model(name: str, vocab: int, length: int, seed: int = 0) -> nn.Module:
    text = Path(__file__).with_name("mqar.loom").read_text(encoding="utf-8")
    text += f"model trained : {name}({vocab}, {length}) {{ }}\n"
    return hl.compile(hl.load(text, format="loom"), "trained", backend="torch", seed=seed)


def recall(name: str, rate: float, given: argparse.Namespace) -> dict[str, object]:
    """Train one model and measure it."""
    network = model(name, given.vocab, given.length, given.seed)
    task = mqar(given.vocab, given.pairs, given.length, seed=given.seed)
    training = Training(lr=rate, steps=given.steps, batch=given.batch, warmup=given.steps // 20)
    begun = time.perf_counter()
    found = train(network, task, training)
    return {
        "model": name,
        "parameters": sum(each.numel() for each in network.parameters()),
        "rate": rate,
        "seconds": time.perf_counter() - begun,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [recall(name, rate, given) for name in given.models for rate in given.rates]
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{'':32}{'parameters':>11}{'rate':>9}{'accuracy':>10}{'seconds':>9}")
    for row in rows:
        said = {**row, "model": MODELS[str(row["model"])]}
        print("{model:32}{parameters:11,}{rate:9.0e}{accuracy:10.3f}{seconds:9.0f}".format(**said))


if __name__ == "__main__":
    main()
