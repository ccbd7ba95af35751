"""Models with a selective state space: Mamba, and those that have it beside attention."""

from __future__ import annotations

from ..kind import Kind, Settings
from ..names import FEED, MAMBA, MAMBA2, under
from .experts import CHOICE, GRANITE_EXPERTS
from .llama import ATTENTION, LLAMA, MODEL, TYPES

NO_FFN = {"none": "none"}
SELECTIVE = """
mix selective(size) {
  param rate[heads, value_dim, size] = 0
  param skip[heads, value_dim] = 1
  state H[value_dim, size] = 0
  H <- exp(-exp(rate) * time) * H + outer(time * v, k)
  o <- H @ q + skip * v
}
"""
STATE_SPACE = """
mix state_space {
  let time = x | linear(heads{{mamba_proj_bias? , bias = true}})
  param shift[heads] = 1
  param skip[heads] = 1
  param rate[heads] = log(h + 1)
  state S[head_dim, value_dim] = 0
  S <- exp(-exp(rate) * softplus(time + shift)) * S
  S <- S + softplus(time + shift) * outer(k, v)
  o <- q @ S + skip * v
}
"""


def selective(norm: str = "", inner: str = "{{mamba_expand}} * {{hidden_size}}") -> Settings:
    """Return Mamba's block; `norm` is over what a step reads and writes, and how fast."""
    return {
        "heads": "1",
        "head_dim": "{{mamba_d_state}}",
        "value_dim": inner,
        "let u": "x | linear(value_dim{{mamba_proj_bias? , bias = true}}) | "
        "conv({{mamba_d_conv}}{{mamba_conv_bias? , bias = true}}) | {{activation()}}",
        "let gate": "x | linear(value_dim{{mamba_proj_bias? , bias = true}}) | {{activation()}}",
        "let time": f"u | linear({{{{mamba_dt_rank}}}}){norm} | linear(value_dim, bias = true) | "
        "softplus | split(1)",
        "q": f"u | linear(head_dim){norm} | split(1)",
        "k": f"u | linear(head_dim){norm} | split(1)",
        "v": "u | split(1)",
        "mix": "selective(head_dim)",
        "mask": "causal",
        "out": "o | merge | gate(gate) | linear{{mamba_proj_bias? (bias = true)}}",
    }


CONVOLVED = " | conv({{mamba_d_conv}}{{mamba_conv_bias? , bias = true}}) | {{activation()}}"
GROUPED = " | split({{mamba_n_groups}}) | repeat({{mamba_n_heads}} / {{mamba_n_groups}})"
STATES = (
    "x | linear({{mamba_n_groups}} * head_dim{{mamba_proj_bias? , bias = true}})"
    + CONVOLVED
    + GROUPED
)
STATE_BLOCK: Settings = {
    "heads": "{{mamba_n_heads}}",
    "head_dim": "{{mamba_d_state}}",
    "value_dim": "{{state_size()}}",
    "param gain[heads * value_dim]": "{{several(of = mamba_n_groups)}}",
    "let gate_": "x | linear(heads * value_dim{{mamba_proj_bias? , bias = true}}) | "
    "{{activation()}}",
    "q": STATES,
    "k": STATES,
    "v": "x | linear(heads * value_dim{{mamba_proj_bias? , bias = true}})" + CONVOLVED + " | split",
    "mix": "state_space",
    "mask": "causal",
    "out": "{{group_norm(of = mamba_n_groups)}} | linear{{mamba_proj_bias? (bias = true)}}",
}
STILL = {**ATTENTION, "position": ""}
LIMITS = {"time_step_limit": [0.0, float("inf")]}
PRE_FF = """
model.final_layernorm.weight -> norm.weight
model.layers.{i}.pre_ff_layernorm.weight -> layers.{i}.ffn_norm.weight
"""
MAMBA_KIND = Kind(
    about="Mamba; Gu & Dao 2023: selective state spaces",
    names={
        "rms_norm_eps": "layer_norm_epsilon",
        "mamba_d_state": "state_size",
        "mamba_d_conv": "conv_kernel",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_proj_bias": "use_bias",
        "mamba_expand": "expand",
        "mamba_dt_rank": "time_step_rank",
    },
    mixers="all(it = space)",
    parts="all(it = none)",
    blocks={"space": selective(inner="{{intermediate_size}}")},
    ffns=NO_FFN,
    model=MODEL,
    defs={"selective": SELECTIVE},
    weights=under("backbone.layers.{i}.mixer.", MAMBA)
    + """
backbone.embeddings.weight -> embed_tokens.weight
backbone.norm_f.weight -> norm.weight
lm_head.weight -> lm_head.weight
backbone.layers.{i}.norm.weight -> layers.{i}.attn_norm.weight
""",
)
BAMBA = LLAMA.but(
    "Bamba; IBM et al. 2024: state spaces (Mamba 2), attention in some layers",
    needs=LIMITS,
    mixers="among(of = attn_layer_indices, yes = attention, no = space)",
    blocks={"space": STATE_BLOCK, "attention": ATTENTION},
    defs={"state_space": STATE_SPACE},
    weights=PRE_FF + FEED + under("model.layers.{i}.mamba.", MAMBA2),
)
GRANITE_HYBRID = GRANITE_EXPERTS.but(
    "Granite 4; IBM 2025: state spaces, attention in some layers, experts beside a shared one",
    needs=LIMITS,
    mixers=TYPES,
    blocks={
        "linear_attention": STATE_BLOCK,
        "full_attention": {
            **ATTENTION,
            "scale": "{{direct(of = attention_multiplier)}}",
            "position": "{{where(of = position_embedding_type, is = rope)}}",
        },
    },
    defs={"state_space": STATE_SPACE},
    parts="has(of = num_local_experts)",
    ffns={"dense": "{{gated(hidden = shared_intermediate_size)}}"},
    weights=under("model.layers.{i}.mamba.", MAMBA2)
    + """
model.layers.{i}.shared_mlp.input_linear.weight -> layers.{i}.ffn.(gate|up)_proj.weight
model.layers.{i}.shared_mlp.output_linear.weight -> layers.{i}.ffn.down_proj.weight
""",
)


