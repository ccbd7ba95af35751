"""Gemma, and its like: norms whose weight is added to one, scaled embeddings."""

from __future__ import annotations

from ..kind import Kind
from ..names import AFTER, UNIT, UNIT_BEFORE, UNIT_BOTH
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
RMS_NORMED = dict.fromkeys("qk", "x | linear{{attention_bias? (bias = true)}} | split | {{rms()}}")
GEMMA4 = GEMMA2.but(
    "Gemma 4; Gemma Team 2026: layers that see all have heads of their own, and values that may "
    "be their keys",
    needs={
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    },
    blocks={
        "sliding_attention": {
            **ATTENTION,
            **RMS_NORMED,
            "scale": "1",
            "v": "x | linear{{attention_bias? (bias = true)}} | split | plain",
            "position": "{{rope(of = sliding_attention)}}",
            "mask": "causal and window({{sliding_window}})",
        },
        "full_attention": {
            **ATTENTION,
            **RMS_NORMED,
            "scale": "1",
            "kv_heads": "{{overridden(of = num_key_value_heads)}}",
            "head_dim": "{{overridden(of = head_dim)}}",
            "let kv": "{{attention_k_eq_v? x | linear(kv_heads * head_dim) | split(kv_heads)}}",
            "k": "{{attention_k_eq_v? kv}}{{attention_k_eq_v! x | linear | split}} | {{rms()}}",
            "v": "{{attention_k_eq_v? kv}}{{attention_k_eq_v! x | linear | split}} | plain",
            "position": "{{rope(of = full_attention)}}",
        },
    },
    model={"layer": "whole", "norm": "{{rms()}}"},
    defs={
        "whole": """
layer whole(attn, ffn) {
  param factor = 1  # it is not trained
  let y = x + (x | norm | attn | norm)
  out = detach(factor) * (y + (y | norm | ffn | norm))
}
"""
    },
    weights="""
model.layers.{i}.layer_scalar -> layers.{i}.factor
model.layers.{i}.self_attn.{p}_norm.weight -> layers.{i}.attn.{p}_norm.weight
model.layers.{i}.self_attn.k_proj.weight -> layers.{i}.attn.k_proj.weight
model.layers.{i}.self_attn.k_proj.weight -> layers.{i}.attn.kv_proj.weight
model.norm.weight -> norm.weight
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
"""
    + AFTER,
)
RECURRENT_GEMMA = GEMMA.but(
    "RecurrentGemma; Botev et al. 2024: a gated linear recurrence, local attention in some layers",
    names={"hidden_act": "hidden_activation"},
    fixed={"mlp_bias": True},
    mixers="cycled(of = block_types)",
    blocks={
        "recurrent": {
            "heads": "{{num_attention_heads}}",
            "head_dim": "{{lru_width}} / {{num_attention_heads}}",
            "param open_bias[heads, head_dim]": "0",
            "param fade_bias[heads, head_dim]": "0",
            "param rate[heads, head_dim]": "0",
            "let y": "x | linear({{lru_width}}, bias = true) | {{activation()}}",
            "let u": "x | linear({{lru_width}}, bias = true) | conv({{conv1d_width}}, bias = true) "
            "| split",
            "let open_": "sigmoid((u | head_linear(head_dim)) + open_bias)",
            "let fade": "-8 * sigmoid((u | head_linear(head_dim)) + fade_bias) * softplus(rate)",
            "q": "u",
            "k": "u",
            "v": "u * open_ * where(index < 1, 1, sqrt(1 - exp(2 * fade)))",
            "mix": "fading",
            "mask": "causal",
            "out": "o | merge | gate(y) | linear(bias = true)",
        },
        "attention": {
            **ATTENTION,
            "mask": "causal and window({{attention_window_size}})",
            "out": "o | merge | linear(bias = true)",
        },
    },
    ffns={"dense": "gated({{activation()}}, hidden = {{intermediate_size}} / 2, bias = true)"},
    model={
        "embed": "x | scale({{in_bfloat16(of = hidden_size)}})",
        "head": "x | norm | linear(vocab){{capped(of = logits_soft_cap)}}",
    },
    defs={
        "fading": """
mix fading {
  state H[value_dim] = 0
  H <- exp(fade) * H + v
  o <- H
}
"""
    },
    weights="""
model.final_norm.weight -> norm.w
model.layers.{i}.temporal_pre_norm.weight -> layers.{i}.attn_norm.w
model.layers.{i}.channel_pre_norm.weight -> layers.{i}.ffn_norm.w
model.layers.{i}.mlp_block.{p}_proj.{t} -> layers.{i}.ffn.{p}_proj.{t}
model.layers.{i}.temporal_block.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
model.layers.{i}.temporal_block.linear_y.{t} -> layers.{i}.attn.y_proj.{t}
model.layers.{i}.temporal_block.linear_x.{t} -> layers.{i}.attn.u_proj.{t}
model.layers.{i}.temporal_block.linear_out.{t} -> layers.{i}.attn.o_proj.{t}
model.layers.{i}.temporal_block.conv_1d.{t} -> layers.{i}.attn.u_conv.{t}
model.layers.{i}.temporal_block.rg_lru.recurrent_param -> layers.{i}.attn.rate
model.layers.{i}.temporal_block.rg_lru.input_gate_weight -> layers.{i}.attn.open__proj.weight across
model.layers.{i}.temporal_block.rg_lru.input_gate_bias -> layers.{i}.attn.open_bias
model.layers.{i}.temporal_block.rg_lru.recurrent_gate_weight
    -> layers.{i}.attn.fade_proj.weight across
model.layers.{i}.temporal_block.rg_lru.recurrent_gate_bias -> layers.{i}.attn.fade_bias
""",
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
    "gemma4_text": GEMMA4,
    "recurrent_gemma": RECURRENT_GEMMA,
}
