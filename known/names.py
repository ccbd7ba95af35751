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
UNIT = """
model.norm.weight -> norm.w
model.layers.{i}.self_attn.{p}_norm.weight -> layers.{i}.attn.{p}_unit_rms.w
model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
"""
FUSED = """
model.layers.{i}.self_attn.qkv_proj.{t} -> layers.{i}.attn.(q|k|v)_proj.{t}
model.layers.{i}.mlp.gate_up_proj.{t} -> layers.{i}.ffn.(gate|up)_proj.{t}
"""
