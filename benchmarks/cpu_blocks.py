"""Compiled blocks on the CPU, side by side with the attention layers of Transformers.

    python benchmarks/cpu_blocks.py                    # a table, some eight minutes on a busy core
    python benchmarks/cpu_blocks.py --flex             # and flex_attention compiled, forward
    python benchmarks/cpu_blocks.py --tokens 512 --repeats 3 --json

Width 512, eight query heads of 64 on two key/value heads, rotary positions, batch 1, float32,
threads as they are. Where other processes want the cores, set OMP_NUM_THREADS=1: with more
threads than free cores it is their waiting for one another that is measured.

All layers of a row hold the same weights, and their outputs are compared before any of them is
timed. Every repetition times each layer once, in turn, so that whatever else the machine does
meets them alike; what is reported is a layer's median and quartiles, and the ratio of its
median to ours (above 1: ours is faster). Their masks and angles are made outside the clock, as
their models make them once for all layers; ours are made inside it.

Predicted, before the first run on two cores:
- `full`: ours ends in the same scaled_dot_product_attention, so 0.9 to 1.1 against their sdpa;
  against eager 2 at 512 tokens, 4 to 6 at 4096.
- `window`: ours gives that function a dense mask on the CPU, as theirs does: 0.9 to 1.1 against
  sdpa, 2 to 3 against eager, and no gain from the window. Compiled flex_attention, which skips
  blocks, is 3 to 5 times faster than ours at 4096 tokens.
- `softcap`: ours computes every pair, as their eager layer does: 0.8 to 1.2 against it. (Their
  sdpa refuses a cap.) Compiled flex_attention is 2 to 4 times faster than ours.
- Forward and backward together cost three to four forwards for everything.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

import headloom as hl

WIDTH, HEADS, KV_HEADS, DIM, WINDOW, CAP = 512, 8, 2, 64, 256, 50
BLOCK = (
    f"block b {{{{ width = {WIDTH}; heads = {HEADS}; kv_heads = {KV_HEADS}; head_dim = {DIM};"
    " position = rope(theta = 10_000); {} }}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
FLEX = "flex, compiled"
FLEX_LIMIT = 60  # seconds that a compilation may take
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One block: Loom settings, and their layer of the same meaning."""

    settings: str
    config: type
    attention: type[nn.Module]
    rotary: type[nn.Module]
    mask: Callable[..., Any]
    more: dict[str, Any]
    index: int  # of their layer, which decides whether Gemma's is local
    implementations: tuple[str, ...]


