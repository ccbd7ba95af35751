"""Models whose feed-forwards are many experts, and those with latent attention."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import BEFORE, GRANITE_MOE, LATENT, MOE
from .gpt import COHERE
from .llama import (
    ATTENTION,
    LLAMA,
    LLAMA_LIKE,
    PER_HEAD,
    PLAIN,
    PLAIN_OUT,
    QWEN3,
    TYPES,
    WHOLE,
    by_type,
)

SPARSE = "all(it = sparse)"
DENSE_FIRST = "first(of = first_k_dense_replace, before = dense, after = sparse)"
PARTS = "listed(of = mlp_layer_types)"
CHOICE = {"choice_eps": 1e-20}
INDEPENDENT = {"mlp_bias": False}
TURN = (
    "{{rope_interleave? {{rope(size = qk_rope_head_dim, style = interleaved)}}}}"
    "{{rope_interleave! {{rope(size = qk_rope_head_dim)}}}}"
)
TURN_LAST = (
    "{{rope_interleave? {{rope(size = qk_rope_head_dim, style = interleaved, behind = yes)}}}}"
    "{{rope_interleave! {{rope(size = qk_rope_head_dim, behind = yes)}}}}"
)
LATENT_BLOCK: Settings = {
    "heads": "{{same(of = num_attention_heads, to = num_key_value_heads)}}",
    "head_dim": "{{qk_nope_head_dim}} + {{qk_rope_head_dim}}",
    "value_dim": "{{v_head_dim}}",
    "scale": "{{latent_scale()}}",
    "let c": "x | linear({{kv_lora_rank}}{{attention_bias? , bias = true}}) | rms_norm",
    "let kr": "x | linear({{qk_rope_head_dim}}{{attention_bias? , bias = true}}) | "
    + TURN
    + " | repeat(heads)",
    "q": "x | {{q_lora_rank? linear({{q_lora_rank}}{{attention_bias? , bias = true}}) | "
    "rms_norm | }}linear | split | " + TURN_LAST,
    "k": "c | linear(heads * {{qk_nope_head_dim}}) | split | concat(kr)",
    "v": "c | linear | split",
    "mask": "causal",
    "out": "o | merge | linear{{attention_bias? (bias = true)}}",
}
MIXTRAL = LLAMA.but(
    "Mixtral; Jiang et al. 2024: each token is sent to two of eight feed-forwards",
    fixed={"attention_bias": False, "mlp_bias": False},
    block={"mask": "{{mask()}}"},
    parts=SPARSE,
    ffns={"sparse": "{{moe(experts = num_local_experts, hidden = intermediate_size)}}"},
    weights=MOE,
)
QWEN_MOE = QWEN3.but(
    "Qwen3 with experts; Yang et al. 2025",
    mixers="all(it = attention)",
    blocks={"attention": {**ATTENTION, **PER_HEAD, "mask": "{{mask(use = use_sliding_window)}}"}},
    parts="stepped(experts = num_local_experts)",
    ffns={"sparse": "{{moe(experts = num_local_experts, norm = norm_topk_prob)}}"},
    weights=MOE,
)
V3 = LLAMA.but(
    "DeepSeek-V3; DeepSeek-AI 2024: latent attention; groups of experts, a bias that only chooses",
    fixed={**INDEPENDENT, **CHOICE},
    blocks={"attention": LATENT_BLOCK},
    parts=DENSE_FIRST,
    ffns={"sparse": "{{choosing()}}"},
    weights=LATENT + MOE,
)
GRANITE_EXPERTS = LLAMA_LIKE["granite"].but(
    "Granite 3 with experts; IBM 2024",
    fixed={"mlp_bias": False},
    parts=SPARSE,
    ffns={
        "sparse": "{{moe(experts = num_local_experts, hidden = intermediate_size, "
        "shared = shared_intermediate_size)}}"
    },
    weights=GRANITE_MOE,
)
WITH_EXPERTS: dict[str, Kind | tuple[Kind, ...]] = {
    "mixtral": MIXTRAL,
    "minimax_m2": MIXTRAL.but(
        "MiniMax-M2; MiniMax 2025: queries and keys normed over their width; a bias that chooses",
        fixed={"routed_scaling_factor": 1, "norm_topk_prob": True, "choice_eps": 0},
        blocks={"attention": {**ATTENTION, **WHOLE}},
        ffns={
            "sparse": "{{choosing(experts = num_local_experts, hidden = intermediate_size, "
            "times = , groups = )}}"
        },
        weights="""
