"""Mechanisms of the zoo that choose by content, against layers of Hugging Face Transformers, and
flash-linear-attention's native sparse attention.

Compared are the output and the gradients of the input and of every weight, in float64. Theirs
choose under `no_grad`, as ours do: an indexer has no gradient.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from .others import file_of
from .test_along import Layer, assert_same, hidden, models, module_of, out, split, turns

LENGTHS = (1, 9, 26)


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines as layers with halves take them, [1, n, size]."""
    return tuple(torch.cat([each, each], -1) for each in turns(tokens, size))  # type: ignore[return-value]


def dma(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.0,
        keep_window_size=5, attention_bias=False, rms_norm_eps=1e-6, _attn_implementation="eager",
    )  # fmt: skip
    layer = models("doge").DogeAttention(config).double()
    ours = {f"{part}_proj.weight": getattr(m, f"{part}_proj").weight for part in "qkvo"}
    ours |= {f"{part}_norm.weight": getattr(m, f"{part}_norm").weight for part in "qk"}
    ours |= {"A": m.a, "dt_proj.weight": m.gate_proj.weight}
    assert ours.keys() == dict(layer.named_parameters()).keys()
    n = x.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    return functional_call(layer, ours, (x, angles(n, 8), mask))[0]


def deepseek_sparse(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_dropout=0.0,
        q_lora_rank=20, qk_rope_head_dim=4, kv_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8,
        attention_bias=False, rope_parameters={"rope_type": "default"}, index_n_heads=16,
        index_head_dim=8, index_topk=5, _attn_implementation="eager",
    )  # fmt: skip
    layer = models("deepseek_v32").DeepseekV32Attention(config, 0).double()
    by_heads = [each.weight.unflatten(0, (4, 8)) for each in (m.k_proj, m.v_proj)]
    ours = {
        "q_a_proj.weight": m.asked_proj.weight,
        "q_a_layernorm.weight": m.asked_norm.weight,
        "q_b_proj.weight": m.q_proj.weight,
        "kv_a_proj_with_mqa.weight": torch.cat([m.latent_proj.weight, m.turned_proj.weight]),
        "kv_a_layernorm.weight": m.latent_norm.weight,
        "kv_b_proj.weight": torch.cat(by_heads, 1).flatten(0, 1),
        "o_proj.weight": m.o_proj.weight,
        "indexer.wq_b.weight": m.indexing_proj.weight,
        "indexer.wk.weight": m.indexed_proj.weight,
        "indexer.k_norm.weight": m.indexed_norm.weight,
        "indexer.k_norm.bias": m.indexed_norm.bias,
        "indexer.weights_proj.weight": m.weight_proj.weight,
    }
    assert ours.keys() == dict(layer.named_parameters()).keys()
    mask = hidden(x.shape[1])[None, None].expand(len(x), -1, -1, -1)
    return functional_call(layer, ours, (x, angles(x.shape[1], 4), mask))[0]


def block_indexer(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_dropout=0.0, rms_norm_eps=1e-6, layer_types=["minimax_m3_sparse"],
        index_head_dim=8, index_n_heads=2, index_block_size=4, index_topk_blocks=3,
        index_local_blocks=1, _attn_implementation="eager",
    )  # fmt: skip
    layer = models("minimax_m3_vl").MiniMaxM3VLAttention(config, 0).double()
    ours = {f"{part}_proj.weight": getattr(m, f"{part}_proj").weight for part in "qkvo"}
    ours |= {f"{part}_norm.weight": getattr(m, f"{part}_norm").weight - 1 for part in "qk"}
    for part, name in (("q", "indexing"), ("k", "indexed")):
        ours[f"indexer.{part}_proj.weight"] = getattr(m, f"{name}_proj").weight
        ours[f"indexer.{part}_norm.weight"] = getattr(m, f"{name}_norm").weight - 1
    assert ours.keys() == dict(layer.named_parameters()).keys()
    return functional_call(layer, ours, (x, angles(x.shape[1], 4), None))[0]


