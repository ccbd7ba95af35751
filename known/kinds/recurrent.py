"""Models with other states: delta rules, short convolutions, keys that weigh and fade."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import FEED, LATENT, MOE, UNIT, UNIT_BEFORE
from .experts import CHOICE, LATENT_BLOCK, PARTS
from .llama import ATTENTION, LLAMA, PER_HEAD, TYPES, WHOLE, by_type

DELTA = """
mix gated_deltanet {  # Yang et al. 2024
  let beta = x | linear(heads) | sigmoid
  let time = x | linear(heads, bias = true) | softplus
  param rate[heads] = log(h + 1)
  state S[head_dim, value_dim] = 0
  S <- exp(-exp(rate) * time) * S
  S <- S + {{delta_factor}}beta * outer(k, v - k @ S)
  o <- head_dim ** -0.5 * (q @ S)
}
"""
DELTA_KEYS = (
    "x | linear({{linear_num_key_heads}} * head_dim) | conv({{linear_conv_kernel_dim}}) | "
    "{{activation()}} | split({{linear_num_key_heads}}) | l2_norm | "
    "repeat({{linear_num_value_heads}} / {{linear_num_key_heads}})"
)
DELTA_BLOCK: Settings = {
    "heads": "{{linear_num_value_heads}}",
    "head_dim": "{{linear_key_head_dim}}",
    "value_dim": "{{linear_value_head_dim}}",
    "let g": "x | linear(heads * value_dim) | silu | split",
    "q": DELTA_KEYS,
    "k": DELTA_KEYS,
    "v": "x | linear | conv({{linear_conv_kernel_dim}}) | {{activation()}} | split",
    "mix": "gated_deltanet",
    "mask": "causal",
    "out": "o | {{rms()}} | gate(g) | merge | linear",
}
GATED_ATTENTION: Settings = {
    **ATTENTION,
    "let g": "x | linear(heads * value_dim{{attention_bias? , bias = true}}) | sigmoid",
    "q": "x | linear{{attention_bias? (bias = true)}} | split | unit_rms",
    "k": "x | linear{{attention_bias? (bias = true)}} | split | unit_rms",
    "out": "o | merge | gate(g) | linear{{attention_bias? (bias = true)}}",
}
QWEN_NEXT_NAMES = (
    UNIT
    + UNIT_BEFORE
    + """
model.layers.{i}.self_attn.q_proj.{t} -> layers.{i}.attn.(q|g)_proj.{t} in num_attention_heads
model.layers.{i}.linear_attn.in_proj_qkvz.weight
    -> layers.{i}.attn.(q|k|v|g)_proj.weight in linear_num_key_heads
model.layers.{i}.linear_attn.in_proj_ba.weight
    -> layers.{i}.attn.(beta|time)_proj.weight in linear_num_key_heads
model.layers.{i}.linear_attn.in_proj_qkv.weight -> layers.{i}.attn.(q|k|v)_proj.weight
model.layers.{i}.linear_attn.in_proj_z.weight -> layers.{i}.attn.g_proj.weight
model.layers.{i}.linear_attn.in_proj_b.weight -> layers.{i}.attn.beta_proj.weight
model.layers.{i}.linear_attn.in_proj_a.weight -> layers.{i}.attn.time_proj.weight
model.layers.{i}.linear_attn.conv1d.weight -> layers.{i}.attn.(q|k|v)_conv.weight
model.layers.{i}.linear_attn.dt_bias -> layers.{i}.attn.time_proj.bias
model.layers.{i}.linear_attn.A_log -> layers.{i}.attn.rate
model.layers.{i}.linear_attn.norm.weight -> layers.{i}.attn.o_norm.weight
model.layers.{i}.linear_attn.out_proj.weight -> layers.{i}.attn.o_proj.weight
"""
)
QWEN_NEXT = LLAMA.but(
    "Qwen3-Next; Qwen Team 2025: gated delta rules, gated attention, experts",
    fixed={"mlp_bias": False, "delta_factor": ""},
    mixers=TYPES,
    blocks={"linear_attention": DELTA_BLOCK, "full_attention": GATED_ATTENTION},
    parts="stepped()",
    ffns={
        "sparse": "gated_moe(experts = {{num_experts}}, top = {{num_experts_per_tok}}, "
        "expert = {{gated(hidden = moe_intermediate_size)}}, "
        "shared = {{gated(hidden = shared_expert_intermediate_size)}})"
    },
    model={"norm": "unit_rms"},
    defs={"gated_deltanet": DELTA},
    weights=QWEN_NEXT_NAMES + MOE,
)
SHORT_CONV = """
ffn short_conv(taps) {
  let before = x | linear{{conv_bias? (bias = true)}}
  let after  = x | linear{{conv_bias? (bias = true)}}
  let mixed  = before * (x | linear{{conv_bias? (bias = true)}})
    | conv(taps{{conv_bias? , bias = true}})
  out = after * mixed | linear{{conv_bias? (bias = true)}}
}
"""
LFM_NAMES = """
model.embedding_norm.weight -> norm.weight
model.layers.{i}.operator_norm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.post_operator_norm.weight -> layers.{i}.attn_post_norm.weight
model.layers.{i}.ffn_norm.weight -> layers.{i}.ffn_norm.weight
model.layers.{i}.post_ffn_norm.weight -> layers.{i}.ffn_post_norm.weight
model.layers.{i}.self_attn.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
model.layers.{i}.self_attn.{p}_layernorm.weight -> layers.{i}.attn.{p}_norm.weight
model.layers.{i}.conv.in_proj.{t} -> layers.{i}.attn.(before|after|mixed)_proj.{t}
model.layers.{i}.conv.conv.{t} -> layers.{i}.attn.mixed_conv.{t}
model.layers.{i}.conv.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
model.layers.{i}.feed_forward.w1.weight -> layers.{i}.ffn.gate_proj.weight
model.layers.{i}.feed_forward.w2.weight -> layers.{i}.ffn.down_proj.weight
model.layers.{i}.feed_forward.w3.weight -> layers.{i}.ffn.up_proj.weight
model.layers.{i}.feed_forward.expert_bias -> layers.{i}.ffn.bias
model.layers.{i}.feed_forward.experts.{j}.w1.weight
    -> layers.{i}.ffn.experts.gate_proj.weight stacked
