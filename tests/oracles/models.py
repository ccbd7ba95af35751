"""Whole language models of Hugging Face Transformers: how they are made tiny, and what is named how.

A model in `examples/models` and one of theirs have the same tensors under other names. Lines say
which: `theirs -> ours`, in which `{i}` is a number and any other name a word; the first line that
fits counts. What holds several of ours names them in brackets, `(q|k|v)_proj`, its rows one after
the other; with `in 4` they are laid so in each of four groups. `across` is a matrix transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

DIGITS, WORD = r"\d+", r"\w+"


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and what it is of ours."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    across: bool = False

    def moved(
        self, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor] | None:
        """Return a tensor of theirs under our names; None where the name is another one."""
        found = _pattern(self.theirs).fullmatch(name)
        if found is None:
            return None
        ours = [each.format(**found.groupdict()) for each in self.ours]
        if self.across and tensor.ndim == 2:
            tensor = tensor.mT
        if len(ours) == 1:
            return {ours[0]: tensor.reshape(shapes[ours[0]])}
        sizes = [shapes[each][0] // self.groups for each in ours]
        parts = tensor.unflatten(0, (self.groups, -1)).split(sizes, 1)
        return {key: part.flatten(0, 1) for key, part in zip(ours, parts, strict=True)}


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", text)
    kinds = [f"(?P<{each}>{DIGITS if each == 'i' else WORD})" for each in parts[1::2]]
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
            done.append(Row(theirs, several, groups, "across" in rest))
    return tuple(done)


def moved(
    rows: Iterable[Row], theirs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return tensors of theirs (weights or gradients) under our names, none of them left out."""
    done: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        each = next((got for row in rows if (got := row.moved(name, tensor, shapes))), None)
        assert each is not None, f"no row for {name}"
        assert not each.keys() & done.keys(), f"{name} goes where another one went"
        done |= each
    return done


@dataclass(frozen=True)
class Theirs:
    """How to make one of their models: its kind, the names, what its configuration says."""

    kind: str
    rows: tuple[Row, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    positions: bool = True  # whether a call takes `position_ids`


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
QKV = "transformer.h.{i}.self_attention.query_key_value.weight -> layers.{i}.attn.(q|k|v)_proj.weight"
FALCON_7B = rows(f"""
    {QKV}
    transformer.h.{{i}}.input_layernorm.{{t}} -> layers.{{i}}.y_norm.{{t}}
""")
FALCON_40B = rows(f"{QKV} in 2")
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
NEMOTRON = rows("""
    model.norm.weight -> norm.w
    model.norm.bias -> norm.b
    model.layers.{i}.input_layernorm.weight -> layers.{i}.attn_norm.w
    model.layers.{i}.input_layernorm.bias -> layers.{i}.attn_norm.b
    model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.ffn_norm.w
    model.layers.{i}.post_attention_layernorm.bias -> layers.{i}.ffn_norm.b
""")

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
    ),
    "bloom": Theirs("bloom", BLOOM, positions=False),
    "mpt": Theirs("mpt", MPT, positions=False),
    "phi": Theirs("phi", PHI + ONE_NORM + PARTS, {"rope_parameters": PARTLY}),
    "stablelm": Theirs(
        "stablelm",
        ONE_NORM + PARTS,
        {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": PARTLY},
    ),
    "nemotron": Theirs("nemotron", NEMOTRON + PARTS, {"rope_parameters": PARTLY}),
}
