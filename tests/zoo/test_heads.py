"""Families `heads` and `cross`: how queries, keys and values are made and shared."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from .mechanisms import MHA, Mechanism, assert_close, causal, softmax, tokens

X = tokens()


def repeated(weight: torch.Tensor, heads: int, times: int) -> torch.Tensor:
    """Copy each head's rows of a projection, in place."""
    return weight.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)


def test_mha_is_torchs_attention():
    mechanism = Mechanism("mha")
    q, k, v = (mechanism.streams(X)[name] for name in "qkv")
    assert_close(mechanism.mixed(X), scaled_dot_product_attention(q, k, v, is_causal=True))


def test_mha_of_one_token_is_its_value():
    mechanism = Mechanism("mha")
    x = tokens(1)
    assert_close(mechanism.mixed(x), mechanism.streams(x)["v"])


def test_87_mqa_is_mha_with_one_head_copied():
    mqa = Mechanism("mqa")
    mha = Mechanism("mqa", ("kv_heads = 1", "kv_heads = 4"), like=mqa)
    mha.set(
        **{
            f"{name}_proj_weight": repeated(mqa.parameter(f"{name}_proj.weight"), 1, 4)
            for name in "kv"
        }
    )
    assert_close(mqa(X), mha(X))


def test_87_mqa_is_torchs_grouped_attention():
    mechanism = Mechanism("mqa")
    q, k, v = (mechanism.streams(X)[name] for name in "qkv")
    assert k.shape[1] == v.shape[1] == 1
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(mechanism.mixed(X), theirs)


def test_87_mqa_with_one_head_left_in_the_output():
    mechanism = Mechanism("mqa")
    out = mechanism.parameter("o_proj.weight").clone()
    out[:, 8:] = 0
    alone = mechanism.mixed(X)[:, 0] @ out[:, :8].mT
    assert_close(mechanism.set(o_proj_weight=out)(X), alone)


def test_gqa_repeats_heads_in_place():
    gqa = Mechanism("gqa")
    mha = Mechanism("gqa", ("kv_heads = 2", "kv_heads = 4"), like=gqa)
    mha.set(
        **{
            f"{name}_proj_weight": repeated(gqa.parameter(f"{name}_proj.weight"), 2, 2)
            for name in "kv"
        }
    )
    assert_close(gqa(X), mha(X))


def test_gqa_of_one_group_is_mqa():
    gqa = Mechanism("gqa", ("kv_heads = 2", "kv_heads = 1"))
    mqa = Mechanism("mqa", ("mask     = causal", "mask = causal; position = rope"), like=gqa)
    assert_close(gqa(X), mqa(X))


def test_66_heads_of_the_usual_size_are_mha():
    usual = Mechanism("fixed_head_size", ("head_dim = 24", "head_dim = 8"))
    assert_close(usual(X), Mechanism(MHA.replace("; mask = causal", ""), like=usual)(X))


def test_66_the_rank_of_the_logits_is_bounded_by_the_head():
    x = tokens(20, batch=1)
    small = Mechanism("fixed_head_size", ("head_dim = 24", "head_dim = 4"))
    large = Mechanism("fixed_head_size")
    assert torch.linalg.matrix_rank(small.logits(x)).tolist() == [[4] * 4]
    assert torch.linalg.matrix_rank(large.logits(x)).tolist() == [[20] * 4]


def test_66_a_head_as_wide_as_the_sequence_reaches_any_map():
    n = 24
    wanted = torch.rand(n, n, dtype=torch.float64).softmax(-1)
    mechanism = Mechanism("fixed_head_size", ("width    = 32", "width = 24"))
    query = (wanted.log() * n**0.5).mT.repeat(4, 1)  # one head's rows: Wq x = √d · log A[i]
    mechanism.set(q_proj_weight=query, k_proj_weight=torch.eye(n).repeat(4, 1))
    found = mechanism.weights(torch.eye(n, dtype=torch.float64)[None])
    assert_close(found, wanted.expand_as(found))


def test_144_as_many_key_heads_as_value_heads_are_gqa():
    few = Mechanism("diffqkv")
    gqa = Mechanism("diffqkv", ("kv_heads    = 2", "kv_heads    = 4"), like=few)
    gqa.set(k_proj_weight=repeated(few.parameter("k_proj.weight"), 2, 2))
    x = tokens(width=64)
    assert_close(few(x), gqa(x))