model.layers.{i}.feed_forward.experts.{j}.w2.weight
    -> layers.{i}.ffn.experts.down_proj.weight stacked
model.layers.{i}.feed_forward.experts.{j}.w3.weight -> layers.{i}.ffn.experts.up_proj.weight stacked
"""
LFM2 = LLAMA.but(
    "LFM2; Liquid AI 2025: short convolutions between two gates, attention every few layers",
    names={"rms_norm_eps": "norm_eps"},
    fixed={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    mixers=TYPES,
    blocks={
        "full_attention": {**ATTENTION, **PER_HEAD},
        "conv": "short_conv({{conv_L_cache}})",
    },
    ffns={"dense": "{{lfm_gated()}}"},
    defs={"short_conv": SHORT_CONV},
    weights=LFM_NAMES + FEED,
)
LFM3_BLOCK: Settings = {
    **ATTENTION,
    **PER_HEAD,
    "let g": "{{use_attention_gate? x | linear(heads) | sigmoid}}",
    "position": "{{rope(of = full_attention)}}",
    "out": "o{{use_attention_gate?  | gate(g)}} | merge | linear{{attention_bias? (bias = true)}}",
}
KIMI_DELTA = """
mix kda {
  let beta = x | linear(heads) | sigmoid
  let time = x | linear(head_dim) | linear(heads * head_dim, bias = true) | softplus | split
  param rate[heads] = log(h + 1)
  state S[head_dim, value_dim] = 0
  S <- exp(-exp(rate) * time) * S
  S <- S + beta * outer(k, v - k @ S)
  o <- head_dim ** -0.5 * (q @ S)
}
"""
KIMI_CONV = "x | linear | conv({{linear_conv_kernel_dim}}) | silu | split"
KIMI_BLOCK: Settings = {
    "heads": "{{linear_num_heads}}",
    "head_dim": "{{linear_head_dim}}",
    "let g": "x | linear(head_dim) | linear(heads * value_dim) | sigmoid | split",
    "q": KIMI_CONV + " | l2_norm",
    "k": KIMI_CONV + " | l2_norm",
    "v": KIMI_CONV,
    "mix": "kda",
    "mask": "causal",
    "out": "o | {{rms()}} | gate(g) | merge | linear",
}
KIMI = LLAMA.but(
    "Kimi Linear; Kimi Team 2025: Kimi delta attention, latent attention without positions",
    fixed={"mlp_bias": False, **CHOICE},
    names={
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
    },
    mixers=TYPES,
    blocks={
        "linear_attention": KIMI_BLOCK,
        "full_attention": {
            **LATENT_BLOCK,
            "scale": "",
            "let kr": "x | linear({{qk_rope_head_dim}}) | repeat(heads)",
            "q": "x | {{q_lora_rank? linear({{q_lora_rank}}) | rms_norm | }}linear | split",
        },
    },
    parts=PARTS,
    ffns={"sparse": "{{choosing()}}"},
    defs={"kda": KIMI_DELTA},
    weights="""