def _tuned(size: str, at: int, after: str) -> str:
    """Return a stream of Falcon-H1's state space: mapped, with a factor of its own."""
    bias = "{{mamba_proj_bias? , bias = true}}"
    return f"y | linear({size}{bias}) | scale({{{{ssm_multipliers.{at}}}}}){after}"


SHARED_STATES = CONVOLVED + GROUPED
TUNED_SPACE = f"""
block mamba {{
  heads     = {{{{mamba_n_heads}}}}
  head_dim  = {{{{mamba_d_state}}}}
  value_dim = {{{{state_size(whole = mamba_d_ssm)}}}}
  let y     = x | scale({{{{ssm_in_multiplier}}}})
  let gate_ = {_tuned("heads * value_dim", 0, " | silu")}
  q    = {_tuned("{{mamba_n_groups}} * head_dim", 3, SHARED_STATES)}
  k    = {_tuned("{{mamba_n_groups}} * head_dim", 2, SHARED_STATES)}
  v    = {_tuned("heads * value_dim", 1, CONVOLVED + " | split")}
  mix  = state_space
  mask = causal
  out  = o | merge{{{{mamba_rms_norm?  | {{{{rms()}}}}}}}} | gate(gate_)
    | linear{{{{projectors_bias? (bias = true)}}}}
}}
"""
SPACES: dict[str, Kind | tuple[Kind, ...]] = {
    "mamba": MAMBA_KIND,
    "falcon_mamba": MAMBA_KIND.but(
        "Falcon Mamba; Zuo et al. 2024: Mamba, what a step reads and writes normed",
        blocks={
            "space": selective(
                " | rms_norm(eps = {{mixer_rms_eps}}, scale = false)", "{{intermediate_size}}"
            )
        },
    ),
    "mamba2": MAMBA_KIND.but(
        "Mamba 2; Dao & Gu 2024: state spaces that fade by a number",
        names={
            "mamba_n_heads": "num_heads",
            "num_attention_heads": "num_heads",
            "mamba_d_head": "head_dim",
            "mamba_n_groups": "n_groups",
        },
        needs=LIMITS,
        blocks={"space": STATE_BLOCK},
        defs={"state_space": STATE_SPACE},
        weights=under("backbone.layers.{i}.mixer.", MAMBA2),
    ),
    "jamba": LLAMA.but(
        "Jamba; Lieber et al. 2024: selective state spaces, attention without positions, experts",
        fixed={"attention_bias": False, "mlp_bias": False},
        mixers="periodic(of = attn_layer_period, offset = attn_layer_offset, "
        "yes = attention, no = mamba)",
        blocks={"mamba": selective(" | {{rms()}}"), "attention": STILL},
        parts="periodic(of = expert_layer_period, offset = expert_layer_offset, "
        "yes = sparse, no = dense)",
        ffns={"sparse": "{{moe(hidden = intermediate_size, norm = never)}}"},
        defs={"selective": SELECTIVE},
        weights=PRE_FF + FEED + under("model.layers.{i}.mamba.", MAMBA),
    ),
    "bamba": BAMBA,
    "granitemoehybrid": GRANITE_HYBRID,
    "falcon_h1": BAMBA.but(
        "Falcon-H1; Zuo et al. 2025: attention and a state space beside each other; factors",
        needs={"mamba_norm_before_gate": True},
        mixers="all(it = attention)",
        blocks={
            "attention": {
                **ATTENTION,
                "k": "x | linear{{attention_bias? (bias = true)}} | "
                "scale({{key_multiplier}}) | split",
            }
        },
        names={"mamba_out_bias": "projectors_bias"},
        ffns={"dense": "tuned(hidden = {{intermediate_size}}{{mlp_bias? , bias = true}})"},
        model={
            "layer": "beside",
            "embed": "x{{scaled(of = embedding_multiplier)}}",
            "head": "x | norm | linear(vocab){{scaled(of = lm_head_multiplier)}}",
        },
        defs={
            "state_space": STATE_SPACE.replace(
                "bias = true}})", "bias = true}}) | scale({{ssm_multipliers.4}})"
            ).replace("x | linear", "x | scale({{ssm_in_multiplier}}) | linear"),
            "mamba": TUNED_SPACE,
            "beside": """
layer beside(attn, ffn) {
  let y = x | norm
  let z = x + {{ssm_out_multiplier}} * (y | mamba) +
    {{attention_out_multiplier}} * ({{attention_in_multiplier}} * y | attn)
  out = z + (z | norm | ffn)
}
""",
            "tuned": """
ffn tuned(hidden, bias = false) {
  let gate = x | linear(hidden, bias = bias) | scale({{mlp_multipliers.0}})
  let up   = x | linear(hidden, bias = bias)
  let down = up * (gate | {{activation()}}) | linear(bias = bias) | scale({{mlp_multipliers.1}})
  out = down
}
""",
        },
        weights="""
model.layers.{i}.input_layernorm.weight -> layers.{i}.y_norm.weight
"""
        + under("model.layers.{i}.mamba.", MAMBA2.replace(".attn.", ".mamba.")),
    ),
    "nemotron_h": LLAMA.but(
        "Nemotron-H; NVIDIA 2025: each layer is one part: a state space, attention, a feed-forward",
        names={
            "rms_norm_eps": "layer_norm_epsilon",
            "mamba_n_heads": "mamba_num_heads",
            "mamba_d_head": "mamba_head_dim",
            "mamba_d_state": "ssm_state_size",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_conv_bias": "use_conv_bias",
            "mamba_proj_bias": "use_bias",
            "hidden_act": "mamba_hidden_act",
        },
        fixed=CHOICE,
        needs={"moe_latent_size": None, "sliding_window": None},
        mixers="listed(of = layers_block_type)",
        parts="as_many(of = layers_block_type, it = none)",
        blocks={
            "linear_attention": {**STATE_BLOCK, "value_dim": "{{mamba_d_head}}"},
            "full_attention": STILL,
            "mlp": "{{mlp(act = mlp_hidden_act, bias = mlp_bias)}}",
            "moe": "{{choosing(act = mlp_hidden_act, groups = n_group, alone = yes, "
            "shared = moe_shared_expert_intermediate_size)}}",
        },
        ffns=NO_FFN,
        defs={
            "state_space": STATE_SPACE.replace(
                "softplus(time + shift)", "max(softplus(time + shift), {{time_step_min}})"
            )
        },
        weights=under("model.layers.{i}.mixer.", MAMBA2)
        + """
model.embeddings.weight -> embed_tokens.weight
model.norm_f.weight -> norm.weight
model.layers.{i}.norm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.mixer.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
model.layers.{i}.mixer.gate.weight -> layers.{i}.attn.route_proj.weight
model.layers.{i}.mixer.gate.e_score_correction_bias -> layers.{i}.attn.bias
model.layers.{i}.mixer.experts.{p}_proj -> layers.{i}.attn.experts.{p}_proj.weight
model.layers.{i}.mixer.experts.{j}.{p}_proj.weight
    -> layers.{i}.attn.experts.{p}_proj.weight stacked
model.layers.{i}.mixer.shared_experts.{p}_proj.weight -> layers.{i}.attn.shared.{p}_proj.weight
""",
    ),
}
