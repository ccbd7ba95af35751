"""Llama, and those that change one thing of it."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import AFTER, BEFORE, BOTH, DECODER, FUSED, UP_DOWN, XIELU

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
PLAIN = LLAMA.but("", fixed=NO_BIAS)
MISTRAL = PLAIN.but("Mistral 7B; Jiang et al. 2023", block={"mask": "{{mask()}}"})
TYPED = PLAIN.but("", mixers=TYPES, blocks=by_type(ATTENTION))
QWEN3 = TYPED.but(
    "Qwen3; Yang et al. 2025: queries and keys normed head by head",
    fixed={"attention_bias": None},
    blocks=by_type({**ATTENTION, **PER_HEAD}),
)
PARTIAL = {"names": {"rms_norm_eps": "layer_norm_eps"}}
LLAMA_LIKE: dict[str, Kind] = {
    "llama": LLAMA,
    "cwm": LLAMA.but(
        "Code World Model; Meta 2025: a window in most layers",
        fixed={"attention_bias": False},
        mixers=TYPES,
        blocks=by_type(ATTENTION),
    ),
    "mistral": MISTRAL,
    "ministral": TYPED.but("Ministral; Mistral AI 2024: a window in some layers"),
    "phi3": MISTRAL.but(
        "Phi-3; Abdin et al. 2024: one matrix for q, k and v, one for gate and up",
        weights=FUSED,
    ),
    "qwen2": TYPED.but(
        "Qwen2; Yang et al. 2024: biases on q, k and v alone",
        fixed={"attention_bias": True},
        block=PLAIN_OUT,
    ),
    "qwen3": QWEN3,
    "seed_oss": LLAMA.but(
        "Seed-OSS; ByteDance 2025: biases on q, k and v",
        block={"out": "o | merge | linear{{attention_out_bias? (bias = true)}}"},
    ),
    "smollm3": LLAMA.but(
        "SmolLM3; Bakouch et al. 2025: some layers without positions",
        mixers="chosen(of = no_rope_layers, yes = turned, no = still)",
        blocks={"turned": ATTENTION, "still": {**ATTENTION, "position": ""}},
        needs={"use_sliding_window": False},
    ),
    "helium": LLAMA.but(
        "Helium; Kyutai 2025: neighbours turned",
        block={"position": "{{rope(style = interleaved)}}", **PLAIN_OUT},
    ),
    "ernie4_5": LLAMA.but(
        "ERNIE 4.5; Baidu 2025: neighbours turned",
        names={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        block={"position": "{{rope(style = interleaved)}}"},
    ),
    "arcee": LLAMA.but(
        "AFM; Arcee 2025: relu squared, no gate", ffns={"dense": "{{mlp(bias = mlp_bias)}}"}
    ),
    "glm": LLAMA.but(
        "GLM-4; Zhipu 2024: neighbours turned in half of the features",
        fixed={"mlp_bias": False},
        block={"position": "{{rope(style = interleaved)}}", **PLAIN_OUT},
        weights=FUSED,
    ),
    "glm4": LLAMA.but(
        "GLM-4 0414; Zhipu 2025: norms on both sides of each part",
        fixed={"mlp_bias": False},
        block={"position": "{{rope(style = interleaved)}}", **PLAIN_OUT},
        model={"layer": "sandwich"},
        weights=FUSED + BOTH,
    ),
    "apertus": LLAMA.but(
        "Apertus; Swiss AI 2025: an activation that learns two numbers; normed queries and keys",
        fixed={"mlp_bias": False},
        block=PER_HEAD,
        ffns={"dense": "{{mlp()}}"},
        weights=XIELU,
    ),
    "nanochat": LLAMA.but(
        "nanochat; Karpathy 2025: no norm learns anything; queries and keys are normed after they "
        "are turned, the other way round",
        fixed={"mlp_bias": False},
        block={
            "q": "x | linear{{attention_bias? (bias = true)}} | split | "
            "{{rope(inverse = true)}} | plain",
            "k": "x | linear{{attention_bias? (bias = true)}} | split | "
            "{{rope(inverse = true)}} | plain",
            "position": "",
        },
        ffns={"dense": "{{mlp()}}"},
        model={
            "norm": "plain",
            "embed": "x | plain",
            "head": "x | norm | linear(vocab){{capped()}}",
        },
        weights=UP_DOWN,
    ),
    "olmo": PLAIN.but(
        "OLMo; Groeneveld et al. 2024: norms that learn nothing; what q, k and v hold is clipped",
        fixed={"attention_bias": None},
        block=dict.fromkeys("qkv", "x | linear{{attention_bias? (bias = true)}}{{clip()}} | split"),
        model={"norm": "plain_layer_norm"},
    ),
    "olmo2": PLAIN.but(
        "OLMo 2; OLMo Team 2024: norms on what the parts give, and on queries and keys",
        fixed={"attention_bias": None},
        block=WHOLE,
        model={"layer": "inner"},
        weights=AFTER,
    ),
    "olmo3": TYPED.but(
        "OLMo 3; OLMo Team 2025: as OLMo 2, with a window in most layers",
        fixed={"attention_bias": None},
        blocks=by_type(
            {**ATTENTION, **WHOLE, "position": "{{rope(of = full_attention)}}"},
            position="{{rope(of = sliding_attention)}}",
        ),
        model={"layer": "inner"},
        weights=AFTER,
    ),
    "exaone4": TYPED.but(
        "EXAONE 4; LG 2025: norms on what the parts give; no positions in layers that see all",
        blocks={
            **by_type(
                {**ATTENTION, **PER_HEAD, "position": "{{sliding_window! {{rope()}}}}"},
                position="{{rope()}}",
            ),
        },
        model={"layer": "inner"},
        weights=AFTER,
    ),
    "bitnet": LLAMA.but(
        "BitNet; Ma et al. 2025: relu squared; norms before the last map of each part",
        fixed={"mlp_bias": False},
        block={"out": "o | merge | {{rms()}} | linear{{attention_bias? (bias = true)}}"},
        ffns={"dense": "subnormed({{activation()}}, hidden = {{intermediate_size}})"},
        defs={
            "subnormed": """