def pooled_indexer(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_dropout=0.0, rms_norm_eps=1e-6, attention_bias=False, indexer_n_heads=2,
        indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=4,
        _attn_implementation="eager",
    )  # fmt: skip
    layer = models("qwen4_exp").Qwen4ExpTextAttention(config, 0).double()
    both = [each.weight.unflatten(0, (4, 8)) for each in (m.q_proj, m.open_proj)]
    ours = {f"{part}_proj.weight": getattr(m, f"{part}_proj").weight for part in "kvo"}
    ours |= {f"{part}_norm.weight": getattr(m, f"{part}_norm").weight - 1 for part in "qk"}
    ours["q_proj.weight"] = torch.cat(both, 1).flatten(0, 1)
    ours["indexer.index_qk_proj.weight"] = torch.cat(
        [m.indexing_proj.weight, m.indexed_proj.weight]
    )
    ours["indexer.q_layernorm.weight"] = m.indexing_norm.weight - 1
    ours["indexer.k_layernorm.weight"] = m.indexed_norm.weight - 1
    assert ours.keys() == dict(layer.named_parameters()).keys()
    n = x.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril().expand(len(x), 1, n, n)
    plain = hidden(n).expand(len(x), 1, n, n)
    turned = [each.expand(len(x), -1, -1) for each in angles(n, 8)]
    with_mask = torch.where(mask, plain, torch.finfo(x.dtype).min)
    y: Tensor = functional_call(layer, ours, (x, turned, with_mask))[0]
    return y


def gated_indexer(m: Any, x: Tensor) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_dropout=0.0,
        q_lora_rank=20, qk_rope_head_dim=4, kv_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8,
        attention_bias=False, index_n_heads=16, index_head_dim=8, index_topk=8, index_kpool=4,
        index_kpool_always_select_tail=True, indexer_types=["full"],
        rms_norm_eps=1e-6, _attn_implementation="eager",
    )  # fmt: skip
    layer = models("glm5_next").Glm5NextTextAttention(config, 0).double()
    by_heads = [each.weight.unflatten(0, (4, 8)) for each in (m.k_proj, m.v_proj)]
    ours = {
        "q_a_proj.weight": m.asked_proj.weight,
        "q_a_layernorm.weight": m.asked_norm.weight,
        "q_b_proj.weight": m.q_proj.weight,
        "kv_a_proj_with_mqa.weight": torch.cat([m.latent_proj.weight, m.beside_proj.weight]),
        "kv_a_layernorm.weight": m.latent_norm.weight,
        "kv_b_proj.weight": torch.cat(by_heads, 1).flatten(0, 1),
        "o_proj.weight": m.o_proj.weight,
        "indexer.wq_b.weight": m.indexing_proj.weight,
        "indexer.wk.weight": m.told_proj.weight,
        "indexer.k_norm.weight": m.told_norm.weight,
        "indexer.k_norm.bias": m.told_norm.bias,
        "indexer.weights_proj.weight": m.weight_proj.weight,
        "indexer.index_kpool_compress_ape": m.bias,
        "indexer.index_kpool_compress_gate": m.gate_proj.weight,
    }
    assert ours.keys() == dict(layer.named_parameters()).keys()
    there = torch.ones(x.shape[:2], dtype=torch.bool)
    found: Tensor = functional_call(layer, ours, (x, there))[0]
    return found


def nsa_means(m: Any, x: Tensor) -> Tensor:
    """Their parts; the window is FlashAttention's there, and plain attention here."""
    naive, n = naive_nsa(), x.shape[1]
    q, k, v = (split(proj(x), h) for proj, h in ((m.q_proj, 4), (m.k_proj, 2), (m.v_proj, 2)))
    cos, sin = (each[:, :, None] for each in angles(n, 8))
    q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
    gates = [getattr(m, f"to_{name}_proj")(x).sigmoid() for name in ("means", "chosen", "last")]
    means = [torch.stack([part.mean(1) for part in t.split(4, 1)], 1) for t in (k, v)]
    blocks = naive.naive_nsa_topk(q, means[0], 4, 4, 8**-0.5)
    found = gates[0][..., None] * naive.naive_nsa_compression(q, *means, 4, 8**-0.5)[0]
    found = found + gates[1][..., None] * selected_by(naive, q, k, v, blocks)
    k, v = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    p = (q.transpose(1, 2) @ k.mT / 8**0.5 + hidden(n, 4)).softmax(-1)
    mixed: Tensor = found + gates[2][..., None] * (p @ v).transpose(1, 2)
    return out(m, mixed)


