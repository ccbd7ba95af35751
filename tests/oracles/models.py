"""Whole language models of Hugging Face Transformers: how to make them tiny, what is named how.

A model in `examples/models` and one of theirs have the same tensors under other names. Lines say
which: `theirs -> ours`, in which `{i}` and `{j}` are numbers, `{any}` is anything and any other
name a word; the first line that fits counts. What holds several of ours names them in brackets,
`(q|k|v)_proj`, its rows one after the other; with `in 4` they are laid so in each of four groups.
`across` is a matrix transposed, `stacked` a row of ours, `beside` columns of ours one after the
other, and `-` what has no place in ours. Tensors of `experts` begin with how many there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORDS = {"i": r"\d+", "j": r"\d+", "any": r".+"}  # what a name in a line stands for
WORD = r"\w+"


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and what it is of ours."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    across: bool = False
    stacked: bool = False
    beside: bool = False

    def under(self, theirs: str, ours: str) -> Row:
        """Return the same of a module of theirs, which is one of ours."""
        several = tuple(ours + each for each in self.ours)
        rest = (self.groups, self.across, self.stacked, self.beside)
        return Row(theirs + self.theirs, several, *rest)

    def moved(
        self, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor] | None:
        """Return a tensor of theirs under our names; None where the name is another one."""
        found = _pattern(self.theirs).fullmatch(name)
        if found is None or self.ours == ("-",):
            return None if found is None else {}
        ours = [each.format(**found.groupdict()) for each in self.ours]
        if self.across and tensor.ndim > 1:
            tensor = tensor.mT
        if self.stacked:
            return {ours[0]: tensor[None]}
        if len(ours) == 1:
            return {ours[0]: tensor}
        if self.beside:
            sizes = [shapes[each][1] for each in ours]
            return dict(zip(ours, tensor.split(_shared(tensor.shape[1], sizes), 1), strict=True))
        lists = tensor.ndim == 3 and tensor.shape[1] > 1  # which a convolution has not
        at = int(lists or ".experts." in ours[0])  # each head or expert holds its rows
        flat = tensor.ndim == 1
        sizes = [math.prod(shapes[each]) if flat else shapes[each][at] for each in ours]
        sizes = _shared(tensor.shape[at] // self.groups, sizes)
        parts = tensor.unflatten(at, (self.groups, -1)).split(sizes, at + 1)
        whole = (part.flatten(at, at + 1) for part in parts)
        return dict(zip(ours, whole, strict=True))


def _shared(total: int, sizes: list[int]) -> list[int]:
    """Return how much each gets, where all together need as much, or have the rest from others."""
    return [each * total // sum(sizes) for each in sizes]


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", text)
    kinds = [f"(?P<{each}>{WORDS.get(each, WORD)})" for each in parts[1::2]]
    fixed = [re.escape(each) for each in parts[::2]]
    return re.compile("".join(a + b for a, b in zip(fixed, [*kinds, ""], strict=True)))


def rows(text: str) -> tuple[Row, ...]:
    """Read lines `theirs -> ours`, `theirs -> ours in 4`, `theirs -> ours across`."""
    done = []
    for line in text.split("\n"):
        if line.strip():
            theirs, ours = line.strip().split(" -> ")
            ours, *rest = ours.split()
            before, *names, after = re.split(r"[(|)]", ours) if "(" in ours else (ours, "", "")
            groups = int(rest[rest.index("in") + 1]) if "in" in rest else 1
            several = tuple(f"{before}{name}{after}" for name in names)
            words = (each in rest for each in ("across", "stacked", "beside"))
            done.append(Row(theirs, several, groups, *words))
    return tuple(done)


def moved(
    rows: Iterable[Row], theirs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return tensors of theirs (weights or gradients) under our names, none of them left out."""
    done: dict[str, list[Tensor]] = {}
    for name, tensor in theirs.items():
        found = (row.moved(name, tensor, shapes) for row in rows)
        each = next((got for got in found if got is not None), None)
        assert each is not None, f"no row for {name}"
        for ours, part in each.items():
            done.setdefault(ours, []).append(part)
    return {name: _joined(parts, shapes[name]) for name, parts in done.items()}


