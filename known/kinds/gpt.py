"""GPT-2 and its time: layer norms, biases, ALiBi, both parts beside each other."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import BEFORE, ONE_NORM, PHI
from .llama import ATTENTION, LLAMA, PLAIN_OUT, TYPES, by_type

BIASED: Settings = {
    "heads": "{{num_attention_heads}}",
    "q": "x | linear(bias = true) | split",
    "k": "x | linear(bias = true) | split",
    "v": "x | linear(bias = true) | split",
    "mask": "causal",
    "out": "o | merge | linear(bias = true)",
}
BARE: Settings = {"heads": "{{num_attention_heads}}", "mask": "causal"}
LEARNED = "learned({{max_position_embeddings}})"
EPSILON = {"layer_norm_eps": "layer_norm_epsilon"}
ALIBI = "{{power_of_two(of = num_attention_heads)}}alibi"
GPT2 = Kind(
    about="GPT-2; Radford et al. 2019: learned positions, biases; matrices stored transposed",
    blocks={"attention": BIASED},
    ffns={"dense": "{{mlp(act = activation_function, hidden = n_inner, bias = mlp_bias)}}"},
    fixed={"mlp_bias": True},
    names=EPSILON,
    needs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    model={
        "vocab": "{{vocab_size}}",
        "width": "{{hidden_size}}",
        "norm": "{{layer_norm()}}",
        "embed_position": LEARNED,
        "tie": "{{tie_word_embeddings}}",
    },
    weights="""
transformer.wte.weight -> embed_tokens.weight
transformer.wpe.weight -> embed_positions.weight
transformer.ln_f.{t} -> norm.{t}
lm_head.{t} -> lm_head.{t}
transformer.h.{i}.attn.bias -> - a causal mask
transformer.h.{i}.attn.masked_bias -> - a causal mask
transformer.h.{i}.ln_1.{t} -> layers.{i}.attn_norm.{t}
transformer.h.{i}.ln_1.{t} -> layers.{i}.y_norm.{t}
transformer.h.{i}.ln_2.{t} -> layers.{i}.ffn_norm.{t}
transformer.h.{i}.attn.c_attn.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} across
transformer.h.{i}.attn.c_proj.{t} -> layers.{i}.attn.o_proj.{t} across
transformer.h.{i}.attn.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
transformer.h.{i}.attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
transformer.h.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t} across
transformer.h.{i}.mlp.c_proj.{t} -> layers.{i}.ffn.down_proj.{t} across
transformer.h.{i}.mlp.fc_in.{t} -> layers.{i}.ffn.up_proj.{t}
transformer.h.{i}.mlp.fc_out.{t} -> layers.{i}.ffn.down_proj.{t}
""",
)
BIGCODE = GPT2.but(
    "GPTBigCode; Li et al. 2023: GPT-2 with one head of keys for all",
    needs={"multi_query": True},
    block={"kv_heads": "1"},
    weights="""
transformer.h.{i}.attn.c_attn.{t} -> layers.{i}.attn.(q|k|v)_proj.{t}
transformer.h.{i}.attn.c_proj.{t} -> layers.{i}.attn.o_proj.{t}
transformer.h.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t}
transformer.h.{i}.mlp.c_proj.{t} -> layers.{i}.ffn.down_proj.{t}
""",
)
TURNED = "rope(theta = 10000, {{rotary_dim? dims = {{rotary_dim}}, }}style = interleaved)"
GPTJ = GPT2.but(
    "GPT-J; Wang & Komatsuzaki 2021: both parts read the same norm; neighbours turned",
    blocks={"attention": {**BARE, "position": TURNED}},
    model={
        "embed_position": "",
        "layer": "parallel",
        "head": "x | norm | linear(vocab, bias = true)",
    },
)
NEOX = Kind(
    about="GPT-NeoX; Black et al. 2022: both parts beside each other, each with a norm of its own",
    blocks={
        "attention": {
            **ATTENTION,
            "kv_heads": "",
            "head_dim": "",
        }
    },
    ffns={"dense": "{{mlp(bias = mlp_bias)}}"},
    fixed={"mlp_bias": True},
    model={
        "vocab": "{{vocab_size}}",
        "width": "{{hidden_size}}",
        "layer": "{{use_parallel_residual? parallel_normed}}",
        "norm": "{{layer_norm()}}",
        "tie": "{{tie_word_embeddings}}",
    },
    weights="""