model.layers.{i}.self_attn.conv1d.weight -> layers.{i}.attn.(q|k|v)_conv.weight
model.layers.{i}.self_attn.forget_gate.f_a_proj.weight -> layers.{i}.attn.time_proj_0.weight
model.layers.{i}.self_attn.forget_gate.f_b_proj.weight -> layers.{i}.attn.time_proj_1.weight
model.layers.{i}.self_attn.forget_gate.dt_bias -> layers.{i}.attn.time_proj_1.bias
model.layers.{i}.self_attn.forget_gate.A_log -> layers.{i}.attn.rate
model.layers.{i}.self_attn.b_proj.weight -> layers.{i}.attn.beta_proj.weight
model.layers.{i}.self_attn.g_a_proj.weight -> layers.{i}.attn.g_proj_0.weight
model.layers.{i}.self_attn.g_b_proj.weight -> layers.{i}.attn.g_proj_1.weight
"""
    + LATENT
    + MOE,
)
RECURRENT: dict[str, Kind | tuple[Kind, ...]] = {
    "qwen3_next": QWEN_NEXT,
    "qwen3_5_text": QWEN_NEXT.but(
        "Qwen3.5; Qwen Team 2026: gated delta rules, gated attention",
        parts="all(it = dense)",
        ffns={"dense": "{{gated()}}"},
    ),
    "lfm2": LFM2,
    "lfm2_moe": LFM2.but(
        "LFM2 with experts; Liquid AI 2025",
        fixed={"choice_eps": 1e-6},
        parts="first(of = num_dense_layers, before = dense, after = sparse)",
        needs={"use_expert_bias": True},
        ffns={
            "dense": "{{gated()}}",
            "sparse": "{{choosing(experts = num_experts, times = , groups = )}}",
        },
    ),
    "lfm3": LFM2.but(
        "LFM3; Liquid AI 2026: as LFM2, with norms on both sides of each part, a gate a head",
        fixed={"attention_bias": None},
        blocks={
            **by_type(LFM3_BLOCK, position="{{rope(of = sliding_attention)}}"),
            "conv": "short_conv({{conv_L_cache}})",
        },
        ffns={"dense": "{{gated()}}"},
        model={"layer": "{{use_sandwich_norm? sandwich}}"},
    ),
    "kimi_linear": KIMI,
    "olmo_hybrid": LLAMA.but(
        "OLMo Hybrid; OLMo Team 2026: gated delta rules; attention as in OLMo 2",
        fixed={"mlp_bias": False},
        mixers=TYPES,
        around={"full_attention": "inner"},
        blocks={
            "linear_attention": {
                **DELTA_BLOCK,
                "out": "o | rms_norm(eps = 1e-5) | gate(g) | merge | linear",
            },
            "full_attention": {**ATTENTION, **WHOLE},
        },
        defs={
            "gated_deltanet": DELTA.replace("{{delta_factor}}", "{{linear_allow_neg_eigval? 2 * }}")
        },
        weights="""
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.linear_attn.a_proj.weight -> layers.{i}.attn.time_proj.weight
model.layers.{i}.linear_attn.b_proj.weight -> layers.{i}.attn.beta_proj.weight
model.layers.{i}.linear_attn.{p}_proj.weight -> layers.{i}.attn.{p}_proj.weight
model.layers.{i}.linear_attn.o_norm.weight -> layers.{i}.attn.o_norm.weight
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.attn_post_norm.weight
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.weight
model.layers.{i}.post_feedforward_layernorm.weight -> layers.{i}.ffn_post_norm.weight
"""
        + QWEN_NEXT_NAMES,
    ),
    "rwkv": Kind(
        about="RWKV; Peng et al. 2023: keys weigh exponentially, all before fade",
        names={"layer_norm_eps": "layer_norm_epsilon"},
        blocks={
            "attention": {
                "heads": "1",
                "head_dim": "{{attention_hidden_size}}",
                "param k_share[width]": "0.5",
                "param v_share[width]": "0.5",
                "param r_share[width]": "0.5",
                "let before": "x | shift(1)",
                "let r": "r_share * x + (1 - r_share) * before | linear(head_dim) | sigmoid",
                "q": "k",
                "k": "k_share * x + (1 - k_share) * before | linear(head_dim) | split(1)",
                "v": "v_share * x + (1 - v_share) * before | linear(head_dim) | split(1)",
                "mix": "wkv",
                "mask": "causal",
                "out": "o | merge | gate(r) | linear",
            }
        },
        ffns={"dense": "channel_mix(hidden = {{intermediate_size}})"},
        model={
            "vocab": "{{vocab_size}}",
            "width": "{{hidden_size}}",
            "norm": "{{layer_norm()}}",
            "embed": "x | {{layer_norm()}}",
            "tie": "{{tie_word_embeddings}}",
        },
        defs={
            "wkv": """