def _joined(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of ours: rows of several of theirs, or columns where the rows are there."""
    if len(parts) == 1:
        return parts[0].reshape(shape)
    return torch.cat(parts, int(parts[0].shape[:1] == shape[:1])).reshape(shape)


@dataclass(frozen=True)
class Theirs:
    """How to make one of their models: its kind, the names, what its configuration says."""

    kind: str
    rows: tuple[Row, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    positions: bool = True  # whether a call takes `position_ids`
    alone: bool = False  # whether padding moves their blocks of keys: then none is given to them
    zero: str | None = None  # the last of the names of what theirs has and ours can do without
    attention: str = "eager"
    auto: str = "AutoModelForCausalLM"


SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NARROW = {"head_dim": 6}  # where heads need not fill the width
LOCAL, FULL = "sliding_attention", "full_attention"
PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def turning(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


PARTS = rows("""
    model.embed_tokens.weight -> embed_tokens.weight
    model.norm.{t} -> norm.{t}
    lm_head.{t} -> lm_head.{t}
    model.layers.{i}.self_attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
    model.layers.{i}.self_attn.{p}_norm.{t} -> layers.{i}.attn.{p}_norm.{t}
    model.layers.{i}.mlp.{p}_proj.{t} -> layers.{i}.ffn.{p}_proj.{t}
""")
ONE_NORM = rows("model.layers.{i}.input_layernorm.{t} -> layers.{i}.y_norm.{t}")
BEFORE = rows("""
    model.layers.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
    model.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
""")
AFTER = rows("""
    model.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.attn_post_norm.{t}
    model.layers.{i}.post_feedforward_layernorm.{t} -> layers.{i}.ffn_post_norm.{t}
""")
GEMMA = rows("""
    model.norm.weight -> norm.w
    model.layers.{i}.self_attn.{p}_norm.weight -> layers.{i}.attn.{p}_unit_rms.w
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.attn_post_norm.w
    model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.w
    model.layers.{i}.post_feedforward_layernorm.weight -> layers.{i}.ffn_post_norm.w
""")
FUSED = rows("""
    model.layers.{i}.self_attn.qkv_proj.weight -> layers.{i}.attn.(q|k|v)_proj.weight
    model.layers.{i}.mlp.gate_up_proj.weight -> layers.{i}.ffn.(gate|up)_proj.weight
""")
GPT2 = rows("""
    transformer.wte.weight -> embed_tokens.weight
    transformer.wpe.weight -> embed_positions.weight
    transformer.ln_f.{t} -> norm.{t}
    transformer.h.{i}.ln_1.{t} -> layers.{i}.attn_norm.{t}
    transformer.h.{i}.ln_2.{t} -> layers.{i}.ffn_norm.{t}
    transformer.h.{i}.attn.c_attn.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} across
    transformer.h.{i}.attn.c_proj.{t} -> layers.{i}.attn.o_proj.{t} across
    transformer.h.{i}.mlp.c_fc.{t} -> layers.{i}.ffn.up_proj.{t} across
    transformer.h.{i}.mlp.c_proj.{t} -> layers.{i}.ffn.down_proj.{t} across
""")
GPTJ = rows("""
    transformer.wte.weight -> embed_tokens.weight
    transformer.ln_f.{t} -> norm.{t}
    lm_head.{t} -> lm_head.{t}
    transformer.h.{i}.ln_1.{t} -> layers.{i}.y_norm.{t}
    transformer.h.{i}.attn.out_proj.{t} -> layers.{i}.attn.o_proj.{t}
    transformer.h.{i}.attn.{p}_proj.{t} -> layers.{i}.attn.{p}_proj.{t}
    transformer.h.{i}.mlp.fc_in.{t} -> layers.{i}.ffn.up_proj.{t}
    transformer.h.{i}.mlp.fc_out.{t} -> layers.{i}.ffn.down_proj.{t}