gpt_neox.embed_in.weight -> embed_tokens.weight
gpt_neox.final_layer_norm.{t} -> norm.{t}
lm_head.weight -> lm_head.weight
embed_out.weight -> lm_head.weight
{any}rotary_emb.{t} -> - it follows from the configuration
gpt_neox.layers.{i}.attention.bias -> - a causal mask
gpt_neox.layers.{i}.attention.masked_bias -> - a causal mask
gpt_neox.layers.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
gpt_neox.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
gpt_neox.layers.{i}.attention.query_key_value.{t}
    -> layers.{i}.attn.(q|k|v)_proj.{t} in num_attention_heads
gpt_neox.layers.{i}.attention.dense.{t} -> layers.{i}.attn.o_proj.{t}
gpt_neox.layers.{i}.mlp.dense_h_to_4h.{t} -> layers.{i}.ffn.up_proj.{t}
gpt_neox.layers.{i}.mlp.dense_4h_to_h.{t} -> layers.{i}.ffn.down_proj.{t}
""",
)
BLOOM = Kind(
    about="BLOOM; Le Scao et al. 2022: ALiBi, a norm after the embedding",
    blocks={"attention": {**BIASED, "position": ALIBI}},
    ffns={"dense": "mlp(near_gelu, hidden = 4 * {{hidden_size}}, bias = true)"},
    needs={"apply_residual_connection_post_layernorm": False},
    names=EPSILON,
    model={
        "vocab": "{{vocab_size}}",
        "width": "{{hidden_size}}",
        "norm": "{{layer_norm()}}",
        "embed": "x | {{layer_norm()}}",
        "tie": "{{tie_word_embeddings}}",
    },
    weights="""
transformer.word_embeddings.weight -> embed_tokens.weight
transformer.word_embeddings_layernorm.{t} -> embed_norm.{t}
transformer.ln_f.{t} -> norm.{t}
lm_head.weight -> lm_head.weight
{any}rotary_emb.{t} -> - it follows from the configuration
transformer.h.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
transformer.h.{i}.input_layernorm.{t} -> layers.{i}.y_norm.{t}
transformer.h.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
transformer.h.{i}.ln_attn.{t} -> layers.{i}.attn_norm.{t}
transformer.h.{i}.ln_mlp.{t} -> layers.{i}.ffn_norm.{t}
transformer.h.{i}.self_attention.query_key_value.{t}
    -> layers.{i}.attn.(q|k|v)_proj.{t} in num_attention_heads
transformer.h.{i}.self_attention.dense.{t} -> layers.{i}.attn.o_proj.{t}
transformer.h.{i}.mlp.dense_h_to_4h.{t} -> layers.{i}.ffn.up_proj.{t}
transformer.h.{i}.mlp.dense_4h_to_h.{t} -> layers.{i}.ffn.down_proj.{t}
""",
)
FALCON = BLOOM.but(
    "Falcon; Almazrouei et al. 2023",
    names={"attention_bias": "bias"},
    blocks={
        "attention": {
            **ATTENTION,
            "kv_heads": "",
            "head_dim": "",
            "const slope[heads]": "{{alibi? {{power_of_two(of = num_attention_heads)}}"
            "2 ** (-8 * (h + 1) / heads)}}",
            "position": "{{alibi! {{rope()}}}}",
            "score": "{{alibi? s - head_dim ** -0.5 * slope[h] * (i - j)}}",
        }
    },
    ffns={"dense": "{{mlp(act = activation, hidden = ffn_hidden_size, bias = bias)}}"},
    needs={},
    model={"embed": ""},
)
GROUPED = """
transformer.h.{i}.self_attention.query_key_value.{t}
    -> layers.{i}.attn.(q|k|v)_proj.{t} in num_kv_heads
