"""Whole language models whose attention chooses its keys: what is named how. See `models.py`."""

from __future__ import annotations

from .models import BEFORE, FULL, MOE, NARROW, PARTLY, PARTS, SMALL, Theirs, rows

SPARSE = "minimax_m3_sparse"

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
}