""")
NEOX = rows("""
    gpt_neox.embed_in.weight -> embed_tokens.weight
    gpt_neox.final_layer_norm.{t} -> norm.{t}
    lm_head.weight -> lm_head.weight
    embed_out.weight -> lm_head.weight
    gpt_neox.layers.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
    gpt_neox.layers.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
    gpt_neox.layers.{i}.attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} in 4
    gpt_neox.layers.{i}.attention.dense.{t} -> layers.{i}.attn.o_proj.{t}
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.{t} -> layers.{i}.ffn.up_proj.{t}
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.{t} -> layers.{i}.ffn.down_proj.{t}
""")
BLOOM = rows("""
    transformer.word_embeddings.weight -> embed_tokens.weight
    transformer.word_embeddings_layernorm.{t} -> embed_norm.{t}
    transformer.ln_f.{t} -> norm.{t}
    transformer.h.{i}.input_layernorm.{t} -> layers.{i}.attn_norm.{t}
    transformer.h.{i}.post_attention_layernorm.{t} -> layers.{i}.ffn_norm.{t}
    transformer.h.{i}.ln_attn.{t} -> layers.{i}.attn_norm.{t}
    transformer.h.{i}.ln_mlp.{t} -> layers.{i}.ffn_norm.{t}
    transformer.h.{i}.self_attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} in 4
    transformer.h.{i}.self_attention.dense.{t} -> layers.{i}.attn.o_proj.{t}
    transformer.h.{i}.mlp.dense_h_to_4h.{t} -> layers.{i}.ffn.up_proj.{t}
    transformer.h.{i}.mlp.dense_4h_to_h.{t} -> layers.{i}.ffn.down_proj.{t}
""")
FALCON_7B = rows("""
    transformer.h.{i}.self_attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t}
    transformer.h.{i}.input_layernorm.{t} -> layers.{i}.y_norm.{t}
""")
FALCON_40B = rows("""
    transformer.h.{i}.self_attention.query_key_value.{t} -> layers.{i}.attn.(q|k|v)_proj.{t} in 2
""")
MPT = rows("""
    transformer.wte.weight -> embed_tokens.weight
    transformer.norm_f.weight -> norm.o_norm.weight
    transformer.blocks.{i}.norm_1.weight -> layers.{i}.attn_norm.o_norm.weight
    transformer.blocks.{i}.norm_2.weight -> layers.{i}.ffn_norm.o_norm.weight
    transformer.blocks.{i}.attn.Wqkv.weight -> layers.{i}.attn.(q|k|v)_proj.weight
    transformer.blocks.{i}.attn.out_proj.weight -> layers.{i}.attn.o_proj.weight
    transformer.blocks.{i}.ffn.{p}_proj.weight -> layers.{i}.ffn.{p}_proj.weight
""")
COHERE = rows("""
    model.norm.weight -> norm.o_norm.weight
    model.layers.{i}.input_layernorm.weight -> layers.{i}.y_norm.o_norm.weight
""")
PHI = rows("""
    model.final_layernorm.{t} -> norm.{t}
    model.layers.{i}.self_attn.dense.{t} -> layers.{i}.attn.o_proj.{t}
    model.layers.{i}.mlp.fc1.{t} -> layers.{i}.ffn.up_proj.{t}
    model.layers.{i}.mlp.fc2.{t} -> layers.{i}.ffn.down_proj.{t}
""")
STABLELM = rows("""
    model.layers.{i}.self_attn.q_layernorm.norms.{j}.weight -> layers.{i}.attn.q_weight stacked
    model.layers.{i}.self_attn.k_layernorm.norms.{j}.weight -> layers.{i}.attn.k_weight stacked
""")
NEMOTRON = rows("""
    model.norm.weight -> norm.w
    model.norm.bias -> norm.b
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.layers.{i}.input_layernorm.bias -> layers.{i}.attn_norm.b
    model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
    model.layers.{i}.post_attention_layernorm.bias -> layers.{i}.ffn_norm.b
""")
LFM = rows("""
    model.embedding_norm.weight -> norm.weight
    model.layers.{i}.operator_norm.weight -> layers.{i}.attn_norm.weight
    model.layers.{i}.post_operator_norm.weight -> layers.{i}.attn_post_norm.weight
    model.layers.{i}.ffn_norm.weight -> layers.{i}.ffn_norm.weight
    model.layers.{i}.post_ffn_norm.weight -> layers.{i}.ffn_post_norm.weight
    model.layers.{i}.self_attn.out_proj.weight -> layers.{i}.attn.o_proj.weight
    model.layers.{i}.self_attn.{p}_layernorm.weight -> layers.{i}.attn.{p}_norm.weight
    model.layers.{i}.conv.in_proj.weight -> layers.{i}.attn.(before|after|mixed)_proj.weight
    model.layers.{i}.conv.conv.weight -> layers.{i}.attn.mixed_conv.weight
    model.layers.{i}.conv.out_proj.weight -> layers.{i}.attn.o_proj.weight
    model.layers.{i}.feed_forward.w1.weight -> layers.{i}.ffn.gate_proj.weight
    model.layers.{i}.feed_forward.w2.weight -> layers.{i}.ffn.down_proj.weight
    model.layers.{i}.feed_forward.w3.weight -> layers.{i}.ffn.up_proj.weight