ffn subnormed(act, hidden) {
  let gate  = x | linear(hidden)
  let up    = x | linear(hidden)
  let inner = (gate | act) * up | {{rms()}}
  let down  = inner | linear
  out = down
}
"""
        },
        weights="""
model.layers.{i}.self_attn.attn_sub_norm.weight -> layers.{i}.attn.o_norm.weight
model.layers.{i}.mlp.ffn_sub_norm.weight -> layers.{i}.ffn.inner_norm.weight
""",
    ),
    "hunyuan_v1_dense": LLAMA.but(
        "Hunyuan; Tencent 2025: queries and keys normed after they are turned",
        fixed={"mlp_bias": False},
        block={
            "q": "x | linear{{attention_bias? (bias = true)}} | split | {{rope()}} | {{rms()}}",
            "k": "x | linear{{attention_bias? (bias = true)}} | split | {{rope()}} | {{rms()}}",
            "position": "",
        },
        weights="""
model.layers.{i}.self_attn.query_layernorm.weight -> layers.{i}.attn.q_norm.weight
model.layers.{i}.self_attn.key_layernorm.weight -> layers.{i}.attn.k_norm.weight
""",
    ),
    "granite": LLAMA.but(
        "Granite 3; IBM 2024: a factor at each end, on what parts add and on logits of attention",
        block={"scale": "{{direct(of = attention_multiplier)}}"},
        model={
            "layer": "damped",
            "embed": "x{{scaled(of = embedding_multiplier)}}",
            "head": "x | norm | linear(vocab){{scaled(of = logits_scaling, over = one)}}",
        },
    ),
    "jais2": LLAMA.but(
        "Jais 2; Inception 2025: layer norms, relu squared, biases",
        ffns={"dense": "{{mlp(bias = mlp_bias)}}"},
        model={"norm": "{{layer_norm()}}"},
    ),
    "diffllama": LLAMA.but(
        "DiffLlama; Ye et al. 2024: the difference of two maps of attention",
        fixed={"mlp_bias": False},
        block={
            "heads": "{{num_attention_heads}} / 2",
            "kv_heads": "{{num_key_value_heads}} / 2",
            "head_dim": "{{head_dim()}}",
            "value_dim": "2 * {{head_dim()}}",
            "param lambda_q1[head_dim]": "normal(0.1)",
            "param lambda_k1[head_dim]": "normal(0.1)",
            "param lambda_q2[head_dim]": "normal(0.1)",
            "param lambda_k2[head_dim]": "normal(0.1)",
            "let lower": "x | linear({{num_key_value_heads}} / 2 * head_dim"
            "{{attention_bias? , bias = true}}) | split({{num_key_value_heads}} / 2)",
            "let upper": "x | linear({{num_key_value_heads}} / 2 * head_dim"
            "{{attention_bias? , bias = true}}) | split({{num_key_value_heads}} / 2)",
            "q": "",
            "k": "",
            "v": "lower | concat(upper)",
            "branch one": "{ q = x | linear{{attention_bias? (bias = true)}} | split; "
            "k = x | linear{{attention_bias? (bias = true)}} | split }",
            "branch two": "{ q = x | linear{{attention_bias? (bias = true)}} | split; "
            "k = x | linear{{attention_bias? (bias = true)}} | split }",
            "let least": "exp(dot(lambda_q1, lambda_k1)) - exp(dot(lambda_q2, lambda_k2)) + "
            "0.8 - 0.6 * exp(-0.3 * layer)",
            "let rest": "one - least * two",
            "out": "rest | rms_norm({{eps()}}scale = false) | scale(0.2 + 0.6 * exp(-0.3 * layer)) "
            "| merge | linear{{attention_bias? (bias = true)}}",
        },
        weights="""
model.layers.{i}.self_attn.q_proj.{t} -> layers.{i}.attn.(one|two)_q_proj.{t}
model.layers.{i}.self_attn.k_proj.{t} -> layers.{i}.attn.(one|two)_k_proj.{t}
model.layers.{i}.self_attn.v_proj.{t} -> layers.{i}.attn.(lower|upper)_proj.{t}
model.layers.{i}.self_attn.lambda_{t} -> layers.{i}.attn.lambda_{t}
""",
    ),
}