def selected_by(naive: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """Theirs writes into zeros of the values' shape, which makes it one in place."""
    found: Tensor = naive.naive_nsa_selection(q, k, v, blocks, 4, 8**-0.5)
    return found


def naive_nsa() -> Any:
    """Load their file without its kernels, which ask for a GPU."""
    names = ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling")
    known = {name: ModuleType(name) for name in names}
    known["fla.ops.utils"].prepare_chunk_offsets = None  # type: ignore[attr-defined]
    known["fla.ops.utils.pooling"].mean_pooling = None  # type: ignore[attr-defined]
    with patch.dict(sys.modules, known), warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of FlashAttention
        return file_of("fla-core", "fla/ops/nsa/naive.py")


def compressed(name: str, m: Any, x: Tensor, ours: dict[str, Tensor], **more: Any) -> Tensor:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, head_dim=12, sliding_window=7, attention_dropout=0.0,
        q_lora_rank=20, rms_norm_eps=1e-6, o_groups=2, o_lora_rank=6, layer_types=[name],
        compress_rates={name: 4}, max_position_embeddings=64, _attn_implementation="eager",
        rope_parameters={"compress": {"rope_type": "default", "rope_theta": 10_000.0,
                                      "partial_rotary_factor": 1 / 3}},
        **more,
    )  # fmt: skip
    layer = models("deepseek_v4").DeepseekV4Attention(config, 0).double()
    ours |= {
        "kv_proj.weight": m.both_proj.weight,
        "kv_norm.weight": m.both_norm.weight,
        "o_a_proj.weight": m.o_proj_0.weight.flatten(0, 1),
        "o_b_proj.weight": m.o_proj_1.weight,
        "sinks": m.near_sink_z,
    }
    assert ours.keys() == dict(layer.named_parameters()).keys()
    n = x.shape[1]
    at = torch.arange(n).expand(len(x), -1)
    near = hidden(n, 7).expand(len(x), 1, n, n)
    found: Tensor = functional_call(layer, ours, (x, {"compress": turns(n, 4)}, at, near))[0]
    return found


def heavily_compressed(m: Any, x: Tensor) -> Tensor:
    ours = {
        "q_a_proj.weight": m.q_proj_0.weight,
        "q_a_norm.weight": m.q_norm.weight,
        "q_b_proj.weight": m.q_proj_1.weight,
        "compressor.position_bias": m.bias,
        "compressor.kv_proj.weight": m.told_proj.weight,
        "compressor.gate_proj.weight": m.gate_proj.weight,
        "compressor.kv_norm.weight": m.entry_norm.weight,
    }
    return compressed("heavily_compressed_attention", m, x, ours)


def compressed_sparse(m: Any, x: Tensor) -> Tensor:
    ours = {
        "q_a_proj.weight": m.asked_proj.weight,
        "q_a_norm.weight": m.asked_norm.weight,
        "q_b_proj.weight": m.q_proj.weight,
        "compressor.kv_norm.weight": m.entry_norm.weight,
        "compressor.indexer.kv_norm.weight": m.indexed_norm.weight,
        "compressor.indexer.q_b_proj.weight": m.indexing_proj.weight,
        "compressor.indexer.scorer.weights_proj.weight": m.weight_proj.weight,
    }
    for theirs, mine, bias in (
        ("compressor", "", m.bias), ("compressor.indexer", "index_", m.index_bias),
    ):  # fmt: skip
        for part, name in (("kv", mine), ("gate", f"{mine}gate_")):
            both = [getattr(m, f"{name}{half}_proj").weight for half in ("before", "own")]
            ours[f"{theirs}.{part}_proj.weight"] = torch.cat(both)
        ours[f"{theirs}.position_bias"] = torch.cat([bias[:4], bias[4:]], -1)
    return compressed(
        "compressed_sparse_attention", m, x, ours, index_n_heads=16, index_head_dim=8, index_topk=2
    )


# Where no head of an indexer is positive the sums are equal, and theirs takes any of equal keys.
HEADS = (("2 * 8", "16 * 8"), ("split(2)", "split(16)"), ("linear(2)", "linear(16)"))
MORE = {"deepseek_sparse": HEADS, "compressed_sparse": HEADS, "gated_indexer": HEADS}
LAYERS: dict[str, Layer] = {
    each.__name__: each
    for each in (dma, deepseek_sparse, block_indexer, pooled_indexer, gated_indexer,
                 heavily_compressed, compressed_sparse, nsa_means)
}  # fmt: skip


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_their_layer(name: str, tokens: int) -> None:
    assert_same(module_of(name, *MORE.get(name, ())), LAYERS[name], tokens)
