"""Whole language models whose attention chooses its keys: what is named how. See `models.py`."""

from __future__ import annotations

import re
from dataclasses import replace

from .models import CHOSEN, FULL, LOCAL, MINICPM, MOE, PARTLY, PARTS, SMALL, Row, Theirs, rows

SPARSE = "minimax_m3_sparse"
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
HY_V4 = rows("""
    self_attn.sinks -> part.z
    self_attn.q_a_proj.weight -> part.a_proj.weight
    self_attn.q_a_layernorm.weight -> part.a_norm.weight
    self_attn.q_b_proj.weight -> part.q_proj.weight
    self_attn.indexer.wq_b.weight -> part.asked_proj.weight
    self_attn.indexer.wk.weight -> part.known_proj.weight
    self_attn.indexer.k_norm.{t} -> part.known_norm.{t}
    self_attn.indexer.weights_proj.weight -> part.w_proj.weight
""")
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
}