model.layers.{i}.mlp.e_score_correction_bias -> layers.{i}.ffn.bias
""",
    ),
    "qwen2_moe": QWEN_MOE.but(
        "Qwen1.5-MoE; Qwen Team 2024: a shared expert with a gate; biases on q, k and v",
        names={"attention_bias": "qkv_bias"},
        mixers=TYPES,
        blocks=by_type({**ATTENTION, **PLAIN_OUT}),
        parts="stepped()",
        ffns={
            "sparse": "gated_moe(experts = {{num_experts}}, top = {{num_experts_per_tok}}, "
            "expert = {{gated(hidden = moe_intermediate_size)}}, "
            "shared = {{gated(hidden = shared_expert_intermediate_size)}})"
        },
    ),
    "qwen3_moe": QWEN_MOE,
    "mellum": QWEN_MOE.but(
        "Mellum 2; JetBrains 2025: as Qwen3 with experts, with a window in some layers",
        mixers=TYPES,
        blocks=by_type(
            {**ATTENTION, **PER_HEAD, "position": "{{rope(of = full_attention)}}"},
            position="{{rope(of = sliding_attention)}}",
        ),
        parts=PARTS,
    ),
    "olmoe": LLAMA_LIKE["olmo2"].but(
        "OLMoE; Muennighoff et al. 2024: many small experts; queries and keys normed",
        block={
            "q": "x | linear{{attention_bias? (bias = true)}} | {{rms()}}{{clip()}} | split",
            "k": "x | linear{{attention_bias? (bias = true)}} | {{rms()}}{{clip()}} | split",
            "v": "x | linear{{attention_bias? (bias = true)}}{{clip()}} | split",
        },
        model={"layer": ""},
        parts=SPARSE,
        ffns={"sparse": "{{moe(hidden = intermediate_size, norm = norm_topk_prob)}}"},
        weights=MOE + BEFORE,
    ),
    "flex_olmo": LLAMA_LIKE["olmo2"].but(
        "FlexOlmo; Shi et al. 2025: OLMo 2 with experts",
        parts=SPARSE,
        ffns={"sparse": "{{moe(hidden = intermediate_size, norm = norm_topk_prob)}}"},
        weights=MOE,
    ),
    "granitemoe": GRANITE_EXPERTS,
    "granitemoeshared": GRANITE_EXPERTS.but("Granite 3 with experts and a shared one; IBM 2025"),
    "ernie4_5_moe": LLAMA_LIKE["ernie4_5"].but(
        "ERNIE 4.5 with experts; Baidu 2025: a bias that only chooses",
        fixed={"choice_eps": 0, "routed_scaling_factor": 1, "norm_topk_prob": True},
        parts="between(of = moe_layer_start_index, to = moe_layer_end_index, "
        "step = moe_layer_interval)",
        ffns={
            "sparse": "{{choosing(experts = moe_num_experts, top = moe_k, "
            "times = moe_num_shared_experts, groups = , router = softmax)}}"
        },
        weights=MOE
        + """
model.layers.{i}.mlp.gate.moe_statics.e_score_correction_bias -> layers.{i}.ffn.bias
""",
    ),
    "hunyuan_v1_moe": LLAMA_LIKE["hunyuan_v1_dense"].but(
        "Hunyuan A13B; Tencent 2025: queries and keys normed after they are turned; experts",
        parts=SPARSE,
        ffns={
            "sparse": "{{moe(top = moe_topk, hidden = intermediate_size, "
            "shared = intermediate_size)}}"
        },
        weights="""
