"""Llama, and those that change one thing of it."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import AFTER, BEFORE, DECODER, FUSED, ONE_NORM, UNIT

ATTENTION: Settings = {
    "heads": "{{num_attention_heads}}",
    "kv_heads": "{{kv_heads()}}",
    "head_dim": "{{head_dim()}}",
    "q": "x | linear{{attention_bias? (bias = true)}} | split",
    "k": "x | linear{{attention_bias? (bias = true)}} | split",
    "v": "x | linear{{attention_bias? (bias = true)}} | split",
    "position": "{{rope()}}",
    "mask": "causal",
    "out": "o | merge | linear{{attention_bias? (bias = true)}}",
}
MODEL: Settings = {
    "vocab": "{{vocab_size}}",
    "width": "{{hidden_size}}",
    "norm": "{{rms()}}",
    "tie": "{{tie_word_embeddings}}",
}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
PER_HEAD: Settings = {
    "q": "x | linear{{attention_bias? (bias = true)}} | split | {{rms()}}",
    "k": "x | linear{{attention_bias? (bias = true)}} | split | {{rms()}}",
}
WHOLE: Settings = {
    "q": "x | linear{{attention_bias? (bias = true)}} | {{rms()}} | split",
    "k": "x | linear{{attention_bias? (bias = true)}} | {{rms()}} | split",
}
PLAIN_OUT: Settings = {"out": "o | merge | linear"}
TYPES = "listed(of = layer_types, usual = full_attention)"


def by_type(block: Settings, **local: str) -> dict[str, Settings]:
    """Return blocks for layers that see all, and for those with a window."""
    windowed = {**block, "mask": "causal and window({{sliding_window}})", **local}
    return {"full_attention": block, "sliding_attention": windowed}


LLAMA = Kind(
    about="Llama; Touvron et al. 2023",
    blocks={"attention": ATTENTION},
    ffns={"dense": "{{gated(bias = mlp_bias)}}"},
    model=MODEL,
    weights=DECODER + BEFORE,
)
MISTRAL = LLAMA.but(
    "Mistral 7B, Jiang et al. 2023", fixed=NO_BIAS, block={"mask": "{{mask()}}"}
)
QWEN3 = LLAMA.but(
    "Qwen3, Yang et al. 2025",
    fixed={"mlp_bias": False},
    mixers=TYPES,
    blocks=by_type({**ATTENTION, **PER_HEAD}),
)
LLAMA_LIKE: dict[str, Kind] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": LLAMA.but(
        "Qwen2, Yang et al. 2024",
        fixed={"attention_bias": True, "mlp_bias": False},
        mixers=TYPES,
        blocks=by_type({**ATTENTION, **PLAIN_OUT}),
    ),
    "qwen3": QWEN3,
}