def test_144_the_heads_each_query_reads():
    mechanism = Mechanism("diffqkv")
    x = tokens(width=64)
    streams = mechanism.streams(x)
    q, k, v = (streams[name] for name in "qkv")
    read = scaled_dot_product_attention(
        q, k.repeat_interleave(4, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    assert_close(mechanism.mixed(x), read)
    assert mechanism.parameter("k_proj.weight").shape == (2 * 8, 64)
    assert mechanism.parameter("v_proj.weight").shape == (4 * 8, 64)


def test_mla_scores_in_the_latent_are_the_same():
    """The absorbed form: q W_uk meets the latent itself, the rotary key is added."""
    mechanism = Mechanism("mla")
    x = tokens(width=64)
    streams = mechanism.streams(x)
    up = mechanism.parameter("k_proj.weight").unflatten(0, (4, 16))
    absorbed = torch.einsum("bhid,hdc->bhic", streams["q"][..., :16], up)
    s = torch.einsum("bhic,bjc->bhij", absorbed, streams["c"])
    s = s + streams["q"][..., 16:] @ streams["kr"][:, :1].mT
    assert_close(mechanism.weights(x), softmax(24**-0.5 * s))


def test_mla_shares_one_rotary_key():
    streams = Mechanism("mla").streams(tokens(width=64))
    assert_close(streams["kr"], streams["kr"][:, :1].expand_as(streams["kr"]))
    assert streams["v"].shape[-1] == 16 < streams["k"].shape[-1]


def test_14_the_output_absorbs_the_values_map():
    optimised = Mechanism("optimised_attention")
    identity = Mechanism(
        "optimised_attention", ("v     = x | split", "v = x | linear | split"), like=optimised
    ).set(v_proj_weight=torch.eye(32))
    assert_close(optimised(X), identity(X))


def test_14_of_one_head_any_values_map_is_absorbed():
    mapped = Mechanism(
        "optimised_attention",
        ("v     = x | split", "v = x | linear | split"),
        ("heads = 4", "heads = 1"),
    )
    absorbed = Mechanism("optimised_attention", ("heads = 4", "heads = 1"), like=mapped)
    absorbed.set(
        o_proj_weight=mapped.parameter("o_proj.weight") @ mapped.parameter("v_proj.weight")
    )
    assert_close(mapped(X), absorbed(X))


def test_14_efficient_is_optimised_with_keys_as_they_are():
    efficient = Mechanism("efficient_slices")
    optimised = Mechanism("optimised_attention", like=efficient)
    optimised.set(k_proj_weight=torch.eye(32), k_proj_bias=0)
    assert_close(efficient(X), optimised(X))


def test_14_efficient_keeps_the_input_once():
    from headloom.compiler.facts.cost import cost

    assert cost(Mechanism("efficient_slices").block).cache_bytes(10) == 10 * 32 * 4


def test_41_all_heads_on_are_mha():
    pruned = Mechanism("head_pruning", ("where(h < 3, 1, 0)", "1"))
    assert_close(pruned(X), Mechanism(MHA.replace("; mask = causal", ""), like=pruned)(X))


def test_41_a_head_that_is_off_is_a_slice_left_out():
    pruned = Mechanism("head_pruning")
    y = pruned(X)
    changed = pruned.parameter("o_proj.weight").clone()
    changed[:, 24:] = 7
    assert_close(pruned.set(o_proj_weight=changed)(X), y)
    kept = Mechanism("block three { width = 32; heads = 3; head_dim = 8 }")
    kept.set(
        **{f"{name}_proj_weight": pruned.parameter(f"{name}_proj.weight")[:24] for name in "qkv"},
        o_proj_weight=changed[:, :24],
    )
    assert_close(kept(X), y)


def test_a_gate_without_weights_halves():
    gated = Mechanism("gated_attention").set(g_proj_weight=0)
    assert_close(gated(X), Mechanism("gqa", like=gated)(X) / 2)


def test_a_gate_works_on_each_channel_of_the_heads():
    gated = Mechanism("gated_attention")
    gate = torch.sigmoid(X @ gated.parameter("g_proj.weight").mT)
    found = gated.mixed(X).transpose(1, 2).flatten(2) * gate
    assert_close(gated(X), found @ gated.parameter("o_proj.weight").mT)


def test_238_rows_sum_to_the_mean_of_alpha():
    p = Mechanism("affine_scaled", ("= 0.5", "= 0.3")).weights(X)
    assert_close(p.sum(-1), torch.full_like(p.sum(-1), 0.3))
    assert (p < 0).any()


def test_238_alpha_at_its_mean_scales_softmax():
    scaled = Mechanism("affine_scaled").set(alpha_proj_weight=0)
    assert_close(scaled(X), Mechanism(MHA, like=scaled)(X) / 2)


def test_238_the_mean_of_alpha_runs_in_training():
    mechanism, average = Mechanism("affine_scaled"), torch.full((4,), 0.5).double()
    batches = [tokens(7, seed=at) for at in range(3)]
    for x in batches:
        alpha = mechanism.streams(x)["alpha"]
        average = 0.9 * average + 0.1 * alpha.mean((0, 1))
    assert_close(mechanism.trained(*batches)["average"], average)


def test_238_is_attention_and_a_mean_of_values():
    mechanism = Mechanism("affine_scaled")
    streams = mechanism.streams(X)
    alpha = streams["alpha"].mT[..., None]  # [b, heads, n, 1]
    attended = scaled_dot_product_attention(*(streams[name] for name in "qkv"), is_causal=True)
    mean = streams["v"].cumsum(2) / torch.arange(1, 12)[:, None]
    assert_close(mechanism.mixed(X), alpha * attended + (0.5 - alpha) * mean)


def test_qk_norm_does_not_see_the_size_of_queries():
    normed = Mechanism("qk_norm", ("rms_norm", "rms_norm(eps = 0)"))
    y = normed(X)
    assert_close(normed.set(q_proj_weight=9 * normed.parameter("q_proj.weight"))(X), y)


def test_qk_norm_bounds_the_logits():
    mechanism = Mechanism("qk_norm").set(q_norm_weight=1, k_norm_weight=1)
    assert mechanism.logits(100 * X).abs().max() <= 8**0.5 + 1e-9


def test_cosine_attention_is_softmax_of_cosines():
    mechanism = Mechanism("cosine_attention").set(g=3)
    s = mechanism.logits(X)
    assert s.abs().max() <= 1
    assert_close(mechanism.weights(X), softmax(3 * s))


def test_cosine_attention_without_a_scale_is_uniform():
    p = Mechanism("cosine_attention").set(g=0).weights(X)
    assert_close(p, (causal() / torch.arange(1, 12)[:, None]).expand_as(p).double(), 1e-7)


CONTEXT = tokens(7, 48, seed=3)


def test_cross_attention_is_torchs():
    mechanism = Mechanism("cross_attention")
    streams = mechanism.streams(X, context=CONTEXT)
    found = scaled_dot_product_attention(*(streams[name] for name in "qkv"))
    assert_close(mechanism.mixed(X, context=CONTEXT), found)


def test_cross_attention_does_not_see_the_order_of_the_context():
    mechanism = Mechanism("cross_attention")
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert_close(mechanism(X, context=CONTEXT), mechanism(X, context=CONTEXT[:, order]))


def test_cross_attention_to_one_token_is_that_token():
    mechanism = Mechanism("cross_attention")
    y = mechanism(X, context=CONTEXT[:, :1])
    assert_close(y, y[:, :1].expand_as(y))


def test_42_a_closed_gate_adds_nothing():
    assert not Mechanism("gated_cross").set(alpha=0)(X, context=CONTEXT).any()


@pytest.mark.parametrize("alpha", [0.5, -2.0])
def test_42_a_gate_scales_cross_attention(alpha):
    gated = Mechanism("gated_cross").set(alpha=alpha)
    plain = Mechanism("cross_attention", like=gated)
    factor = torch.tensor(alpha, dtype=torch.float64).tanh()
    assert_close(gated(X, context=CONTEXT), factor * plain(X, context=CONTEXT))