""")
HRM = rows("""
    model.embed_tokens.weight -> embed_tokens.weight
    lm_head.weight -> lm_head.weight
    model.z_L_init -> layers.0.low
    model.L_module.layers.0.self_attn.{p}_proj.weight -> layers.1.attn.{p}_proj.weight
    model.L_module.layers.0.mlp.{p}_proj.weight -> layers.1.ffn.{p}_proj.weight
    model.H_module.layers.0.self_attn.{p}_proj.weight -> layers.2.attn.{p}_proj.weight
    model.H_module.layers.0.mlp.{p}_proj.weight -> layers.2.ffn.{p}_proj.weight
""")
GEMMA4 = rows("""
    model.layers.2.self_attn.k_proj.weight -> layers.2.attn.kv_proj.weight
    model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.weight
""")
GEMMA4_E2B = rows("""
    model.embed_tokens_per_layer.weight -> layers.(0|1|2|3|4).e_embed.weight beside
    model.per_layer_model_projection.weight -> layers.(0|1|2|3|4).c_proj.weight
    model.per_layer_projection_norm.weight -> layers.0.c_rms_norm.o_norm.weight
    model.layers.{i}.per_layer_input_gate.weight -> layers.{i}.g_proj.weight
    model.layers.{i}.per_layer_projection.weight -> layers.{i}.o_proj.weight
    model.layers.{i}.post_per_layer_input_norm.weight -> layers.{i}.o_norm.weight
    model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.weight
""")
MUSE = rows("""
    model.vision_{any} -> -
    model.audio_{any} -> -
    model.language_model.embed_tokens.weight -> embed_tokens.weight
    model.language_model.norm.weight -> norm.weight
    lm_head.weight -> lm_head.weight
    model.language_model.layers.{i}.self_attn.{p}_proj.weight -> layers.{i}.attn.{p}_proj.weight
    model.language_model.layers.{i}.mlp.{p}_proj.weight -> layers.{i}.ffn.{p}_proj.weight
    model.language_model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.language_model.layers.{i}.pre_feedforward_layernorm.weight -> layers.{i}.ffn_norm.w
    model.language_model.layers.{i}.post_feedforward_layernorm.weight -> layers.{i}.o_scaled_rms.w
    model.language_model.layers.{i}.post_attention_residual_gate.gate -> layers.{i}.attn_gate
    model.language_model.layers.{i}.post_feedforward_residual_gate.gate -> layers.{i}.ffn_gate
""")
MAMBA = rows("""
    input_layernorm.weight -> mamba_norm.weight
    mamba.in_proj.weight -> mamba.(u|gate)_proj.weight in 64
    mamba.conv1d.weight -> mamba.u_conv.weight
    mamba.conv1d.bias -> mamba.u_conv.bias
    mamba.x_proj_weight -> mamba.(time_proj_0|k_proj|q_proj).weight
    mamba.dt_proj_weight -> mamba.time_proj_1.weight
    mamba.dt_proj_bias -> mamba.shift
    mamba.A_log -> mamba.rate
    mamba.D -> mamba.skip
    mamba.out_proj.weight -> mamba.o_proj.weight
""")
ZAMBA = rows("""
    model.embed_tokens.weight -> embed_tokens.weight
    model.final_layernorm.weight -> norm.weight
    model.layers.1.shared_transf.self_attn.{p}_proj.weight -> layers.1.attention.{p}_proj.weight
    model.layers.1.shared_transf.feed_forward.{p}_proj.weight -> layers.1.geglu.{p}_proj.weight
    model.layers.1.shared_transf.input_layernorm.weight -> layers.1.attention_norm.weight
    model.layers.1.shared_transf.pre_ff_layernorm.weight -> layers.1.geglu_norm.weight
    model.layers.1.linear.weight -> layers.2.t_proj.weight
    model.layers.3.linear.weight -> layers.4.t_proj.weight