"""
ONE_HEAD = """
transformer.h.{i}.self_attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t}
"""
FALCONS = (
    FALCON.but(
        "Falcon 40B; Almazrouei et al. 2023: groups of heads, two norms beside each other",
        needs={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        block={"kv_heads": "{{kv_heads(of = num_kv_heads)}}"},
        model={"layer": "parallel_normed"},
        weights=GROUPED,
    ),
    FALCON.but(
        "Falcon 2; Malartic et al. 2024: groups of heads, one norm",
        needs={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        block={"kv_heads": "{{kv_heads(of = num_kv_heads)}}"},
        model={"layer": "parallel"},
        weights=GROUPED,
    ),
    FALCON.but(
        "Falcon 7B; Almazrouei et al. 2023: one head of keys for all",
        needs={"new_decoder_architecture": False, "multi_query": True},
        block={"kv_heads": "1"},
        model={"layer": "{{parallel_attn? parallel}}"},
        weights=ONE_HEAD,
    ),
    FALCON.but(
        "Falcon RW; Penedo et al. 2023: all heads have keys of their own",
        needs={"new_decoder_architecture": False, "multi_query": False},
        model={"layer": "{{parallel_attn? parallel}}"},
    ),
)
PARALLEL = """
model.norm.weight -> norm.o_norm.weight
model.layers.{i}.input_layernorm.weight -> layers.{i}.y_norm.o_norm.weight
"""
PER_HEAD_NORM: Settings = {
    "param q_weight[heads, head_dim]": "{{use_qk_norm? 1}}",
    "param k_weight[kv_heads, head_dim]": "{{use_qk_norm? 1}}",
    "q": "{{use_qk_norm! x | linear{{attention_bias? (bias = true)}} | split}}"
    "{{use_qk_norm? (x | linear(heads * head_dim{{attention_bias? , bias = true}}) | split | "
    "plain_layer_norm(eps = {{layer_norm_eps}})) * q_weight}}",
    "k": "{{use_qk_norm! x | linear{{attention_bias? (bias = true)}} | split}}"
    "{{use_qk_norm? (x | linear(kv_heads * head_dim{{attention_bias? , bias = true}}) | "
    "split(kv_heads) | plain_layer_norm(eps = {{layer_norm_eps}})) * k_weight}}",
}
COHERE = LLAMA.but(
    "Command R; Cohere 2024: both parts beside each other, a norm without a bias, scaled logits",
    fixed={"mlp_bias": False},
    block={**PER_HEAD_NORM, "position": "{{rope(style = interleaved)}}"},
    model={
        "layer": "parallel",
        "norm": "{{centred()}}",
        "head": "x | norm | linear(vocab){{scaled(of = logit_scale)}}",
    },
    weights=PARALLEL
    + """
model.layers.{i}.self_attn.{p}_norm.weight -> layers.{i}.attn.{p}_weight
""",
)
PHI_KIND = LLAMA.but(
    "Phi-2; Javaheripi & Bubeck 2023: both parts read the same norm, biases everywhere",
    fixed={"attention_bias": True, "mlp_bias": True},
    block=dict.fromkeys(
        "qk", "x | linear(bias = true) | split{{qk_layernorm?  | {{layer_norm()}}}}"
    ),
    ffns={"dense": "{{mlp(bias = mlp_bias)}}"},
    model={
        "layer": "parallel",
        "norm": "{{layer_norm()}}",
        "head": "x | norm | linear(vocab, bias = true)",
    },
    weights=PHI,
)
GPT_LIKE: dict[str, Kind | tuple[Kind, ...]] = {
    "gpt2": GPT2,
    "gpt_bigcode": (
        BIGCODE,
        BIGCODE.but(
            "GPTBigCode; Li et al. 2023",
            needs={"multi_query": False},
            block={"kv_heads": ""},
            weights="""
