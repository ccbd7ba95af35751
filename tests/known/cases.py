"""Tiny configurations of every kind that is read, and their models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LOCAL, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def turning(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


PARTLY = {"rope_parameters": turning(1e4, partial_rotary_factor=0.5)}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
STATES = {"state_size": 4, "num_heads": 4, "head_dim": 16, "expand": 2}
SPACES = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}
DELTA = {
    "layer_types": ["linear_attention", FULL],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 5, "layer_types": [LOCAL, FULL]}
SMALL = {"moe_intermediate_size": 12}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 9,
    "q_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
FULL_LATENT = {name: each for name, each in LATENT.items() if name != "q_lora_rank"}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_routed_experts": 12}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6},
    "llama/biased": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "cwm": {**ENDS, "head_dim": 6, "rope_parameters": turning(1e4), **WINDOWS},
    "mistral": {"head_dim": 6, "sliding_window": 5},
    "ministral": {"head_dim": 6, **WINDOWS},
    "phi3": {
        "sliding_window": 5,
        "original_max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **PARTLY,
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 6, "use_sliding_window": True, "max_window_layers": 1, **WINDOWS},
    "seed_oss": {"head_dim": 6},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]},
    "helium": {"head_dim": 8},
    "ernie4_5": {"head_dim": 6, "use_bias": True},
    "arcee": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "apertus": {"rope_parameters": turning(1e4)},
    "nanochat": {},
    "olmo": {"clip_qkv": 0.8},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "layer_types": [LOCAL, FULL]},
    "exaone4": {"sliding_window": 5, "layer_types": [LOCAL, FULL]},
    "bitnet": {},
    "hunyuan_v1_dense": {"head_dim": 6},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 8.0,
    },
    "jais2": {"head_dim": 8},
    "diffllama": {},
    "gemma": {"head_dim": 6},
    "gemma2": {"head_dim": 6, "query_pre_attn_scalar": 9, **WINDOWS},
    "vaultgemma": {"head_dim": 6, "query_pre_attn_scalar": 9, **WINDOWS},
    "gemma3_text": {"head_dim": 6, "query_pre_attn_scalar": 9, **WINDOWS},
    "gpt2": {"n_inner": 40},
    "gpt_bigcode": {"n_inner": 40, "num_key_value_heads": 1},
    "gpt_bigcode/heads": {"n_inner": 40, "multi_query": False, "num_key_value_heads": 4},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
    },
    "gptj": {"n_inner": 40, "rotary_dim": 4},
    "codegen": {"n_inner": 40, "rotary_dim": 4},
    "gpt_neox": PARTLY,
    "gpt_neox/serial": {"use_parallel_residual": False, "attention_bias": False},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 40},
    "falcon/40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
    "falcon/11b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon/rw": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "mpt": {},
    "mpt/clipped": {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.3}},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "phi": PARTLY,
    "phi/normed": {"qk_layernorm": True, "num_key_value_heads": 4},
    "stablelm": {},
    "stablelm/12b": {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    "persimmon": {},
    "nemotron": {"head_dim": 8},
    "starcoder2": {"sliding_window": 5},
    "cohere": {"logit_scale": 0.25},
    "cohere/normed": {"use_qk_norm": True, "attention_bias": True},
    "cohere2": {"head_dim": 6, **WINDOWS},
    "mixtral": {"intermediate_size": 12, "num_local_experts": 8},
    "minimax_m2": {
        "intermediate_size": 12,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "qwen2_moe": {**SMALL, "num_experts": 8, "shared_expert_intermediate_size": 14},
    "qwen3_moe": {
        **SMALL,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "mellum": {**SMALL, **WINDOWS, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {
        "intermediate_size": 12,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "clip_qkv": 0.8,
    },
    "flex_olmo": {**ENDS, "pad_token_id": 0, "intermediate_size": 12},
    "granitemoe": {"intermediate_size": 12, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    "granitemoeshared": {
        "intermediate_size": 12,
        "shared_intermediate_size": 14,
        "residual_multiplier": 0.22,
    },
    "ernie4_5_moe": {
        **SMALL,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "intermediate_size": 12, "num_experts": 8, "moe_topk": 2},
    "gpt_oss": {
        "head_dim": 6,
        "intermediate_size": 12,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": turning(1e4),
        **WINDOWS,
    },
    "gpt_oss/yarn": {
        "head_dim": 8,
        "intermediate_size": 12,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
        **WINDOWS,
    },
    "glm4_moe": {
        **SMALL,
        **ONE_GROUP,
        "n_routed_experts": 8,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "solar_open": {**SMALL, **GROUPS, "head_dim": 8},
    "dots1": {
        **SMALL,
        **ONE_GROUP,
        "n_routed_experts": 8,
        "head_dim": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "exaone_moe": {
        **SMALL,
        **WINDOWS,
        **DENSE_FIRST,
        **ONE_GROUP,
        "first_k_dense_replace": 1,
        "num_experts": 8,
        "head_dim": 8,
    },
    "afmoe": {
        **SMALL,
        **WINDOWS,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "deepseek_v2": {
        **SMALL,
        **LATENT,
        "kv_lora_rank": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**SMALL, **LATENT, **GROUPS, "first_k_dense_replace": 1},
    "deepseek_v3/yarn": {
        **SMALL,
        **LATENT,
        **GROUPS,
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "glm4_moe_lite": {
        **SMALL,
        **LATENT,
        **DENSE_FIRST,
        **ONE_GROUP,
        "n_routed_experts": 8,
    },
    "youtu": LATENT,
    "minicpm3": {**LATENT, "dim_model_base": 8},
    "cohere2_moe": {
        **WINDOWS,
        **DENSE_FIRST,
        "head_dim": 8,
        "intermediate_size": 12,
        "prefix_dense_intermediate_size": 40,
    },
    "mamba": {"state_size": 4, "time_step_rank": 3, "expand": 2},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 3, "expand": 2},
    "mamba2": {**STATES, "n_groups": 1},
    "mamba2/groups": {**STATES, "n_groups": 2},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "use_mamba_kernels": False,
    },
    "bamba": {**SPACES, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **SPACES,
        "mamba_n_groups": 2,
        "layer_types": ["linear_attention", FULL],
        "intermediate_size": 12,
        "shared_intermediate_size": 14,
        "residual_multiplier": 0.22,
    },
    "granitemoehybrid/dense": {
        **SPACES,
        "layer_types": ["linear_attention", FULL],
        "num_local_experts": 0,
        "shared_intermediate_size": 14,
        "position_embedding_type": "rope",
    },
    "falcon_h1": {
        **SPACES,
        "mamba_d_ssm": 64,
        "key_multiplier": 0.7,
        "ssm_in_multiplier": 1.3,
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3],
        "mlp_multipliers": [0.9, 1.1],
        "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.2,
        "ssm_out_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
    },
    "qwen3_next": {
        **SMALL,
        **DELTA,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 14,
    },
    "qwen3_5_text": {**DELTA, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        **SMALL,
        "layer_types": ["conv", FULL],
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "lfm3": {
        "head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": ["conv", LOCAL, FULL],
        "sliding_window": 5,
    },
    "kimi_linear": {
        **SMALL,
        **DENSE_FIRST,
        **LATENT,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", FULL],
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_expert_group": 1,
        "topk_group": 1,
        "linear_num_heads": 4,
        "linear_head_dim": 6,
    },
    "ministral3": {
        "head_dim": 8,
        "sliding_window": 5,
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mimo_v2_flash": {
        **SMALL,
        **WINDOWS,
        **DENSE_FIRST,
        **ONE_GROUP,
        "n_routed_experts": 8,
        "head_dim": 8,
        "v_head_dim": 6,
        "num_key_value_heads": 1,
        "routed_scaling_factor": 2.0,
    },
    "laguna": {
        **SMALL,
        **WINDOWS,
        **DENSE_FIRST,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 14,
        "moe_routed_scaling_factor": 1.5,
        "num_attention_heads_per_layer": [4, 4],
    },
    "flint": {
        **SMALL,
        **WINDOWS,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 14,
        "mlp_only_layers": [0],
    },
    "kolibri1": {
        **SMALL,
        **WINDOWS,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 14,
    },
    "deepseek_v32": {
        **SMALL,
        **LATENT,
        **GROUPS,
        **DENSE_FIRST,
        "index_topk": 5,
        "index_n_heads": 8,
        "index_head_dim": 6,
    },
    "minimax_m3_vl_text": {
        "intermediate_size": 12,
        "head_dim": 8,
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 10,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": [FULL, "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 6,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
        **PARTLY,
    },
    "beam": {
        **SMALL,
        **WINDOWS,
        **DENSE_FIRST,
        "head_dim": 8,
        "num_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    },
    "axk1": {**SMALL, **LATENT, **GROUPS, **DENSE_FIRST},
    "olmo_hybrid": DELTA,
    "nemotron_h": {
        **SMALL,
        **ONE_GROUP,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "layers_block_type": ["linear_attention", "moe", FULL, "mlp"],
        "n_groups": 2,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_routed_experts": 8,
        "moe_shared_expert_intermediate_size": 14,
        "use_mamba_kernels": False,
    },
    "rwkv": {"attention_hidden_size": 24},
    "gemma4_text": {
        **WINDOWS,
        "head_dim": 6,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 3.0,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "lru_width": 24,
        "attention_window_size": 5,
        "num_key_value_heads": 1,
    },
    "axk2": {
        **SMALL,
        **LATENT,
        **DENSE_FIRST,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "index_topk": 5,
        "index_n_heads": 8,
        "index_head_dim": 6,
        "gated_norm_rank": 3,
        "layer_types": ["indexed_attention"] * 2,
    },
    "hy_v4": {
        **SMALL,
        **LATENT,
        **DENSE_FIRST,
        **ONE_GROUP,
        "n_routed_experts": 8,
        "hc_mult": 3,
        "indexer_types": ["full", "shared"],
        "index_topk": 5,
        "index_n_heads": 8,
        "index_head_dim": 6,
        "swiglu_limit": 1.5,
        "routed_scaling_factor": 2.5,
    },
    "bailing_hybrid": {
        **SMALL,
        **DENSE_FIRST,
        **FULL_LATENT,
        "layer_types": ["linear_attention", FULL],
        "num_experts": 12,
        "num_experts_per_token": 3,
        "num_expert_group": 4,
        "topk_group": 2,
        "linear_num_heads": 4,
        "linear_head_dim": 6,
    },
}


def kind(case: str) -> str:
    """Return the kind of a case: what stands before a slash."""
    return case.partition("/")[0]


def configured(case: str) -> Any:
    """Return their configuration of a case."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind(case)]
    known = {*made().to_dict(), *made.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    return made(**{**sizes, **CASES[case]})


def made(case: str) -> nn.Module:
    """Return their model of a case, all of its weights random."""
    from transformers import AutoModelForCausalLM

    config = configured(case)
    attention = "sdpa" if config.model_type == "falcon" else "eager"  # which adds ALiBi twice there
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in [*model.named_parameters(), *model.named_buffers()]:
            drawn = torch.randn(each.shape, generator=generator)
            if name.endswith(BIASES):
                each.copy_(0.2 * drawn)
            elif isinstance(each, nn.Parameter):
                each.copy_(0.3 * drawn + (0.8 if each.ndim == 1 and "norm" in name else 0))
    return model


BIASES = ("correction_bias", "balancing_biases", "expert_bias")

# padding moves their blocks of keys, or is seen: each row is told alone
ALONE = ("minimax_m3_vl_text", "recurrent_gemma", "rwkv")
