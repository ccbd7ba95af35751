"""Models that join what others brought: windows, sinks, gates, choices by content."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import AFTER, BOTH, DECODER, INDEXER, LATENT, MOE, UNIT, UNIT_BEFORE
from .experts import CHOICE, LATENT_BLOCK, PARTS, SPARSE, V3
from .llama import ATTENTION, LLAMA, MISTRAL, PER_HEAD, PLAIN, PLAIN_OUT, QWEN3, TYPES, by_type

SINKS = """
model.layers.{i}.self_attn.sinks -> layers.{i}.attn.z
"""
FULL_ROPE = {"position": "{{rope(of = full_attention)}}"}
MIMO: Settings = {
    **ATTENTION,
    **FULL_ROPE,
    **PLAIN_OUT,
    "value_dim": "{{v_head_dim}}",
    "v": "x | linear{{attention_bias? (bias = true)}}"
    "{{attention_value_scale?  | scale({{attention_value_scale}})}} | split",
}
LAGUNA: Settings = {
    **ATTENTION,
    **PER_HEAD,
    **FULL_ROPE,
    "heads": "{{alike(of = num_attention_heads_per_layer, to = num_attention_heads)}}",
    "let g": "x | linear(heads) | softplus",
    "out": "o | gate(g) | merge | linear{{attention_bias? (bias = true)}}",
}
KOLIBRI = """
ffn by_logit(experts, top, expert, shared) : moe(experts, top, expert = expert, shared = shared,
    router = sigmoid, balance = none) {
  param bias[experts] = 0  # it only chooses
  let chosen = route + bias | largest(top)
  let w      = score * chosen{{norm_topk_prob?  / sum(score * chosen)}}
}
"""
M3: Settings = {
    **ATTENTION,
    "q": "x | linear | split | unit_rms",
    "k": "x | linear | split | unit_rms",
    "position": "{{rope(dims = rotary_dim)}}",
}
M3_TURNED = "unit_rms | {{rope(dims = rotary_dim)}}"
M3_SPARSE: Settings = {
    **M3,
    "let asked": "x | linear({{same(of = num_key_value_heads, to = index_n_heads)}} * "
    "{{index_head_dim}}) | split({{index_n_heads}}) | " + M3_TURNED,
    "let known": "x | linear({{index_head_dim}}) | " + M3_TURNED,
    "select": "top({{index_topk_blocks}}, "
    "dot(asked[h // {{ratio(of = num_attention_heads, by = index_n_heads)}}, i], known[j]), "
    "size = {{index_block_size}}, per = kv_head, within = max, "
    "always = blocks({{index_block_size}}), counted = true)",
}
INDEX_TURN = "{{rope(dims = qk_rope_head_dim, size = index_head_dim)}}"
V32_BLOCK: Settings = {
    **LATENT_BLOCK,
    "let a": "x | linear({{q_lora_rank}}{{attention_bias? , bias = true}}) | rms_norm",
    "q": "a | linear | split | "
    "{{rope(size = qk_rope_head_dim, style = interleaved, behind = yes)}}",
    "let kr": "x | linear({{qk_rope_head_dim}}{{attention_bias? , bias = true}}) | "
    "{{rope(size = qk_rope_head_dim, style = interleaved)}} | repeat(heads)",
    "let asked": "a | linear({{index_n_heads}} * {{index_head_dim}}) | split({{index_n_heads}}) | "
    + INDEX_TURN,
    "let known": "x | linear({{index_head_dim}}) | layer_norm(eps = 1e-6) | " + INDEX_TURN,
    "let w": "x | linear({{index_n_heads}})",
    "select": "top({{index_topk}}, sum_streams(w[i] * relu(dot(asked[i], known[j]))), per = layer)",
}
# the same of a layer of theirs that is two of ours, whose only part is `part`
OF_LANES = "".join(
    line.replace("layers.{i}.attn.", "layers.{2i}.part.").replace(
        "-> layers.{i}.ffn.", "-> layers.{2i+1}.part."
    )
    + "\n"
    for line in (INDEXER + LATENT + SINKS + MOE + DECODER).split("\n")
)
LANES = "".join(
    f"model.layers.{{i}}.{theirs}_hc.{name} -> layers.{ours}.(read|write)_logits.{own}\n"
    for theirs, ours in (("attn", "{2i}"), ("ffn", "{2i+1}"))
    for name, own in (("fn", "o_proj.weight"), ("base", "base"), ("scale", "scale_"))
)
BEAM: Settings = {
    **ATTENTION,
    **PER_HEAD,
    "param gate_bias[heads, 1]": "0",
    "let gate": "(x | linear(heads * head_dim) | split) + gate_bias | sigmoid",
    "position": "",
    "out": "o | gate(gate) | merge | linear{{attention_bias? (bias = true)}}",
}
RECENT: dict[str, Kind | tuple[Kind, ...]] = {
    "ministral3": MISTRAL.but(
        "Ministral 3; Mistral AI 2025: queries grow with the logarithm of their place",
        block={
            "q": "(x | linear | split) * (1 + {{rope_parameters.llama_4_scaling_beta}} * "
            "log(1 + floor(index / {{rope_parameters.original_max_position_embeddings}})))",
            "position": "{{rope(more = llama_4_scaling_beta)}}",
        },
    ),
    "mimo_v2_flash": LLAMA.but(
        "MiMo-V2-Flash; Xiaomi 2025: local layers with sinks and twice as many heads of keys",
        fixed={"mlp_bias": False, **CHOICE},
        mixers=TYPES,
        blocks=by_type(
            MIMO,
            kv_heads="2 * {{num_key_value_heads}}",
            position="{{rope(of = sliding_attention)}}",
            normalize="sink",
        ),
        parts=PARTS,
        ffns={"sparse": "{{choosing(times = )}}"},
        weights=SINKS + MOE,
    ),
    "laguna": LLAMA.but(
        "Laguna; Poolside 2026: a gate for each head, a bias that only chooses experts",
        fixed={"mlp_bias": False, "norm_topk_prob": True, "choice_eps": 0},
        names={"routed_scaling_factor": "moe_routed_scaling_factor"},
        needs={
            "gating": True,
            "moe_router_logit_softcapping": 0.0,
            "moe_apply_router_weight_on_input": False,
        },
        mixers=TYPES,
        blocks=by_type(LAGUNA, position="{{rope(of = sliding_attention)}}"),
        parts=PARTS,
        ffns={
            "sparse": "{{choosing(experts = num_experts, groups = , "
            "shared = shared_expert_intermediate_size)}}"
        },
        weights=MOE,
    ),
    "flint": QWEN3.but(
        "Flint; 2026: sinks; no positions in layers that see all; experts scored by a sigmoid",
        blocks=by_type(
            {**ATTENTION, **PER_HEAD, "position": "", "normalize": "sink"}, position="{{rope()}}"
        ),
        parts="stepped()",
        ffns={
            "sparse": "{{moe(norm = norm_topk_prob, router = sigmoid, "
            "shared = shared_expert_intermediate_size)}}"
        },
        weights=SINKS + MOE,
    ),
    "kolibri1": PLAIN.but(
        "Kolibri; 2026: norms on both sides of each part; no positions in layers that see all",
        mixers=TYPES,
        blocks=by_type(
            {**ATTENTION, **PER_HEAD, "position": "{{sliding_window! {{rope()}}}}"},
            position="{{rope()}}",
        ),
        model={"layer": "sandwich"},
        parts=SPARSE,
        ffns={
            "sparse": "by_logit(experts = {{num_local_experts}}, top = {{num_experts_per_tok}}, "
            "expert = {{gated(hidden = moe_intermediate_size)}}, "
            "shared = {{gated(hidden = shared_expert_intermediate_size)}})"
        },
        defs={"by_logit": KOLIBRI},
        weights=BOTH + MOE,
    ),
    "deepseek_v32": V3.but(
        "DeepSeek-V3.2; DeepSeek-AI 2025: DeepSeek-V3 that reads tokens chosen by an indexer",
        needs={"mlp_bias": False},
        mixers="listed(of = layer_types)",
        blocks={"indexed_attention": V32_BLOCK},
        parts=PARTS,
        weights=INDEXER,
    ),
    "minimax_m3_vl_text": LLAMA.but(
        "MiniMax-M3; MiniMax 2026: blocks of keys chosen by their best token",
        fixed={
            "attention_bias": False,
            "norm_topk_prob": True,
            "choice_eps": 0,
        },
        needs={"hidden_act": "silu", "index_local_blocks": 1},
        mixers=TYPES,
        blocks={"full_attention": M3, "minimax_m3_sparse": M3_SPARSE},
        parts=PARTS,
        ffns={
            "dense": "bounded(hidden = {{dense_intermediate_size}})",
            "sparse": "biased(experts = {{num_local_experts}}, top = {{num_experts_per_tok}}, "
            "expert = bounded({{intermediate_size}}), "
            "shared = bounded({{shared_intermediate_size}}))",
        },
        model={"norm": "unit_rms"},
        defs={
            "bounded": """
