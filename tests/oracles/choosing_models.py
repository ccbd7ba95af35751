"""Whole language models whose attention chooses its keys: what is named how. See `models.py`."""

from __future__ import annotations

import re
from dataclasses import replace

from .models import (
    BEFORE,
    CHOSEN,
    FULL,
    LOCAL,
    MINICPM,
    MODELS,
    MOE,
    PARTLY,
    PARTS,
    SMALL,
    Row,
    Theirs,
    rows,
)

SPARSE = "minimax_m3_sparse"
BIAS = "conv_qk_depthwise.bias"  # of a convolution before another, whose bias does as much
HEAVY, LIGHT = "heavily_compressed_attention", "compressed_sparse_attention"

MINIMAX_M3 = rows("""
    model.norm.weight -> norm.w
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
    model.layers.{i}.self_attn.q_norm.weight -> layers.{i}.attn.q_unit_rms.w
    model.layers.{i}.self_attn.k_norm.weight -> layers.{i}.attn.k_unit_rms.w
    model.layers.{i}.self_attn.indexer.q_proj.weight -> layers.{i}.attn.asked_proj.weight
    model.layers.{i}.self_attn.indexer.k_proj.weight -> layers.{i}.attn.known_proj.weight
    model.layers.{i}.self_attn.indexer.q_norm.weight -> layers.{i}.attn.asked_unit_rms.w
    model.layers.{i}.self_attn.indexer.k_norm.weight -> layers.{i}.attn.known_unit_rms.w
    model.layers.{i}.mlp.gate_up_proj.weight -> layers.{i}.ffn.(gate|up)_proj.weight
""") + tuple(
    each.under("model.layers.{i}.mlp.shared_experts.", "layers.{i}.ffn.shared.")
    for each in rows("gate_up_proj.weight -> (gate|up)_proj.weight")
)
ENDS = rows("""
    model.embed_tokens.weight -> embed_tokens.weight
    model.norm.weight -> norm.weight
    lm_head.weight -> lm_head.weight
""")
LANES = rows("""
    fn -> (read|write)_logits.o_proj.weight
    base -> (read|write)_logits.base
    scale -> (read|write)_logits.scale_
""")
MIXED_LANES = rows("""
    fn -> (read|write|mix)_logits.o_proj.weight
    base -> (read|write|mix)_logits.base
    scale -> (read|write|mix)_logits.scale_
""")
LAST_LANES = rows("""
    hc_fn -> read_logits.o_proj.weight
    hc_base -> read_logits.base
    hc_scale -> read_logits.scale_
""")
INDEXER = rows("""
    q_a_proj.weight -> a_proj.weight
    q_a_layernorm.weight -> a_norm.weight
    q_b_proj.weight -> q_proj.weight
    indexer.wq_b.weight -> asked_proj.weight
    indexer.wk.weight -> known_proj.weight
    indexer.k_norm.{t} -> known_norm.{t}
    indexer.weights_proj.weight -> w_proj.weight
""")
DEEPSEEK_V32 = tuple(
    each.under("model.layers.{i}.self_attn.", "layers.{i}.attn.") for each in INDEXER
)
HY_V4 = rows("self_attn.sinks -> part.z") + tuple(
    each.under("self_attn.", "part.") for each in INDEXER
)
DEEPSEEK_V4 = rows("""
    self_attn.sinks -> part.z
    self_attn.q_a_proj.weight -> part.a_proj.weight
    self_attn.q_a_norm.weight -> part.a_norm.weight
    self_attn.q_b_proj.weight -> part.q_proj.weight
    self_attn.kv_proj.weight -> part.k_proj.weight
    self_attn.kv_norm.weight -> part.k_norm.weight
    self_attn.o_a_proj.weight -> part.o_proj_0.weight
    self_attn.o_b_proj.weight -> part.o_proj_1.weight
    self_attn.compressor.position_bias -> part.bias
    self_attn.compressor.gate_proj.weight -> part.g_proj.weight
    self_attn.compressor.kv_proj.weight -> part.c_proj.weight
    self_attn.compressor.kv_norm.weight -> part.some_norm.weight
    mlp.gate.tid2eid -> part.chosen_embed.weight
""")
OVERLAPPING = rows("""
    kv_norm.weight -> some_norm.weight
    indexer.kv_norm.weight -> known_norm.weight
    indexer.q_b_proj.weight -> asked_proj.weight
    indexer.scorer.weights_proj.weight -> w_proj.weight
""") + tuple(
    each.under(part, "")
    for part in ("", "indexer.")  # which are one of ours
    for each in rows("""
        position_bias -> (bias_before|bias) beside
        gate_proj.weight -> (g_before|g)_proj.weight
        kv_proj.weight -> (c_before|c)_proj.weight
    """)
)
OVERLAPPING = tuple(
    each.under("model.layers.2.self_attn.compressor.", "layers.4.part.") for each in OVERLAPPING
)
ZAYA = rows("""
    model.input_hidden_states_scale -> embed_scaled.scale_
    model.input_hidden_states_bias -> embed_scaled.bias
""") + tuple(
    each.under("model.layers.{i}.", "layers.{i}.")
    for each in rows("""
        input_layernorm.weight -> attn_norm.weight
        post_attention_layernorm.weight -> z_norm.weight
        self_attn.qk_norm.temp -> attn.warmth
        self_attn.qkv_proj.q_proj.weight -> attn.asked_proj.weight
        self_attn.qkv_proj.k_proj.weight -> attn.known_proj.weight
        self_attn.qkv_proj.v_proj_current.weight -> attn.v_proj_0.weight
        self_attn.qkv_proj.v_proj_delayed.weight -> attn.v_proj_1.weight
        self_attn.qkv_proj.conv_qk_depthwise.weight -> attn.met_conv_0.weight
        self_attn.qkv_proj.conv_qk_grouped.{t} -> attn.met_conv_1.{t}
        post_attention_residual_scale.hidden_states_scale -> y_scaled_0.scale_
        post_attention_residual_scale.hidden_states_bias -> y_scaled_0.bias
        post_attention_residual_scale.residual_scale -> y_scaled_1.scale_
        post_attention_residual_scale.residual_bias -> y_scaled_1.bias
        post_mlp_residual_scale.hidden_states_scale -> o_scaled_0.scale_
        post_mlp_residual_scale.hidden_states_bias -> o_scaled_0.bias
        post_mlp_residual_scale.residual_scale -> o_scaled_1.scale_
        post_mlp_residual_scale.residual_bias -> o_scaled_1.bias
        mlp.gate.down_proj.{t} -> carried_proj.{t}
        mlp.gate.router_states_scale -> keep
        mlp.gate.router_mlp.norm.weight -> hidden_norm.weight
        mlp.gate.router_mlp.fc1.{t} -> hidden_proj_0.{t}
        mlp.gate.router_mlp.fc2.{t} -> hidden_proj_1.{t}
        mlp.gate.router_mlp.out_proj.weight -> score_proj.weight
        mlp.gate.balancing_biases -> bias
        mlp.experts.gate_up_proj -> experts.(gate|up)_proj.weight
        mlp.experts.down_proj -> experts.down_proj.weight
    """)
)