""")
for ours, theirs in {0: "0", 2: "1.mamba_decoder", 3: "2", 4: "3.mamba_decoder"}.items():
    ZAMBA += tuple(each.under(f"model.layers.{theirs}.", f"layers.{ours}.") for each in MAMBA)
ZAMBA2 = rows("""
    model.embed_tokens.weight -> embed_tokens.weight
    model.final_layernorm.weight -> norm.weight
    model.layers.{i}.linear.weight -> layers.{i}.t_proj.weight
""")
MAMBA2 = rows("""
    mamba.dt_bias -> {part}.shift
    mamba.A_log -> {part}.rate
    mamba.D -> {part}.skip
    mamba.conv1d.weight -> {part}.(v|k|q)_conv.weight
    mamba.conv1d.bias -> {part}.(v|k|q)_conv.bias
    mamba.in_proj.weight -> {part}.(gate_|v|k|q|time)_proj.weight
    mamba.norm.weight -> {part}.o_norm.weight
    mamba.out_proj.weight -> {part}.o_proj.weight
    input_layernorm.weight -> {part}_norm.weight
""")
SHARED = rows("""
    self_attn.o_proj.weight -> attention.o_linear.o_proj.weight
    self_attn.{p}_proj.weight -> attention.{p}_linear.o_proj.weight
    feed_forward.gate_up_proj.weight -> adapted.(gate|up)_linear.o_proj.weight
    feed_forward.down_proj.weight -> adapted.o_linear.o_proj.weight
    input_layernorm.weight -> y_rms_norm.o_norm.weight
    pre_ff_layernorm.weight -> t_rms_norm.o_norm.weight
""")
ADAPTED = rows("""
    self_attn.linear_{p}_adapter_list.at.{j}.weight -> attention.low_{p}_proj_{j}.weight
    feed_forward.gate_up_proj_adapter_list.at.0.weight -> adapted.low_proj.weight
    feed_forward.gate_up_proj_adapter_list.at.1.weight -> adapted.(gate|up)_proj.weight
""")


def _at(row: Row, theirs: str, ours: str) -> Row:
    """Return a row of a part that is called otherwise in each place."""
    several = tuple(each.replace("{part}", ours) for each in row.ours)
    return Row(row.theirs.replace(".at.", f".{theirs}."), several, row.groups)


for at in range(6):
    own, part = ("", "attn") if at % 2 == 0 else ("mamba_decoder.", "mamba")
    ZAMBA2 += tuple(
        _at(each, "", part).under(f"model.layers.{at}.{own}", f"layers.{at}.") for each in MAMBA2
    )
    shared = "model.layers.1.shared_transformer."
    rows_ = SHARED if at == 1 else ()
    rows_ += tuple(_at(each, str(at // 2), "") for each in ADAPTED) if at % 2 else ()
    ZAMBA2 += tuple(each.under(shared, f"layers.{at}.") for each in rows_)
GLM = rows("""
    model.layers.{i}.post_self_attn_layernorm.weight -> layers.{i}.attn_post_norm.weight
    model.layers.{i}.post_mlp_layernorm.weight -> layers.{i}.ffn_post_norm.weight
""")
APERTUS = rows("""
    model.layers.{i}.attention_layernorm.weight -> layers.{i}.attn_norm.weight
    model.layers.{i}.feedforward_layernorm.weight -> layers.{i}.ffn_norm.weight
    model.layers.{i}.mlp.act_fn.alpha_p -> layers.{i}.ffn.down_xielu.above
    model.layers.{i}.mlp.act_fn.alpha_n -> layers.{i}.ffn.down_xielu.below
    model.layers.{i}.mlp.fc1.weight -> layers.{i}.ffn.up_proj.weight
    model.layers.{i}.mlp.fc2.weight -> layers.{i}.ffn.down_proj.weight
""")
MINICPM = rows("""
    model.layers.{i}.self_attn.q_a_proj.weight -> layers.{i}.attn.q_proj_0.weight
    model.layers.{i}.self_attn.q_a_layernorm.weight -> layers.{i}.attn.q_norm.weight
    model.layers.{i}.self_attn.q_b_proj.weight -> layers.{i}.attn.q_proj_1.weight
    model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight -> layers.{i}.attn.(c|kr)_proj.weight
    model.layers.{i}.self_attn.kv_a_layernorm.weight -> layers.{i}.attn.c_norm.weight
    model.layers.{i}.self_attn.kv_b_proj.weight -> layers.{i}.attn.(k|v)_proj.weight in 4