ffn bounded(hidden) {
  let gate = x | linear(hidden) | min({{swiglu_limit}})
  let up   = x | linear(hidden) | clip(-{{swiglu_limit}}, {{swiglu_limit}})
  let down = (up + 1) * gate * sigmoid({{swiglu_alpha}} * gate) | linear
  out = down
}
"""
        },
        weights="""
model.layers.{i}.self_attn.indexer.q_proj.weight -> layers.{i}.attn.asked_proj.weight
model.layers.{i}.self_attn.indexer.k_proj.weight -> layers.{i}.attn.known_proj.weight
model.layers.{i}.self_attn.indexer.q_norm.weight -> layers.{i}.attn.asked_unit_rms.w
model.layers.{i}.self_attn.indexer.k_norm.weight -> layers.{i}.attn.known_unit_rms.w
model.layers.{i}.mlp.gate_up_proj.weight -> layers.{i}.ffn.(gate|up)_proj.weight
model.layers.{i}.mlp.shared_experts.gate_up_proj.weight
    -> layers.{i}.ffn.shared.(gate|up)_proj.weight
"""
        + UNIT
        + UNIT_BEFORE
        + MOE,
    ),
    "beam": LLAMA.but(
        "Beam; 2026: what parts add scaled by the depth, gated attention; queries of layers "
        "without positions grow with their place",
        fixed={"mlp_bias": False, **CHOICE},
        needs={"rope_parameters.full_attention": None},
        mixers=TYPES,
        blocks={
            "full_attention": {
                **BEAM,
                "q": "(x | linear{{attention_bias? (bias = true)}} | split | {{rms()}}) * "
                "(1 + (index + 1) / 2048) ** 0.1",
            },
            "sliding_attention": {
                **BEAM,
                "position": "{{rope(of = sliding_attention)}}",
                "mask": "causal and window({{sliding_window}})",
            },
        },
        parts=PARTS,
        ffns={"sparse": "{{choosing(experts = num_experts, times = )}}"},
        model={"layer": "deeper", "head": "x | norm | linear(vocab){{capped()}}"},
        defs={
            "deeper": """