def halves(count: int, more: tuple[Row, ...], lanes: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return rows of layers of theirs that are two of ours: the attention, and what is after it."""
    done = ENDS + tuple(each.under("model.hc_head.", f"layers.{2 * count}.") for each in LAST_LANES)
    parts = [*more, *(_of_part(each) for each in MINICPM + MOE + PARTS)]
    for at in range(count):
        for half, lane, norm in ((0, "attn_hc", "input"), (1, "ffn_hc", "post_attention")):
            theirs, ours = f"model.layers.{at}.", f"layers.{2 * at + half}."
            done += tuple(each.under(f"{theirs}{lane}.", ours) for each in lanes)
            done += rows(f"{theirs}{norm}_layernorm.weight -> {ours}part_norm.weight")
            begins = ("self_attn.", "mlp.")[half]
            done += tuple(
                each.under(theirs, ours) for each in parts if each.theirs.startswith(begins)
            )
    return done


def _of_part(row: Row) -> Row:
    """Return a row of any layer as one of a layer whose only part is `part`."""
    theirs = row.theirs.removeprefix("model.layers.{i}.")
    ours = (re.sub(r"^layers\.\{i\}\.(attn|ffn)\.", "part.", each) for each in row.ours)
    return replace(row, theirs=theirs, ours=tuple(ours))


CHOOSING_MODELS: dict[str, Theirs] = {
    "minimax_m3": Theirs(
        "minimax_m3_vl_text",
        MINIMAX_M3 + MOE + PARTS,
        {
            **SMALL,
            "head_dim": 8,
            "intermediate_size": 12,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 10,
            "num_hidden_layers": 3,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": [FULL, SPARSE, SPARSE],
            "index_n_heads": 2,
            "index_head_dim": 6,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "rotary_dim": 4,
            "rope_parameters": PARTLY,
        },
        alone=True,
    ),
    "deepseek_v32": Theirs(
        "deepseek_v32",
        DEEPSEEK_V32 + MINICPM + MOE + PARTS + BEFORE,
        {
            **MODELS["deepseek_v3"].config,
            "index_topk": 5,
            "index_n_heads": 8,
            "index_head_dim": 6,
        },
    ),
    "hy_v4": Theirs(
        "hy_v4",
        halves(3, HY_V4, LANES),
        {
            **CHOSEN,
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "indexer_types": ["full", "shared", "shared"],
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 9,
            "q_lora_rank": 11,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "index_topk": 5,
            "index_n_heads": 8,
            "index_head_dim": 6,
            "hc_mult": 3,
            "swiglu_limit": 1.5,
        },
    ),
    "deepseek_v4": Theirs(
        "deepseek_v4",
        OVERLAPPING + halves(3, DEEPSEEK_V4, MIXED_LANES),
        {
            **SMALL,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 12,
            "head_dim": 8,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 11,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": [LOCAL, HEAVY, LIGHT],
            "compress_rates": {HEAVY: 4, LIGHT: 2},
            "rope_parameters": None,
            "sliding_window": 5,
            "o_groups": 2,
            "o_lora_rank": 6,
            "index_n_heads": 8,
            "index_head_dim": 6,
            "index_topk": 2,
            "hc_mult": 3,
            "swiglu_limit": 1.5,
        },
        alone=True,
    ),
    "zaya": Theirs(
        "zaya",
        rows(f"model.layers.{{i}}.self_attn.qkv_proj.{BIAS} -> -") + ZAYA + PARTS,
        {
            **SMALL,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_experts": 8,
            "router_hidden_size": 10,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
            "sliding_window": 5,
            "rope_parameters": {
                "hybrid": PARTLY,
                "hybrid_sliding": {**PARTLY, "rope_theta": 1e3},
            },
        },
        zero=BIAS,
    ),
}