CASES = {
    "full": Case(
        "mask = causal", LlamaConfig, LlamaAttention, LlamaRotaryEmbedding,
        create_causal_mask, {}, 0, ("eager", "sdpa"),
    ),
    "window": Case(
        f"mask = causal and window({WINDOW})", MistralConfig, MistralAttention,
        MistralRotaryEmbedding, create_sliding_window_causal_mask, {"sliding_window": WINDOW},
        0, ("eager", "sdpa"),
    ),
    "softcap": Case(
        f"mask = causal; score = softcap({CAP})", Gemma2Config, Gemma2Attention,
        Gemma2RotaryEmbedding, create_causal_mask,
        {"attn_logit_softcapping": float(CAP), "query_pre_attn_scalar": DIM},
        1, ("eager",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One layer at one length."""

    case: str
    tokens: int
    what: str  # "forward" or "forward+backward"
    layer: str
    lower: float  # quartiles and median, in milliseconds
    median: float
    upper: float
    ratio: float  # this layer's median over ours


def theirs(case: Case, implementation: str, weights: dict[str, Tensor], x: Tensor) -> Layer:
    """Return their layer with our weights, its mask and angles made."""
    config = case.config(**SHAPE, **case.more, attn_implementation=implementation)
    module = case.attention(config, case.index)
    module.load_state_dict(weights)
    angles = case.rotary(config)(x, torch.arange(x.shape[1])[None])
    mask = case.mask(config, x, attention_mask=None, past_key_values=None)
    return lambda x: module(x, position_embeddings=angles, attention_mask=mask)[0]


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not compiled after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flex(case: Case, weights: dict[str, Tensor], x: Tensor) -> Layer | None:
    """Return their layer over compiled flex_attention, or None with a note when it fails."""
    started = time.perf_counter()
    try:
        with limit(FLEX_LIMIT), torch.no_grad():
            layer = theirs(case, "flex_attention", weights, x)
            layer(x)
    except Exception as error:
        print(f"flex_attention left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    print(f"flex_attention compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return layer


def forward(layer: Layer, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: Layer, x: Tensor) -> None:
    """Differentiate by the input and by every parameter."""
    layer(x.detach().requires_grad_()).sum().backward()


def layers_of(case: Case, x: Tensor, with_flex: bool) -> dict[str, Layer]:
    """Return the layers of a row, ours first, which agree."""
    ours = hl.compile(hl.load(BLOCK.format(case.settings), format="loom"), "b", seed=0)
    weights = ours.state_dict()
    layers: dict[str, Layer] = {"headloom": ours}
    for each in case.implementations:
        layers[each] = theirs(case, each, weights, x)
    compiled = flex(case, weights, x) if with_flex else None
    if compiled is not None:
        layers[FLEX] = compiled
    with torch.no_grad():
        expected = ours(x)
        for layer in layers.values():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    return layers


def measure(
    layers: dict[str, Layer], run: Callable[[Layer, Tensor], None], x: Tensor, repeats: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each layer, one after another in every repetition."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        run(layer, x)  # warm-up
    gc.collect()
    for _ in range(repeats):
        for name, layer in layers.items():
            started = time.perf_counter()
            run(layer, x)
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def rows_of(name: str, tokens: int, repeats: int, with_flex: bool, backward: bool) -> Iterator[Row]:
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    layers = layers_of(CASES[name], x, with_flex)
    runs = {"forward": forward, "forward+backward": forward_backward}
    for what, run in list(runs.items())[: 2 if backward else 1]:
        if run is forward_backward:  # flex_attention has no backward on a CPU
            layers.pop(FLEX, None)
        times = measure(layers, run, x, repeats)
        ours = statistics.median(times["headloom"])
        for each, values in times.items():
            lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
            yield Row(name, tokens, what, each, lower, median, upper, median / ours)


def table(rows: list[Row], paths: dict[str, str]) -> Table:
    out = Table(title="milliseconds: median, quartiles, and the median over ours")
    for column in ("block (our path)", "tokens", "what", "layer"):
        out.add_column(column, no_wrap=True)
    for column in ("median", "quartiles", "over ours"):
        out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        first = row.layer == "headloom"
        name = f"{row.case} ({paths[row.case]})"
        head = (name, str(row.tokens), row.what) if first else [""] * 3
        ratio = "" if first else f"{row.ratio:.2f}"
        out.add_row(*head, row.layer, f"{row.median:.1f}", f"{row.lower:.1f}–{row.upper:.1f}",
                    ratio)  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="compile flex_attention too")
    parser.add_argument("--forward", action="store_true", help="leave the backward out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()

    paths = {
        name: hl.explain(hl.load(BLOCK.format(CASES[name].settings), format="loom"))
        .lowerings[0]
        .path
        for name in given.case
    }
    rows: list[Row] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(given.case) * len(given.tokens))
        for name in given.case:
            for tokens in given.tokens:
                rows += rows_of(name, tokens, given.repeats, given.flex, not given.forward)
                progress.advance(task)

    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "repeats": given.repeats,
    }
    if given.json:
        print(json.dumps({**machine, "paths": paths, "rows": [asdict(row) for row in rows]}))
        return
    Console(width=None if sys.stdout.isatty() else 100).print(table(rows, paths))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))


if __name__ == "__main__":
    main()