layer deeper(attn, ffn) {  # what comes in and what is added keep their sum's size
  let a = 2 * layer + 2
  let y = ((a - 1) / a) ** 0.5 * x + a ** -0.5 * (x | norm | attn | norm)
  out = (a / (a + 1)) ** 0.5 * y + (a + 1) ** -0.5 * (y | norm | ffn | norm)
}
""".replace("  let a = 2 * layer + 2\n", "")
            .replace("(a + 1)", "(2 * layer + 3)")
            .replace("(a - 1)", "(2 * layer + 1)")
            .replace("(a /", "((2 * layer + 2) /")
            .replace("/ a)", "/ (2 * layer + 2))")
            .replace(" a **", " (2 * layer + 2) **")
        },
        weights="""
model.layers.{i}.self_attn.gate_bias -> layers.{i}.attn.gate_bias
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
"""
        + AFTER
        + MOE,
    ),
    "axk1": V3.but(
        "A.X K1; SK Telecom 2026: DeepSeek-V3 with a norm after its experts",
        parts=PARTS,
        ffns={
            "sparse": "normed(experts = {{n_routed_experts}}, top = {{num_experts_per_tok}}, "
            "groups = {{n_group}}, open = {{topk_group}}, "
            "expert = {{gated(hidden = moe_intermediate_size)}}, "
            "shared = {{gated(hidden = moe_intermediate_size, times = n_shared_experts)}})"
        },
        defs={
            "normed": """