mix wkv {
  param decay[heads, head_dim] = 0
  param bonus[heads, head_dim] = 0
  state N[value_dim] = 0
  state D[value_dim] = 0
  o <- (N + exp(bonus + k) * v) / (D + exp(bonus + k))
  N <- exp(-exp(decay)) * N + exp(k) * v
  D <- exp(-exp(decay)) * D + exp(k)
}
""",
            "channel_mix": """
ffn channel_mix(hidden) {
  param k_share[width] = 0.5
  param r_share[width] = 0.5
  let before = x | shift(1)
  let r      = r_share * x + (1 - r_share) * before | linear | sigmoid
  let up     = k_share * x + (1 - k_share) * before | linear(hidden) | squared_relu
  out = up | linear(width) | gate(r)
}
""",
        },
        weights="""
rwkv.embeddings.weight -> embed_tokens.weight
rwkv.blocks.0.pre_ln.{t} -> embed_norm.{t}
rwkv.ln_out.{t} -> norm.{t}
head.weight -> lm_head.weight
rwkv.blocks.{i}.ln1.{t} -> layers.{i}.attn_norm.{t}
rwkv.blocks.{i}.ln2.{t} -> layers.{i}.ffn_norm.{t}
rwkv.blocks.{i}.attention.time_decay -> layers.{i}.attn.decay
rwkv.blocks.{i}.attention.time_first -> layers.{i}.attn.bonus
rwkv.blocks.{i}.attention.time_mix_key -> layers.{i}.attn.k_share
rwkv.blocks.{i}.attention.time_mix_value -> layers.{i}.attn.v_share
rwkv.blocks.{i}.attention.time_mix_receptance -> layers.{i}.attn.r_share
rwkv.blocks.{i}.attention.key.weight -> layers.{i}.attn.k_proj.weight
rwkv.blocks.{i}.attention.value.weight -> layers.{i}.attn.v_proj.weight
rwkv.blocks.{i}.attention.receptance.weight -> layers.{i}.attn.r_proj.weight
rwkv.blocks.{i}.attention.output.weight -> layers.{i}.attn.o_proj.weight
rwkv.blocks.{i}.feed_forward.time_mix_key -> layers.{i}.ffn.k_share
rwkv.blocks.{i}.feed_forward.time_mix_receptance -> layers.{i}.ffn.r_share
rwkv.blocks.{i}.feed_forward.key.weight -> layers.{i}.ffn.up_proj.weight
rwkv.blocks.{i}.feed_forward.receptance.weight -> layers.{i}.ffn.r_proj.weight
rwkv.blocks.{i}.feed_forward.value.weight -> layers.{i}.ffn.o_proj.weight
""",
    ),
    "bailing_hybrid": KIMI.but(
        "Ling 2.5; Ant Group 2026: Kimi delta attention that fades within bounds; latent attention "
        "with a gate for each head",
        blocks={
            "linear_attention": {
                **KIMI_BLOCK,
                "let g": "x | linear(heads * value_dim) | sigmoid | split",
            },
            "full_attention": {
                **LATENT_BLOCK,
                "let g": "x | linear(heads) | sigmoid",
                "q": "x | linear | split | "
                "{{rope(size = qk_rope_head_dim, style = interleaved, behind = yes)}}",
                "out": "o | gate(g) | merge | linear{{attention_bias? (bias = true)}}",
            },
        },
        fixed={"rope_interleave": True},
        defs={
            "kda": KIMI_DELTA.replace(
                "x | linear(head_dim) | linear(heads * head_dim, bias = true) | softplus | split",
                "x | linear(heads * head_dim, bias = true) | split",
            ).replace(
                "exp(-exp(rate) * time)",
                "exp({{kda_safe_gate? {{kda_lower_bound}} * sigmoid(exp(rate) * time)}}"
                "{{kda_safe_gate! -exp(rate) * softplus(time)}})",
            )
        },
        weights="""
model.layers.{i}.self_attn.forget_gate.f_proj.weight -> layers.{i}.attn.time_proj.weight
model.layers.{i}.self_attn.forget_gate.dt_bias -> layers.{i}.attn.time_proj.bias
""",
    ),
}