model.layers.{i}.mlp.gate.wg.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.mlp.shared_mlp.{p}_proj.weight -> layers.{i}.ffn.shared.{p}_proj.weight
"""
        + MOE,
    ),
    "gpt_oss": LLAMA.but(
        "gpt-oss; OpenAI 2025: experts with biases and a bounded gate, a sink in every head",
        fixed={"mlp_bias": False},
        needs={"hidden_act": "silu"},
        mixers=TYPES,
        blocks=by_type({**ATTENTION, "normalize": "sink"}),
        parts=SPARSE,
        ffns={
            "sparse": "routed(experts = {{num_local_experts}}, top = {{num_experts_per_tok}}, "
            "hidden = {{intermediate_size}})"
        },
        defs={
            "bounded": """
ffn bounded(hidden) {
  let gate = x | linear(hidden, bias = true) | min({{swiglu_limit}})
  let up   = x | linear(hidden, bias = true) | clip(-{{swiglu_limit}}, {{swiglu_limit}})
  let down = (up + 1) * gate * sigmoid({{swiglu_alpha}} * gate) | linear(bias = true)
  out = down
}
""",
            "routed": """
ffn routed(experts, top, hidden) : moe(experts, top, expert = bounded(hidden), balance = none) {
  let route = x | linear(experts, bias = true)
}
""",
        },
        weights="""
model.layers.{i}.self_attn.sinks -> layers.{i}.attn.z
model.layers.{i}.mlp.router.{t} -> layers.{i}.ffn.route_proj.{t}
model.layers.{i}.mlp.experts.gate_up_proj
    -> layers.{i}.ffn.experts.(gate|up)_proj.weight across in intermediate_size
model.layers.{i}.mlp.experts.gate_up_proj_bias
    -> layers.{i}.ffn.experts.(gate|up)_proj.bias in intermediate_size