""")

MOE = rows("""
    model.layers.{i}.mlp.gate.weight -> layers.{i}.ffn.route_proj.weight
    model.layers.{i}.mlp.gate.e_score_correction_bias -> layers.{i}.ffn.bias
    model.layers.{i}.mlp.experts.gate_up_proj -> layers.{i}.ffn.experts.(gate|up)_proj.weight
    model.layers.{i}.mlp.experts.down_proj -> layers.{i}.ffn.experts.down_proj.weight
    model.layers.{i}.mlp.shared_experts.{p}_proj.weight -> layers.{i}.ffn.shared.{p}_proj.weight
""")
GPT_OSS = rows("""
    model.layers.{i}.self_attn.sinks -> layers.{i}.attn.z
    model.layers.{i}.mlp.router.{t} -> layers.{i}.ffn.route_proj.{t}
""") + tuple(
    each.under("model.layers.{i}.mlp.experts.", "layers.{i}.ffn.experts.")
    for each in rows("""
        gate_up_proj -> (gate|up)_proj.weight across in 12
        gate_up_proj_bias -> (gate|up)_proj.bias in 12
        down_proj -> down_proj.weight across
        down_proj_bias -> down_proj.bias
    """)
)
QWEN3_NEXT = rows("""
    model.norm.weight -> norm.w
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
    model.layers.{i}.self_attn.q_norm.weight -> layers.{i}.attn.q_unit_rms.w
    model.layers.{i}.self_attn.k_norm.weight -> layers.{i}.attn.k_unit_rms.w
    model.layers.{i}.self_attn.q_proj.weight -> layers.{i}.attn.(q|g)_proj.weight in 4
    model.layers.{i}.linear_attn.in_proj_qkvz.weight -> layers.{i}.attn.(q|k|v|g)_proj.weight in 2
    model.layers.{i}.linear_attn.in_proj_ba.weight -> layers.{i}.attn.(beta|time)_proj.weight in 2
    model.layers.{i}.linear_attn.conv1d.weight -> layers.{i}.attn.(q|k|v)_conv.weight
    model.layers.{i}.linear_attn.dt_bias -> layers.{i}.attn.time_proj.bias
    model.layers.{i}.linear_attn.A_log -> layers.{i}.attn.rate
    model.layers.{i}.linear_attn.norm.weight -> layers.{i}.attn.o_norm.weight
    model.layers.{i}.linear_attn.out_proj.weight -> layers.{i}.attn.o_proj.weight
    model.layers.{i}.mlp.shared_expert.{p}_proj.weight -> layers.{i}.ffn.shared.{p}_proj.weight
    model.layers.{i}.mlp.shared_expert_gate.weight -> layers.{i}.ffn.open_proj.weight
""")
KIMI = rows("""
    model.layers.{i}.self_attn.conv1d.weight -> layers.{i}.attn.(q|k|v)_conv.weight
    model.layers.{i}.self_attn.forget_gate.f_a_proj.weight -> layers.{i}.attn.time_proj_0.weight
    model.layers.{i}.self_attn.forget_gate.f_b_proj.weight -> layers.{i}.attn.time_proj_1.weight
    model.layers.{i}.self_attn.forget_gate.dt_bias -> layers.{i}.attn.time_proj_1.bias
    model.layers.{i}.self_attn.forget_gate.A_log -> layers.{i}.attn.rate
    model.layers.{i}.self_attn.b_proj.weight -> layers.{i}.attn.beta_proj.weight
    model.layers.{i}.self_attn.g_a_proj.weight -> layers.{i}.attn.g_proj_0.weight
    model.layers.{i}.self_attn.g_b_proj.weight -> layers.{i}.attn.g_proj_1.weight
