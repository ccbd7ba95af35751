"""Recurrences in chunks of tokens on the CPU, without a layer around them, beside their peers.

    python benchmarks/chunks.py                        # a table, some minutes
    python benchmarks/chunks.py --tokens 8192 --repeats 15 --json
    python benchmarks/chunks.py --tokens 8192 --threads 1 --processor    # on a busy machine

Eight heads of 64, batch 1, float32, forward, two threads. The peers are causal
scaled_dot_product_attention, and for the gated delta rule the chunked PyTorch path that
`transformers` has for Qwen3-Next, on the same tensors. Every repetition times each row once, in
turn; reported are medians and their ratios.

Predicted, before the first run: with scalar decay six times as fast as softmax at 8k tokens and
24 times at 32k; the gated delta rule three times as fast as the other text, as it solves its
triangular systems at once and not row by row.

Found: 8.4 times and 29 times, 11 % more a token at 32k than at 1k. The gated delta rule 2.0 to
2.2 times, not three: 40 % of its time goes into 256 steps of five small products, for each of
which two threads have to meet, and a quarter into copies and masks. In one thread it is 2.5 times.

The whole block of the standing table (8,192 tokens, three times as fast as Qwen3-Next's text was
asked, 1.4 times measured), in one thread by its processor's time, as others use the machine.
Predicted: with the output made of all states of a section in one product, and with numbers that
scale vectors applied chunk by chunk, the recurrence falls from 78 to 45 ms, the block from 293 to
223, twice as fast as theirs. Found: 256 ms against 453, 1.8 times (1.4 before); forward and
backward 844 ms against 862 before, which was 2.6 times already. Three quarters of what is left
are products: 160 ms of projections, and 36 to 41 of the recurrence ("its products"), at
107 GFLOP/s, all that MKL's AVX2 kernel of this processor has. Were all else free, the block would
be 2.2 times as fast as theirs; three times is out of reach while a projection is F.linear. oneDNN's
product (AVX-512) takes 18 ms for a projection and not 40; with it the floor is 110 ms, 4 times.

Chunks of 16, 32 and 64 tokens: gated delta 76, 75 and 106 ms, by a number 51, 41 and 48, forward
and backward 312, 299 and 374. A solve for the right sides took longer than the inverse and two
products (532 µs and 346), and states written in place save a tenth of the recurrence, but not
under vmap, so they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from headloom.compiler.pieces.chunks import chunked_linear

sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # or transformers takes its kernels
from transformers.models.qwen3_next.modeling_qwen3_next import (  # noqa: E402
    torch_chunk_gated_delta_rule,
)

HEADS, DIM, CHUNK = 8, 64, 32
PEER = {"gated delta": "Qwen3-Next's text"}


def rows(n: int) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed for n tokens, by name."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, DIM) for _ in range(3))
    k = F.normalize(k, dim=-1)
    log_decay, beta = -F.softplus(torch.randn(1, HEADS, n)), torch.rand(1, HEADS, n)
    decay, by_row = log_decay.exp()[..., None], torch.rand(1, HEADS, n, DIM)
    state = torch.zeros(1, HEADS, DIM, DIM)
    scales = {"v_scale": beta[..., None], "w_scale": -beta[..., None] * decay}
    x, weight = torch.randn(n, HEADS * DIM), torch.randn(HEADS * DIM, HEADS * DIM)
    theirs = [each.transpose(1, 2) for each in (q, k, v, log_decay, beta)]
    return {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "plain sums": lambda: chunked_linear(q, k, v, None, state)[0],
        "scalar decay": lambda: chunked_linear(q, k, v, decay, state)[0],
        "decay of rows": lambda: chunked_linear(q, k, v, by_row, state)[0],
        "gated delta": lambda: chunked_linear(q, k, v, decay, state, **scales)[0],
        "its products": products(n),
        "delta, rows": lambda: chunked_linear(q, k, v, by_row, state, **scales)[0],
        "four projections": lambda: torch.cat([F.linear(x, weight) for _ in range(4)]),
        "Qwen3-Next's text": lambda: torch_chunk_gated_delta_rule(
            *theirs, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False
        )[0],
    }


def products(n: int) -> Callable[[], Tensor]:
    """Return the products that the gated delta rule needs of n tokens, and nothing around them.

    Eight chunks together, as long as they stay in the cache: queries and corrections with keys,
    three products of a chunk's map, what is read. And one by one, what is corrected and written.
    """
    together = 8 * HEADS
    vectors, maps = torch.randn(together, CHUNK, DIM), torch.randn(together, CHUNK, CHUNK)
    states = torch.randn(together, DIM, DIM)

    def run() -> Tensor:
        for _ in range(n // CHUNK // 8):
            for _ in range(2):
                torch.bmm(vectors, vectors.mT)
            for _ in range(3):
                torch.bmm(maps, vectors)
            read = torch.bmm(vectors, states)
            for _ in range(8):
                torch.bmm(vectors[:HEADS], states[:HEADS])
                torch.bmm(vectors[:HEADS].mT, vectors[:HEADS])
        return read

    return run


def measured(n: int, repeats: int, clock: Callable[[], float]) -> list[dict[str, object]]:
    timed = rows(n)
    ours, theirs = timed["gated delta"](), timed["Qwen3-Next's text"]().transpose(1, 2)
    torch.testing.assert_close(ours * DIM**-0.5, theirs, rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for at in range(repeats + 1):
        for name, each in timed.items():
            begun = clock()
            each()
            times[name] += [clock() - begun] if at else []
    middle = {name: median(each) for name, each in times.items()}
    return [
        {
            "tokens": n,
            "row": name,
            "ms": 1e3 * seconds,
            "us_a_token": 1e6 * seconds / n,
            "sdpa_over_it": middle["sdpa"] / seconds,
            "peer_over_it": middle[PEER.get(name, "sdpa")] / seconds,
        }
        for name, seconds in middle.items()
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="its time, not that of a clock")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    clock = time.process_time if given.processor else time.perf_counter
    torch.set_num_threads(given.threads)
    found = [row for n in given.tokens for row in measured(n, given.repeats, clock)]
    if given.json:
        print(json.dumps(found))
        return
    print(f"{'':20}{'tokens':>8}{'ms':>10}{'µs a token':>12}{'sdpa / it':>11}{'peer / it':>11}")
    for row in found:
        print(
            "{row:20}{tokens:8,}{ms:10.1f}{us_a_token:12.2f}{sdpa_over_it:11.2f}"
            "{peer_over_it:11.2f}".format(**row)
        )


if __name__ == "__main__":
    main()