model.layers.{i}.mlp.experts.down_proj -> layers.{i}.ffn.experts.down_proj.weight across
model.layers.{i}.mlp.experts.down_proj_bias -> layers.{i}.ffn.experts.down_proj.bias
""",
    ),
    "glm4_moe": LLAMA.but(
        "GLM-4.5; Zhipu 2025: a shared expert, a bias that only chooses, a dense first layer",
        fixed={**INDEPENDENT, **CHOICE},
        block={
            **PLAIN_OUT,
            "q": "x | linear{{attention_bias? (bias = true)}} | split{{use_qk_norm?  | {{rms()}}}}",
            "k": "x | linear{{attention_bias? (bias = true)}} | split{{use_qk_norm?  | {{rms()}}}}",
        },
        parts=DENSE_FIRST,
        ffns={"sparse": "{{choosing()}}"},
        weights=MOE,
    ),
    "solar_open": LLAMA.but(
        "Solar Open; Upstage 2025: a shared expert, a bias that only chooses",
        fixed={**INDEPENDENT, **CHOICE},
        block=PLAIN_OUT,
        parts=SPARSE,
        ffns={"sparse": "{{choosing()}}"},
        weights=MOE,
    ),
    "dots1": QWEN3.but(
        "dots.llm1; rednote-hilab 2025: shared experts in one, a bias that only chooses",
        fixed={**INDEPENDENT, **CHOICE},
        parts=DENSE_FIRST,
        ffns={"sparse": "{{choosing()}}"},
        weights=MOE,
    ),
    "exaone_moe": LLAMA_LIKE["exaone4"].but(
        "K-EXAONE; LG 2025: EXAONE 4 with norms before the parts and experts",
        fixed=CHOICE,
        model={"layer": ""},
        parts=PARTS,
        ffns={"sparse": "{{choosing(experts = num_experts, times = num_shared_experts)}}"},
        weights=MOE + BEFORE,
    ),
    "afmoe": PLAIN.but(
        "Trinity; Arcee 2025: gated attention; no positions in layers that see all",
        names={"routed_scaling_factor": "route_scale"},
        fixed={**CHOICE, "norm_topk_prob": True, "attention_bias": None},
        mixers=TYPES,
        blocks=by_type(
            {
                **ATTENTION,
                **PER_HEAD,
                "let gate": "x | linear(heads * head_dim) | sigmoid",
                "position": "",
                "out": "o | merge | gate(gate) | linear{{attention_bias? (bias = true)}}",
            },
            position="{{rope()}}",
        ),
        parts="first(of = num_dense_layers, before = dense, after = sparse)",
        ffns={
            "sparse": "{{choosing(experts = num_experts, times = num_shared_experts, groups = )}}"
        },
        model={
            "layer": "sandwich",
            "embed": "x{{mup_enabled?  | scale({{hidden_size}} ** 0.5)}}",
        },
        weights="""
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.attn_post_norm.weight
model.layers.{i}.pre_mlp_layernorm.weight -> layers.{i}.ffn_norm.weight
model.layers.{i}.post_mlp_layernorm.weight -> layers.{i}.ffn_post_norm.weight
model.layers.{i}.mlp.router.gate.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.mlp.expert_bias -> layers.{i}.ffn.bias
"""
        + MOE,
    ),
    "deepseek_v2": V3.but(
        "DeepSeek-V2; DeepSeek-AI 2024: latent attention; experts scored by a softmax",
        fixed={"rope_interleave": True},
        needs={"topk_method": "greedy", "mlp_bias": False},
        ffns={
            "sparse": "scaled_moe(experts = {{n_routed_experts}}, top = {{num_experts_per_tok}}, "
            "expert = {{gated(hidden = moe_intermediate_size)}}"
            "{{n_shared_experts? , shared = {{gated(hidden = moe_intermediate_size, "
            "times = n_shared_experts)}}}})"
        },
        defs={
            "scaled_moe": """
ffn scaled_moe(experts, top, expert, shared = none) : moe(experts, top, expert = expert,
    shared = shared, balance = none) {
  let w = {{factor(of = routed_scaling_factor)}}score * chosen  # not brought to one
}
"""
        },
    ),
    "deepseek_v3": V3,
    "glm4_moe_lite": V3.but("GLM-4.7-Flash; Zhipu 2025: latent attention, experts", parts=PARTS),
    "youtu": V3.but(
        "Youtu-LLM; Tencent 2025: latent attention, dense",
        parts="all(it = dense)",
        fixed={"n_shared_experts": None},
    ),
    "minicpm3": V3.but(
        "MiniCPM3; Hu et al. 2024: latent attention; what the parts add scaled by the depth",
        fixed={"rope_interleave": False, "mlp_bias": None},
        parts="all(it = dense)",
        defs={
            "deep": """
layer deep(attn, ffn) {
  let y = x + {{scale_depth}} * depth ** -0.5 * (x | norm | attn)
  out = y + {{scale_depth}} * depth ** -0.5 * (y | norm | ffn)
}
"""
        },
        model={
            "layer": "deep",
            "embed": "x{{scaled(of = scale_emb)}}",
            "head": "x | norm | scale({{dim_model_base}} / {{hidden_size}}) | linear(vocab)",
        },
    ),
    "cohere2_moe": COHERE.but(
        "Command A with experts; Cohere 2025: both parts beside each other",
        fixed={"use_qk_norm": None},
        needs={"expert_selection_fn": "softmax", "num_shared_experts": 0, "rms_norm_eps": None},
        mixers=TYPES,
        blocks=by_type({**ATTENTION, "position": ""}, position="{{rope(style = interleaved)}}"),
        parts=PARTS,
        ffns={
            "dense": "{{gated(hidden = prefix_dense_intermediate_size)}}",
            "sparse": "{{moe(hidden = intermediate_size)}}",
        },
        weights=MOE,
    ),
}
