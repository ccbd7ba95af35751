"""Models of Transformers beside what `hl.from_hf` makes of them, on the CPU.

    python benchmarks/known.py --threads 1 --processor           # all kinds, on a busy machine
    python benchmarks/known.py --kinds llama gpt2 --repeats 15
    python benchmarks/known.py --runs 3 --json                   # and how far apart runs are

Random weights, float32, width 512, four layers, eight heads, feed-forwards of 1536 hidden features,
a vocabulary of 2000; `attn_implementation="sdpa"` (`eager` where their class has no `sdpa`, which
is printed), all else as their class has it. Before anything is timed, logits must agree. Timed are,
of one sequence,

- prefill: all tokens at once without gradients, into a new cache of each one's own, with the
  logits of all tokens;
- a step of training: forward without a cache, the shifted loss by the same function, backward.

Every repetition times both once, in turn, and the first two are left out; reported are medians and
their ratio, ours over theirs. Asked: at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import headloom as hl

LOCAL, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWS = {"sliding_window": 256, "layer_types": [LOCAL, LOCAL, LOCAL, FULL]}
EXPERTS = {"intermediate_size": 768, "num_local_experts": 8, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 384, "num_experts_per_tok": 4}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
DELTA = {
    "layer_types": ["linear_attention"] * 3 + [FULL],
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
STATES = {"state_size": 64, "num_heads": 16, "head_dim": 64, "expand": 2, "n_groups": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, **WINDOWS},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, **WINDOWS},
    "gpt2": {"n_inner": 1536},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 1536},
    "phi3": {"original_max_position_embeddings": 4096},
    "olmo2": {},
    "cohere2": {"head_dim": 64, **WINDOWS},
    "gpt_neox": {},
    "mixtral": EXPERTS,
    "qwen3_moe": {**SMALL, "head_dim": 64, "num_experts": 16},
    "gpt_oss": {**EXPERTS, "head_dim": 64, **WINDOWS},
    "deepseek_v3": {**SMALL, **LATENT, "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
                    "first_k_dense_replace": 1},
    "qwen3_next": {**SMALL, **DELTA, "head_dim": 64, "num_experts": 16,
                   "shared_expert_intermediate_size": 384},
    "mamba2": STATES,
    "mamba": {"state_size": 16, "time_step_rank": 32, "expand": 2},
}  # fmt: skip
NEAR = 1e-3  # of the largest logit
Pair = dict[str, nn.Module]


def made(kind: str) -> Pair:
    """Return their model of a kind and ours with its weights."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
    )

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind]
    fields = {*config().to_dict(), *config.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    given = config(**{**sizes, **KINDS[kind]})
    attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[config]._supports_sdpa else "eager"
    theirs = AutoModelForCausalLM.from_config(given, attn_implementation=attention).eval()
    return {"theirs": theirs, "ours": hl.from_hf(theirs).compile().eval()}


def logits(model: nn.Module, tokens: Tensor, name: str) -> Tensor:
    """Return the logits of all tokens, without a cache."""
    found: Tensor = model(tokens, use_cache=False).logits if name == "theirs" else model(tokens)
    return found


def prefill(model: Any, tokens: Tensor, name: str) -> None:
    """Compute all tokens into a new cache."""
    with torch.no_grad():
        if name == "theirs":
            model(tokens, use_cache=True)
        else:
            model(tokens, cache=model.init_cache(1, tokens.shape[1]))


def training(model: nn.Module, tokens: Tensor, name: str) -> None:
    """Compute the shifted loss and its gradients."""
    found = logits(model, tokens, name)
    cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad()


def checked(pair: Pair, tokens: Tensor) -> float:
    """Return how far logits are apart, of the largest. Raises `ValueError` where it is far."""
    with torch.no_grad():
        theirs, ours = (logits(pair[name], tokens, name) for name in ("theirs", "ours"))
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not apart < NEAR:
        raise ValueError(f"logits differ by {apart:.1e} of the largest")
    return apart


def medians(
    run: Callable[[nn.Module, Tensor, str], None],
    pair: Pair,
    tokens: Tensor,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Return the medians of both in milliseconds, and the ratio, of one run."""
    clock = time.process_time if args.processor else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(args.repeats + 2):
        for name, model in pair.items():
            start = clock()
            run(model, tokens, name)
            times[name].append(clock() - start)
    found = {name: 1e3 * statistics.median(each[2:]) for name, each in times.items()}
    return {**found, "ratio": found["ours"] / found["theirs"]}


def measured(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each pass: medians of the runs, and the ratio of each run."""
    pair = made(kind)
    attention = pair["theirs"].config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, args.tokens), generator=generator)
    apart = checked(pair, tokens)
    rows: list[dict[str, Any]] = []
    for run in (prefill, training):
        runs = [medians(run, pair, tokens, args) for _ in range(args.runs)]
        middle = {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        ratios = [each["ratio"] for each in runs]
        about = {"kind": kind, "attention": attention, "pass": run.__name__, "apart": apart}
        rows.append({**about, **middle, "runs": ratios})
    return rows


def shown(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    attention = f"({row['attention']})"
    spread = " ".join(f"{each:.2f}" for each in sorted(row["runs"]))
    return (f"{row['kind']:12} {row['pass']:9} theirs {attention:7} {row['theirs']:7.1f} ms  "
            f"ours {row['ours']:7.1f} ms  {row['ratio']:.2f} times ({spread})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    for name, value in {"tokens": 1024, "repeats": 9, "runs": 1, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processor", action="store_true", help="time of the processor alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for kind in args.kinds:
        for row in measured(kind, args):
            print(json.dumps(row) if args.json else shown(row), flush=True)


if __name__ == "__main__":
    main()