transformer.h.{i}.attn.c_attn.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} in num_attention_heads
""",
        ),
    ),
    "gpt_neo": GPT2.but(
        "GPT-Neo; Black et al. 2021: no scale, a window in every other layer",
        ffns={"dense": "{{mlp(act = activation_function, bias = mlp_bias)}}"},
        mixers="listed(of = attention_layers)",
        blocks={
            "global": {**BARE, "scale": "1", "out": "o | merge | linear(bias = true)"},
            "local": {
                **BARE,
                "scale": "1",
                "mask": "causal and window({{window_size}})",
                "out": "o | merge | linear(bias = true)",
            },
        },
        weights="""
transformer.h.{i}.attn.attention.bias -> - a causal mask
transformer.h.{i}.attn.attention.masked_bias -> - a causal mask
transformer.h.{i}.attn.attention.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
transformer.h.{i}.attn.attention.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
transformer.h.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t}
transformer.h.{i}.mlp.c_proj.{t} -> layers.{i}.ffn.down_proj.{t}
""",
    ),
    "gptj": GPTJ,
    "codegen": GPTJ.but(
        "CodeGen; Nijkamp et al. 2022: GPT-J whose q, v and k are one matrix, in four parts",
        weights="""
transformer.h.{i}.attn.qkv_proj.{t} -> layers.{i}.attn.(q|v|k)_proj.{t} in 4
""",
    ),
    "gpt_neox": NEOX,
    "bloom": BLOOM,
    "falcon": FALCONS,
    "mpt": Kind(
        about="MPT; MosaicML 2023: ALiBi, no biases at all, in norms neither",
        blocks={
            "attention": {
                **BARE,
                "q": "x | linear{{clip()}} | split",
                "k": "x | linear{{clip()}} | split",
                "v": "x | linear{{clip()}} | split",
                "scale": "{{attn_config.softmax_scale? {{attn_config.softmax_scale}}}}",
                "position": ALIBI,
            }
        },
        ffns={"dense": "gelu({{expansion_ratio}})"},
        names={**EPSILON, "clip_qkv": "attn_config.clip_qkv"},
        needs={
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.qk_ln": False,
            "attn_config.prefix_lm": False,
            "attn_config.attn_type": "multihead_attention",
            "no_bias": True,
            "norm_type": "low_precision_layernorm",
            "embedding_fraction": 1.0,
            "logit_scale": None,
        },
        model={
            "vocab": "{{vocab_size}}",
            "width": "{{hidden_size}}",
            "norm": "{{centred()}}",
            "tie": "{{tie_word_embeddings}}",
        },
        weights="""
transformer.wte.weight -> embed_tokens.weight
lm_head.weight -> lm_head.weight
transformer.norm_f.weight -> norm.o_norm.weight
transformer.blocks.{i}.norm_1.weight -> layers.{i}.attn_norm.o_norm.weight
transformer.blocks.{i}.norm_2.weight -> layers.{i}.ffn_norm.o_norm.weight
transformer.blocks.{i}.attn.Wqkv.weight -> layers.{i}.attn.(q|k|v)_proj.weight
transformer.blocks.{i}.attn.out_proj.weight -> layers.{i}.attn.o_proj.weight
transformer.blocks.{i}.ffn.{p}_proj.weight -> layers.{i}.ffn.{p}_proj.weight
""",
    ),
    "opt": Kind(
        about="OPT; Zhang et al. 2022: learned positions, counted from two, relu",
        blocks={
            "attention": {
                **BARE,
                "q": "x | linear{{enable_bias? (bias = true)}} | split",
                "k": "x | linear{{enable_bias? (bias = true)}} | split",
                "v": "x | linear{{enable_bias? (bias = true)}} | split",
                "out": "o | merge | linear{{enable_bias? (bias = true)}}",
            }
        },
        ffns={"dense": "{{mlp(act = activation_function, hidden = ffn_dim, bias = enable_bias)}}"},
        names={"word_embed": "word_embed_proj_dim"},
        needs={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        model={
            "vocab": "{{vocab_size}}",
            "width": "{{same(of = hidden_size, to = word_embed_proj_dim)}}",
            "norm": "layer",
            "embed_position": LEARNED,
            "tie": "{{tie_word_embeddings}}",
        },
        weights="""