ffn normed(experts, top, groups, open, expert, shared) : grouped(experts, top, groups, open,
    expert, shared) {
  out = (x | mixture(expert, w)) + (x | shared) | {{rms()}}
}
"""
        },
        weights="""
model.layers.{i}.mlp.post_mlp_layernorm.weight -> layers.{i}.ffn.o_norm.weight
""",
    ),
    "axk2": V3.but(
        "A.X K2; SK Telecom 2026: latent attention that reads chosen tokens, gated; gated norms",
        fixed={"rope_interleave": True},
        mixers="listed(of = layer_types)",
        around={"dense": "half_gated"},
        blocks={
            "indexed_attention": {
                **V32_BLOCK,
                "let e": "x | linear({{q_lora_rank}}{{attention_bias? , bias = true}})",
                "let a": "e | rms_norm",
                "let both": "a | concat(e)",
                "let gate": "both | linear(heads * value_dim) | sigmoid",
                "q": "both | linear(heads * head_dim) | split | "
                "{{rope(size = qk_rope_head_dim, style = interleaved, behind = yes)}}",
                "out": "o | merge | gate(gate) | linear{{attention_bias? (bias = true)}}",
            }
        },
        parts=PARTS,
        model={"layer": "gated_pre"},
        defs={
            "gated_norm": """
stage gated_norm {
  let y = x | {{rms()}}
  y * (y | linear({{gated_norm_rank}}) | silu | linear(features) | sigmoid)
}
""",
            "gated_pre": """
layer gated_pre(attn, ffn) {
  let y = x + (x | gated_norm | attn)
  out = y + (y | gated_norm | ffn)
}
""",
            "half_gated": """
layer half_gated(attn, ffn) {
  let y = x + (x | gated_norm | attn)
  out = y + (y | norm | ffn)
}
""",
        },
        weights="""
model.layers.{i}.self_attn.q_a_proj.{t} -> layers.{i}.attn.e_proj.{t}
model.layers.{i}.self_attn.q_gate_proj.{t}
    -> layers.{i}.attn.(q|gate)_proj.{t} in num_attention_heads
model.layers.{i}.input_layernorm.norm.weight -> layers.{i}.y_gated_norm.y_norm.weight
model.layers.{i}.input_layernorm.mlp.fc1.weight -> layers.{i}.y_gated_norm.o_proj_0.weight
model.layers.{i}.input_layernorm.mlp.fc2.weight -> layers.{i}.y_gated_norm.o_proj_1.weight
model.layers.{i}.post_attention_layernorm.norm.weight -> layers.{i}.o_gated_norm.y_norm.weight
model.layers.{i}.post_attention_layernorm.mlp.fc1.weight
    -> layers.{i}.o_gated_norm.o_proj_0.weight
model.layers.{i}.post_attention_layernorm.mlp.fc2.weight
    -> layers.{i}.o_gated_norm.o_proj_1.weight
