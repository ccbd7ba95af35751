"""Gemma, and its like: norms whose weight is added to one, scaled embeddings."""

from __future__ import annotations

from ..kind import Kind
from ..names import UNIT, UNIT_BEFORE, UNIT_BOTH
from .llama import ATTENTION, LLAMA, TYPES, by_type

EMBED = "x | scale({{hidden_size}} ** 0.5)"
CAPPED = "x | norm | linear(vocab){{capped()}}"
GEMMA = LLAMA.but(
    "Gemma; Gemma Team 2024: norms whose weight is added to one, a scaled embedding",
    fixed={"mlp_bias": False},
    needs={"use_bidirectional_attention": False},
    model={"norm": "unit_rms", "embed": EMBED},
    weights=UNIT + UNIT_BEFORE,
)
BLOCK = {
    **ATTENTION,
    "scale": "{{scale(of = query_pre_attn_scalar)}}",
    "score": "{{score(of = attn_logit_softcapping)}}",
}
UNIT_NORMED = dict.fromkeys("qk", "x | linear{{attention_bias? (bias = true)}} | split | unit_rms")
GEMMA2 = GEMMA.but(
    "Gemma 2; Gemma Team 2024: norms on both sides of each part, soft caps, a window in every "
    "other layer",
    names={"hidden_act": "hidden_activation"},
    mixers=TYPES,
    blocks=by_type(BLOCK),
    model={"layer": "sandwich", "head": CAPPED},
    weights=UNIT_BOTH,
)
GEMMAS: dict[str, Kind] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "vaultgemma": GEMMA2.but(
        "VaultGemma; Google 2025: as Gemma 2, with norms before the parts alone",
        model={"layer": "pre"},
        weights="""
model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.w
""",
    ),
    "gemma3_text": GEMMA2.but(
        "Gemma 3; Gemma Team 2025: queries and keys normed head by head; local layers turn faster",
        blocks=by_type(
            {**BLOCK, **UNIT_NORMED, "position": "{{rope(of = full_attention)}}"},
            position="{{rope(of = sliding_attention)}}",
        ),
    ),
}