model.decoder.embed_tokens.weight -> embed_tokens.weight
model.decoder.embed_positions.weight -> embed_positions.weight after 2
model.decoder.final_layer_norm.{t} -> norm.{t}
lm_head.weight -> lm_head.weight
model.decoder.layers.{i}.self_attn_layer_norm.{t} -> layers.{i}.attn_norm.{t}
model.decoder.layers.{i}.final_layer_norm.{t} -> layers.{i}.ffn_norm.{t}
model.decoder.layers.{i}.self_attn.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
model.decoder.layers.{i}.self_attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
model.decoder.layers.{i}.fc1.{t} -> layers.{i}.ffn.up_proj.{t}
model.decoder.layers.{i}.fc2.{t} -> layers.{i}.ffn.down_proj.{t}
""",
    ),
    "phi": PHI_KIND,
    "stablelm": LLAMA.but(
        "Stable LM; Bellagente et al. 2024",
        fixed={"mlp_bias": False},
        names={"attention_bias": "use_qkv_bias", "use_qk_norm": "qk_layernorm"},
        block={**PLAIN_OUT, **PER_HEAD_NORM},
        model={
            "layer": "{{use_parallel_residual? parallel}}",
            "norm": "{{layer_norm()}}",
        },
        weights=ONE_NORM
        + """
model.layers.{i}.self_attn.q_layernorm.norms.{j}.weight -> layers.{i}.attn.q_weight stacked
model.layers.{i}.self_attn.k_layernorm.norms.{j}.weight -> layers.{i}.attn.k_weight stacked
""",
    ),
    "persimmon": PHI_KIND.but(
        "Persimmon; Adept 2023: relu squared; queries and keys normed head by head",
        block={"kv_heads": ""},
        model={"layer": "", "head": ""},
        weights=BEFORE
        + """
model.layers.{i}.self_attn.query_key_value.{t}
    -> layers.{i}.attn.(q|k|v)_proj.{t} in num_attention_heads
model.layers.{i}.mlp.dense_h_to_4h.{t} -> layers.{i}.ffn.up_proj.{t}
model.layers.{i}.mlp.dense_4h_to_h.{t} -> layers.{i}.ffn.down_proj.{t}
""",
    ),
    "nemotron": LLAMA.but(
        "Nemotron-4; Parmar et al. 2024: relu squared; norms whose weight is added to one",
        ffns={"dense": "{{mlp(bias = mlp_bias)}}"},
        model={"norm": "unit_norm({{norm_eps}})"},
        weights="""
model.norm.weight -> norm.w
model.norm.bias -> norm.b
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
model.layers.{i}.input_layernorm.bias -> layers.{i}.attn_norm.b
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
model.layers.{i}.post_attention_layernorm.bias -> layers.{i}.ffn_norm.b
""",
    ),
    "starcoder2": LLAMA.but(
        "StarCoder 2; Lozhkov et al. 2024: layer norms, biases, a window",
        names={
            "attention_bias": "use_bias",
            "mlp_bias": "use_bias",
            "layer_norm_eps": "norm_epsilon",
        },
        block={"mask": "{{mask()}}"},
        ffns={"dense": "{{mlp(bias = mlp_bias)}}"},
        model={"norm": "{{layer_norm()}}"},
        weights="""
model.layers.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t}
model.layers.{i}.mlp.c_proj.{t} -> layers.{i}.ffn.down_proj.{t}
""",
    ),
    "cohere": COHERE,
    "cohere2": COHERE.but(
        "Command R7B; Cohere 2024: as Command R; local layers with positions, global ones without",
        fixed={"use_qk_norm": None},
        mixers=TYPES,
        blocks=by_type({**ATTENTION, "position": ""}, position="{{rope(style = interleaved)}}"),
    ),
}
