"""Names of their tensors that several kinds share; `weights.py` says how lines are read."""

from __future__ import annotations

DECODER = """
model.embed_tokens.weight -> embed_tokens.weight
model.norm.{t} -> norm.{t}
lm_head.{t} -> lm_head.{t}
{any}rotary_emb.{t} -> - it follows from the configuration
model.layers.{i}.self_attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
model.layers.{i}.self_attn.{p}_norm.{t} -> layers.{i}.attn.{p}_norm.{t}
model.layers.{i}.mlp.{p}_proj.{t} -> layers.{i}.ffn.{p}_proj.{t}
"""
BEFORE = """
model.layers.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
model.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
"""
AFTER = """
model.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.attn_post_norm.{t}
model.layers.{i}.post_feedforward_layernorm.{t} -> layers.{i}.ffn_post_norm.{t}
"""
ONE_NORM = """
model.layers.{i}.input_layernorm.{t} -> layers.{i}.y_norm.{t}
"""
BOTH = """
model.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
model.layers.{i}.post_self_attn_layernorm.{t} -> layers.{i}.attn_post_norm.{t}
model.layers.{i}.post_mlp_layernorm.{t} -> layers.{i}.ffn_post_norm.{t}
"""
UP_DOWN = """
model.layers.{i}.mlp.fc1.{t} -> layers.{i}.ffn.up_proj.{t}
model.layers.{i}.mlp.fc2.{t} -> layers.{i}.ffn.down_proj.{t}
"""
XIELU = (
    UP_DOWN
    + """
model.layers.{i}.attention_layernorm.weight -> layers.{i}.attn_norm.weight
model.layers.{i}.feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
model.layers.{i}.mlp.act_fn.alpha_p -> layers.{i}.ffn.down_xielu.above
model.layers.{i}.mlp.act_fn.alpha_n -> layers.{i}.ffn.down_xielu.below
model.layers.{i}.mlp.act_fn.{t} -> - it is always the same
"""
)
UNIT = """
model.norm.weight -> norm.w
model.layers.{i}.self_attn.{p}_norm.weight -> layers.{i}.attn.{p}_unit_rms.w
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
"""
UNIT_BEFORE = """
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
"""
UNIT_BOTH = """
model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.attn_post_norm.w
model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.w
model.layers.{i}.post_feedforward_layernorm.weight -> layers.{i}.ffn_post_norm.w
"""
FUSED = """
model.layers.{i}.self_attn.qkv_proj.{t} -> layers.{i}.attn.(q|k|v)_proj.{t}
model.layers.{i}.mlp.gate_up_proj.{t} -> layers.{i}.ffn.(gate|up)_proj.{t}
"""
PHI = """
model.final_layernorm.{t} -> norm.{t}
model.layers.{i}.input_layernorm.{t} -> layers.{i}.y_norm.{t}
model.layers.{i}.self_attn.dense.{t} -> layers.{i}.attn.o_proj.{t}
model.layers.{i}.self_attn.{p}_layernorm.{t} -> layers.{i}.attn.{p}_norm.{t}
model.layers.{i}.mlp.fc1.{t} -> layers.{i}.ffn.up_proj.{t}
model.layers.{i}.mlp.fc2.{t} -> layers.{i}.ffn.down_proj.{t}
"""
MOE = """
model.layers.{i}.mlp.gate.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.mlp.gate.e_score_correction_bias -> layers.{i}.ffn.bias
model.layers.{i}.mlp.experts.gate_up_proj -> layers.{i}.ffn.experts.(gate|up)_proj.weight
model.layers.{i}.mlp.experts.down_proj -> layers.{i}.ffn.experts.down_proj.weight
model.layers.{i}.mlp.experts.{j}.{p}_proj.weight -> layers.{i}.ffn.experts.{p}_proj.weight stacked
model.layers.{i}.mlp.shared_experts.{p}_proj.weight -> layers.{i}.ffn.shared.{p}_proj.weight
model.layers.{i}.mlp.shared_expert.{p}_proj.weight -> layers.{i}.ffn.shared.{p}_proj.weight
model.layers.{i}.mlp.shared_expert_gate.weight -> layers.{i}.ffn.open_proj.weight
model.layers.{i}.block_sparse_moe.gate.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight
    -> layers.{i}.ffn.experts.gate_proj.weight stacked
model.layers.{i}.block_sparse_moe.experts.{j}.w2.weight
    -> layers.{i}.ffn.experts.down_proj.weight stacked
model.layers.{i}.block_sparse_moe.experts.{j}.w3.weight
    -> layers.{i}.ffn.experts.up_proj.weight stacked
"""
GRANITE_MOE = """
model.layers.{i}.block_sparse_moe.router.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.block_sparse_moe.router.layer.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.block_sparse_moe.experts.gate_up_proj
    -> layers.{i}.ffn.experts.(gate|up)_proj.weight
model.layers.{i}.block_sparse_moe.experts.down_proj -> layers.{i}.ffn.experts.down_proj.weight
model.layers.{i}.block_sparse_moe.input_linear.weight
    -> layers.{i}.ffn.experts.(gate|up)_proj.weight
model.layers.{i}.block_sparse_moe.output_linear.weight -> layers.{i}.ffn.experts.down_proj.weight
model.layers.{i}.shared_mlp.input_linear.weight -> layers.{i}.ffn.shared.(gate|up)_proj.weight
model.layers.{i}.shared_mlp.output_linear.weight -> layers.{i}.ffn.shared.down_proj.weight
"""
LATENT = """
model.layers.{i}.self_attn.q_a_proj.{t} -> layers.{i}.attn.q_proj_0.{t}
model.layers.{i}.self_attn.q_a_layernorm.{t} -> layers.{i}.attn.q_norm.{t}
model.layers.{i}.self_attn.q_b_proj.{t} -> layers.{i}.attn.q_proj_1.{t}
model.layers.{i}.self_attn.kv_a_proj_with_mqa.{t} -> layers.{i}.attn.(c|kr)_proj.{t}
model.layers.{i}.self_attn.kv_a_layernorm.{t} -> layers.{i}.attn.c_norm.{t}
model.layers.{i}.self_attn.kv_b_proj.{t} -> layers.{i}.attn.(k|v)_proj.{t} in num_attention_heads
"""
FEED = """
model.layers.{i}.feed_forward.{p}_proj.{t} -> layers.{i}.ffn.{p}_proj.{t}
model.layers.{i}.feed_forward.gate.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.feed_forward.router.weight -> layers.{i}.ffn.route_proj.weight
model.layers.{i}.feed_forward.experts.gate_up_proj -> layers.{i}.ffn.experts.(gate|up)_proj.weight
model.layers.{i}.feed_forward.experts.down_proj -> layers.{i}.ffn.experts.down_proj.weight
model.layers.{i}.feed_forward.experts.{j}.{p}_proj.weight
    -> layers.{i}.ffn.experts.{p}_proj.weight stacked
"""
MAMBA = """
in_proj.{t} -> layers.{i}.attn.(u|gate)_proj.{t}
conv1d.{t} -> layers.{i}.attn.u_conv.{t}
x_proj.weight -> layers.{i}.attn.(time_proj_0|k_proj|q_proj).weight
dt_proj.{t} -> layers.{i}.attn.time_proj_1.{t}
dt_layernorm.weight -> layers.{i}.attn.time_norm.weight
b_layernorm.weight -> layers.{i}.attn.k_norm.weight
c_layernorm.weight -> layers.{i}.attn.q_norm.weight
A_log -> layers.{i}.attn.rate
D -> layers.{i}.attn.skip
out_proj.{t} -> layers.{i}.attn.o_proj.{t}
"""
MAMBA2 = """
in_proj.{t} -> layers.{i}.attn.(gate_|v|k|q|time)_proj.{t}
conv1d.{t} -> layers.{i}.attn.(v|k|q)_conv.{t}
dt_bias -> layers.{i}.attn.shift
A_log -> layers.{i}.attn.rate
D -> layers.{i}.attn.skip
norm.weight -> layers.{i}.attn.o_norm.weight
norm.weight -> layers.{i}.attn.gain
out_proj.{t} -> layers.{i}.attn.o_proj.{t}
"""


def under(module: str, lines: str) -> str:
    """Return lines of a module of theirs that stands under a longer name."""
    return "".join(f"{module}{line}\n" for line in lines.split("\n") if line.strip())


INDEXER = """
model.layers.{i}.self_attn.q_a_proj.{t} -> layers.{i}.attn.a_proj.{t}
model.layers.{i}.self_attn.q_a_layernorm.{t} -> layers.{i}.attn.a_norm.{t}
model.layers.{i}.self_attn.q_b_proj.{t} -> layers.{i}.attn.q_proj.{t}
model.layers.{i}.self_attn.indexer.wq_b.weight -> layers.{i}.attn.asked_proj.weight
model.layers.{i}.self_attn.indexer.wk.weight -> layers.{i}.attn.known_proj.weight
model.layers.{i}.self_attn.indexer.k_norm.{t} -> layers.{i}.attn.known_norm.{t}
model.layers.{i}.self_attn.indexer.weights_proj.weight -> layers.{i}.attn.w_proj.weight
"""