""")
SMALL = {"moe_intermediate_size": 12, "experts_implementation": "eager"}
CHOSEN = {
    **SMALL,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "norm_topk_prob": True,
}
MODELS: dict[str, Theirs] = {
    "llama": Theirs("llama", PARTS + BEFORE, NARROW),
    "mistral": Theirs("mistral", PARTS + BEFORE, {**NARROW, "sliding_window": 5}),
    "qwen2": Theirs("qwen2", PARTS + BEFORE, {**NARROW, "tie_word_embeddings": True}),
    "qwen3": Theirs("qwen3", PARTS + BEFORE, NARROW),
    "phi3": Theirs(
        "phi3",
        FUSED + PARTS + BEFORE,
        {**NARROW, "sliding_window": 5, "original_max_position_embeddings": 64},
    ),
    "smollm3": Theirs(
        "smollm3",
        PARTS + BEFORE,
        {**NARROW, "num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]},
    ),
    "gemma2": Theirs(
        "gemma2",
        GEMMA + PARTS,
        {
            **NARROW,
            "hidden_size": 36,  # theirs rounds its root to float32
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 5,
            "layer_types": [LOCAL, FULL],
        },
    ),
    "gemma3": Theirs(
        "gemma3_text",
        GEMMA + PARTS,
        {
            **NARROW,
            "hidden_size": 36,  # theirs rounds its root to float32
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 9,
            "sliding_window": 5,
            "layer_types": [LOCAL, LOCAL, FULL],
            "rope_parameters": {LOCAL: turning(1e4), FULL: turning(1e6)},
        },
    ),
    "olmo2": Theirs("olmo2", PARTS + AFTER, NARROW),
    "cohere2": Theirs(
        "cohere2",
        COHERE + PARTS,
        {
            **NARROW,
            "num_hidden_layers": 4,
            "logit_scale": 0.25,
            "sliding_window": 5,
            "layer_types": [LOCAL, LOCAL, LOCAL, FULL],
        },
    ),
    "granite": Theirs(
        "granite",
        PARTS + BEFORE,
        {
            **NARROW,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
        },
    ),
    "gpt2": Theirs("gpt2", GPT2, {"n_inner": 40}),
    "gptj": Theirs("gptj", GPTJ, {"n_inner": 40, "rotary_dim": 4}),
    "gpt_neox": Theirs("gpt_neox", NEOX, {"rope_parameters": PARTLY}),
    "falcon": Theirs("falcon", FALCON_7B + BLOOM, {"ffn_hidden_size": 40}),
    "falcon_40b": Theirs(
        "falcon",
        FALCON_40B + BLOOM,
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
    ),
    "falcon_rw": Theirs(
        "falcon",
        BLOOM,
        {
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": 40,
        },
        attention="sdpa",  # their eager one adds the penalty twice
    ),
    "bloom": Theirs("bloom", BLOOM, positions=False),
    "mpt": Theirs("mpt", MPT, positions=False),
    "phi": Theirs("phi", PHI + ONE_NORM + PARTS, {"rope_parameters": PARTLY}),
    "stablelm": Theirs(
        "stablelm",
        STABLELM + ONE_NORM + PARTS,
        {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": PARTLY},
    ),
    "nemotron": Theirs("nemotron", NEMOTRON + PARTS, {"rope_parameters": PARTLY}),
    "lfm2": Theirs(
        "lfm2",
        LFM + PARTS,
        {
            "norm_eps": 1e-6,
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": 3,
            "layer_types": ["conv", FULL],
        },
    ),
    "lfm3": Theirs(
        "lfm3",
        LFM + PARTS,
        {
            **NARROW,
            "num_hidden_layers": 3,
            "norm_eps": 1e-6,
            "conv_L_cache": 4,
            "sliding_window": 5,
            "layer_types": ["conv", LOCAL, FULL],
            "rope_parameters": {
                LOCAL: turning(1e4),
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                },
            },
        },
    ),
    "hrm_text": Theirs(
        "hrm_text",
        HRM,
        {
            "num_hidden_layers": 1,
            "head_dim": 8,
            "H_cycles": 2,
            "L_cycles": 3,
            "L_bp_cycles": [3, 3],
            "embedding_scale": 5.0,
        },
    ),
    "gemma4": Theirs(
        "gemma4_text",
        GEMMA4 + AFTER + PARTS,
        {
            **NARROW,
            "hidden_size": 36,
            "num_hidden_layers": 3,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 5,
            "layer_types": [LOCAL, LOCAL, FULL],
            "rope_parameters": {
                LOCAL: turning(1e4),
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                },
            },
        },
    ),
    "gemma4_e2b": Theirs(
        "gemma4_text",
        GEMMA4_E2B + AFTER + PARTS,
        {
            **NARROW,
            "hidden_size": 36,
            "num_hidden_layers": 5,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 61,
            "num_kv_shared_layers": 2,
            "final_logit_softcapping": 3.0,
            "sliding_window": 5,
            "layer_types": [LOCAL, FULL, LOCAL, LOCAL, FULL],
            "rope_parameters": {
                LOCAL: turning(1e4),
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                },
            },
        },
    ),
    "muse_spark": Theirs(
        "muse_spark",
        MUSE,
        {
            "text_config": {
                **SIZES,
                **NARROW,
                "num_hidden_layers": 3,
                "mlp_layer_types": ["dense"] * 3,
                "layer_types": [LOCAL, LOCAL, FULL],
                "layer_rope_theta": [1e4, 1e4, 0],
                "sliding_window": 5,
                "qk_scale_factor": 5.0,
                "output_multiplier": 0.5,
                "final_logit_softcapping": 3.0,
            },
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_attention_heads": 1,
                "pos_emb_height": 2,
                "pos_emb_width": 2,
            },
            "audio_config": {
                "hidden_sizes": [4],
                "depths": [1],
                "patch_sizes": [2],
                "num_hidden_layers": 1,
                "out_hidden_size": 32,
            },
            "out_hidden_size": 8,
            "projector_hidden_size": 8,
        },
        auto="AutoModelForImageTextToText",
    ),
    "zamba": Theirs(
        "zamba",
        ZAMBA,
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 3,
            "layers_block_type": ["mamba", "hybrid"] * 2,
        },
        positions=False,
    ),
    "zamba2": Theirs(
        "zamba2",
        ZAMBA2,
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 4,
            "n_mamba_heads": 4,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "layers_block_type": ["mamba", "hybrid"] * 3,
            "use_shared_attention_adapter": True,
            "adapter_rank": 3,
            "use_mem_rope": True,
        },
    ),
    "olmo": Theirs("olmo", PARTS, {**NARROW, "clip_qkv": 0.8}),
    "nanochat": Theirs("nanochat", APERTUS + PARTS, {**NARROW, "final_logit_softcapping": 3.0}),
    "glm4": Theirs(
        "glm4",
        FUSED + GLM + BEFORE + PARTS,
        {"head_dim": 8, "attention_bias": True, "rope_parameters": PARTLY},
    ),
    "apertus": Theirs("apertus", APERTUS + PARTS, {**NARROW, "hidden_act": "xielu"}),
    "minicpm3": Theirs(
        "minicpm3",
        MINICPM + PARTS + BEFORE,
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "kv_lora_rank": 9,
            "q_lora_rank": 11,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 8,
        },
    ),
    "mixtral": Theirs(
        "mixtral",
        MOE + PARTS + BEFORE,
        {
            **NARROW,
            "intermediate_size": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    "qwen3_moe": Theirs(
        "qwen3_moe",
        MOE + PARTS + BEFORE,
        {
            **NARROW,
            **SMALL,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": Theirs(
        "olmoe",
        MOE + PARTS + BEFORE,
        {
            "intermediate_size": 12,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "experts_implementation": "eager",
        },
    ),
    "gpt_oss": Theirs(
        "gpt_oss",
        GPT_OSS + PARTS + BEFORE,
        {
            **NARROW,
            "intermediate_size": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": [LOCAL, FULL],
            "experts_implementation": "eager",
        },
    ),
    "glm4_moe": Theirs(
        "glm4_moe",
        MOE + PARTS + BEFORE,
        {
            **CHOSEN,
            "head_dim": 8,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
            "rope_parameters": PARTLY,
        },
    ),
    "dots1": Theirs(
        "dots1",
        MOE + PARTS + BEFORE,
        {**CHOSEN, **NARROW, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v3": Theirs(
        "deepseek_v3",
        MINICPM + MOE + PARTS + BEFORE,
        {
            **CHOSEN,
            "num_key_value_heads": 4,
            "num_local_experts": 12,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 9,
            "q_lora_rank": 11,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "rope_interleave": True,
        },
    ),
    "qwen3_next": Theirs(
        "qwen3_next",
        QWEN3_NEXT + MOE + PARTS,
        {
            **SMALL,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 14,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "rope_parameters": PARTLY,
        },
    ),
    "kimi_linear": Theirs(
        "kimi_linear",
        KIMI + MINICPM + MOE + PARTS + BEFORE,
        {
            **CHOSEN,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "linear_attention", FULL],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 9,
            "q_lora_rank": None,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "linear_num_heads": 4,
            "linear_head_dim": 6,
        },
    ),
}
