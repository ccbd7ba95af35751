"""What settings are called elsewhere, and how Loom says them.

    num_attention_heads = 8        help: write `heads = 8`
    rope = true                    help: write `position = rope`
    num_layers = 6, in a block     help: in a model, write `layers = [NAME] * 6`

The tables are all there is to it: a name as papers and other frameworks write it, the setting,
and its value, in which `{}` is what was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from ...grammar.diagnostics import did_you_mean
from ...grammar.show import show
from ...grammar.syntax import Name, Setting

Owner = Literal["block", "model"]
Spelling = tuple[str, str]  # a setting and its value

_NOTHING = frozenset((Name("false"), Name("none"), Name("None"), Name("False"), Name("null")))


def _rows(*rows: tuple[str, str, str]) -> Iterator[tuple[str, Spelling]]:
    """Yield each of the names in a row with the setting and the value that stand beside them."""
    return ((name, (setting, value)) for names, setting, value in rows for name in names.split())


_WIDTH = (
    "hidden_size d_model embed_dim dim n_embd n_embed model_dim hidden_dim emb_dim embedding_dim"
)

BLOCK: dict[str, Spelling] = dict(_rows(
    ("num_heads n_head n_heads nhead num_attention_heads num_q_heads num_query_heads q_heads"
     " query_heads head_count", "heads", "{}"),
    ("num_kv_heads num_key_value_heads n_kv_head n_kv_heads key_value_heads",
     "kv_heads", "{}"),
    ("num_v_heads n_v_heads v_heads num_value_heads", "value_heads", "{}"),
    (_WIDTH, "width", "{}"),
    ("kdim context_dim cross_attention_dim encoder_dim", "context_width", "{}"),
    ("d_head dim_head head_size d_k dim_key key_dim qk_head_dim attention_head_dim d_qk",
     "head_dim", "{}"),
    ("d_v dim_value v_head_dim head_v_dim", "value_dim", "{}"),
    ("causal is_causal autoregressive is_decoder unidirectional", "mask", "causal"),
    ("bidirectional", "mask", "all"),
    ("attn_mask attention_mask", "mask", "{}"),
    ("sliding_window window_size window attention_window local_window local_window_size"
     " local_attn_window_size", "mask", "causal and window({})"),
    ("sink_size num_sinks n_sink num_sink_tokens", "mask", "causal and (window(256) or sink({}))"),
    ("attention_sink attention_sinks sinks", "normalize", "sink"),
    ("dropout_p attn_dropout attention_dropout attn_pdrop attn_drop attention_dropout_prob"
     " dropout_rate", "dropout", "{}"),
    ("softcap soft_cap logit_softcapping attn_logit_softcapping attn_logit_softcap logit_cap"
     " logits_soft_cap", "score", "softcap({})"),
    ("temperature", "score", "s / {}"),
    ("sm_scale softmax_scale scaling attn_scale attention_scale", "scale", "{}"),
    ("query_pre_attn_scalar", "scale", "{} ** -0.5"),
    ("qk_norm use_qk_norm qk_layernorm q_norm", "q", "x | linear | split | rms_norm"),
    ("k_norm", "k", "x | linear | split | rms_norm"),
    ("alibi use_alibi", "position", "alibi"),
    ("rope use_rope rotary use_rotary rotary_emb rotary_pos_emb", "position", "rope"),
    ("rope_scaling rope_factor", "position", "rope(scaling = {})"),
    ("rope_theta rope_base rotary_base rotary_emb_base rope_freq_base", "position",
     "rope(theta = {})"),
    ("rotary_dim rope_dim qk_rope_head_dim rotary_ndims", "position", "rope(dims = {})"),
    ("relative_position relative_attention relative_attention_num_buckets rel_pos_bias"
     " position_bias", "position", "relative"),
    ("position_embedding position_embedding_type pos_emb pos_encoding positional_encoding",
     "position", "{}"),
    ("bias use_bias qkv_bias attention_bias attn_bias use_qkv_bias", "q",
     "x | linear(bias = true) | split"),
    ("cross_attention is_cross_attention cross_attend add_cross_attention", "source", "context"),
    ("activation gate gating output_gate use_gate", "out",
     "o | merge | gate(x | linear | sigmoid) | linear"),
    ("attention attention_type attn_type mixer", "mix", "{}"),
))  # fmt: skip

MODEL: dict[str, Spelling] = dict(_rows(
    ("num_layers n_layer n_layers num_hidden_layers depth num_blocks n_block blocks", "layers",
     "[NAME] * {}"),
    ("vocab_size n_vocab num_tokens num_embeddings", "vocab", "{}"),
    (_WIDTH, "width", "{}"),
    ("hidden_act activation activation_function act_fn", "ffn", "swiglu(8/3)"),
    ("mlp_ratio ffn_ratio expansion_factor ffn_mult", "ffn", "gelu({})"),
    ("intermediate_size ffn_dim d_ff dim_feedforward n_inner ffn_hidden_size mlp_dim", "ffn",
     "swiglu({} / width)"),
    ("mlp feed_forward feedforward", "ffn", "swiglu(8/3)"),
    ("tie_word_embeddings tie_embeddings tie_weights weight_tying tied", "tie", "true"),
    ("norm_type normalization rms_norm rmsnorm use_rms_norm", "norm", "rms"),
    ("layer_norm layernorm", "norm", "layer"),
    ("max_position_embeddings max_seq_len max_length block_size n_positions n_ctx context_length"
     " seq_len max_len", "embed_position", "learned({})"),
    ("resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob resid_dropout dropout_p"
     " dropout_rate", "dropout", "{}"),
    ("num_classes n_classes num_labels", "head", "classify({})"),
    ("cross_encoder encoder_model", "encoder", "{}"),
))  # fmt: skip


def instead(
    setting: Setting, owner: Owner, known: Collection[str], elsewhere: Collection[str] = ()
) -> str:
    """Return what to write for a setting that a block (or a branch) or a model does not have.

    `known` are its settings, `elsewhere` those of the other kind.
    """
    own, table, other = (BLOCK, MODEL, "model") if owner == "block" else (MODEL, BLOCK, "block")
    if setting.name in own:
        return _said(setting, *own[setting.name])
    if setting.name in table:
        return f"in a {other}, {_said(setting, *table[setting.name])}"
    if setting.name in elsewhere or setting.name in {name for name, _ in table.values()}:
        there = f"`{setting.name}` is a setting of a {other}"
        close = did_you_mean(setting.name, known)
        return f"{close} {there}" if close else there
    return did_you_mean(setting.name, known)


def _said(setting: Setting, name: str, value: str) -> str:
    """Return `write …` in the form, Loom or YAML, in which the setting stands."""
    written = setting.span.source.text[setting.span.start :].lstrip("\"'")
    rest = written.removeprefix(setting.name).lstrip("\"' ")
    mark = ": " if rest.startswith(":") else " = "
    if value != "{}" and setting.value in _NOTHING:
        return f"leave it out; with `{name}{mark}{value.format('…')}` it would be there"
    return f"write `{name}{mark}{value.format(show(setting.value))}`"