"""
        + INDEXER,
    ),
    "hy_v4": V3.but(
        "Hy4; Tencent 2026: latent attention, gated, with sinks, that reads chosen tokens; layers "
        "above use the same choice; lanes that keep to themselves",
        fixed={"rope_interleave": False},
        needs={"attention_bias": False, "n_group": 1, "topk_group": 1},
        mixers="halves(of = indexer_types, then = mlp_layer_types, last = close)",
        parts="",
        around=dict.fromkeys(("full", "shared", "dense", "sparse", "close"), ""),
        blocks={
            "full": "lane(choosing)",
            "shared": "lane(sharing)",
            "dense": "lane({{gated()}})",
            "sparse": "lane(mixed(experts = {{n_routed_experts}}, top = {{num_experts_per_tok}}))",
            "close": "close",
        },
        ffns={"none": "none"},
        model={"lanes": "{{hc_mult}}", "head": "x | pick(0) | norm | linear(vocab)"},
        defs={
            "reading": """
block reading {
  heads     = {{same(of = num_attention_heads, to = num_key_value_heads)}}
  head_dim  = {{qk_nope_head_dim}} + {{qk_rope_head_dim}}
  value_dim = {{v_head_dim}}
  let a    = x | linear({{q_lora_rank}}) | rms_norm
  let c    = x | linear({{kv_lora_rank}}) | rms_norm
  let kr   = x | linear({{qk_rope_head_dim}}) | {{rope(size = qk_rope_head_dim)}} | repeat(heads)
  let gate = x | linear(heads * value_dim) | sigmoid
  q         = a | linear | split | {{rope(size = qk_rope_head_dim, behind = yes)}}
  k         = c | linear(heads * {{qk_nope_head_dim}}) | split | concat(kr)
  v         = c | linear | split
  mask      = causal
  normalize = sink
  out       = o | merge | gate(gate) | linear
}
""",
            "choosing": """
block choosing : reading {
  let asked = a | linear({{index_n_heads}} * {{index_head_dim}}) | split({{index_n_heads}})
    | {{rope(size = index_head_dim, dims = qk_rope_head_dim, behind = yes)}}
  let known = x | linear({{index_head_dim}}) | layer_norm(eps = 1e-6)
    | {{rope(size = index_head_dim, dims = qk_rope_head_dim, behind = yes)}}
  let w     = x | linear({{index_n_heads}})
  select = top({{index_topk}}, sum_streams(w[i] * relu(dot(asked[i], known[j]))), per = layer)
}
""",
            "sharing": """
block sharing : reading {
  select = at(layer - 2).select
}
""",
            "logits": """
stage logits(count) {
  param scale_ = 1
  param base[count] = 0
  scale_ * (x | linear(count)) + base
}
""",
            "lane": """
layer lane(part) {
  let w     = x | merge | rms_norm({{eps()}}scale = false)
  let read  = sigmoid(w | logits(lanes)) + {{hc_eps}}
  let write = {{hc_magnitude}} * sigmoid(w | logits(lanes)) + {{hc_eps}}
  let y     = read * x | sum_heads | norm | part
  out = x + write * (y | repeat(lanes))
}
""",
            "close": """
layer close {
  let read = sigmoid(x | merge | rms_norm({{eps()}}scale = false) | logits(lanes)) + {{hc_eps}}
  out = read * x | sum_heads | repeat(lanes)
}
""",
            "cut": """
ffn cut(hidden) : swiglu(hidden = hidden) {
  let gate = x | linear(hidden) | min({{swiglu_limit}})
  let up   = x | linear(hidden) | clip(-{{swiglu_limit}}, {{swiglu_limit}})
}
""",
            "mixed": """
ffn mixed(experts, top) : biased(experts, top, cut({{moe_intermediate_size}}),
    {{gated(hidden = moe_intermediate_size, times = n_shared_experts)}}) {}
""",
        },
        weights="".join(
            f"""
model.layers.{{i}}.input_layernorm.weight -> layers.{{2i}}.part_norm.weight
model.layers.{{i}}.post_attention_layernorm.weight -> layers.{{2i+1}}.part_norm.weight
model.hc_head.hc_{name} -> layers.{{last}}.read_logits.{own}
"""
            for name, own in (("fn", "o_proj.weight"), ("base", "base"), ("scale", "scale_"))
        )
        + LANES
        + OF_LANES,
    ),
}
