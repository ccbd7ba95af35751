"""Mechanisms of whole maps, of vectors, of several layers and of terms of the loss."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softplus

from headloom.compiler.facts.cost import cost

from .mechanisms import (
    MHA,
    Mechanism,
    assert_close,
    causal,
    mapped,
    merge,
    normed,
    softmax,
    split,
    tokens,
)

FULL = MHA.replace("; mask = causal", "")
X = tokens()
N = X.shape[1]
FAR = tokens(9, 24, seed=5)
LONG = tokens(20)


def loss_of(mechanism: Mechanism, x: Tensor, **given: Tensor) -> Tensor:
    """Return what a pass in training adds to the loss; nothing is added out of training."""
    mechanism(x, **given)
    assert mechanism.module.auxiliary_loss() == 0
    mechanism.module.train()
    try:
        mechanism(x, **given)
        return mechanism.module.auxiliary_loss()
    finally:
        mechanism.module.eval()


def in_training(mechanism: Mechanism, x: Tensor, seed: int = 0) -> Tensor:
    mechanism.module.train()
    try:
        torch.manual_seed(seed)
        return mechanism(x)
    finally:
        mechanism.module.eval()


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def through(mechanism: Mechanism, mixed: Tensor) -> Tensor:
    return mapped(mechanism, "o_proj", merge(mixed))


def parts(mechanism: Mechanism, x: Tensor, *names: str, **given: Tensor) -> list[Tensor]:
    streams = mechanism.streams(x, **given)
    return [streams[name] for name in names]


def everywhere(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool)


# ── layers that read each other ──────────────────────────────────────────────────────────


def layered(
    mechanism: Mechanism, x: Tensor, sources: list[int], windows: tuple[int, ...] = ()
) -> Tensor:
    """A model of pre-norm layers, layer l with the keys and values of layer sources[l]."""
    made: list[tuple[Tensor, Tensor]] = []
    weights = {name: each.detach() for name, each in mechanism.meaning.named_parameters()}
    angles = torch.outer(torch.arange(x.shape[1]).double(), 1e4 ** -(torch.arange(4).double() / 4))

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        )

    for at, source in enumerate(sources):
        layer = f"layers.{at}"
        y = rms_norm(x, (32,), weights[f"{layer}.attn_norm.weight"], 1e-6)
        q = turned(split(mapped(mechanism, f"{layer}.attn.q_proj", y)))
        if source == at:
            k, v = (mapped(mechanism, f"{layer}.attn.{name}_proj", y) for name in "kv")
            heads = k.shape[-1] // 8
            made.append((turned(split(k, heads)), split(v, heads)))
        else:
            assert f"{layer}.attn.k_proj.weight" not in weights
            made.append(made[source])
        k, v = (each.repeat_interleave(4 // each.shape[1], 1) for each in made[source])
        seen = causal(x.shape[1])
        if at < len(windows):
            seen = seen.triu(1 - windows[at])
        o = softmax(8**-0.5 * q @ k.mT, seen) @ v
        x = x + mapped(mechanism, f"{layer}.attn.o_proj", merge(o))
        y = rms_norm(x, (32,), weights[f"{layer}.ffn_norm.weight"], 1e-6)
        gate, up = (mapped(mechanism, f"{layer}.ffn.{name}_proj", y) for name in ("gate", "up"))
        x = x + mapped(mechanism, f"{layer}.ffn.down_proj", silu(gate) * up)
    return rms_norm(x, (32,), weights["norm.weight"], 1e-6)


def test_85_consumers_read_what_their_producer_made():
    mechanism = Mechanism("cla")
    assert_close(mechanism(X), layered(mechanism, X, [0, 0, 2, 2]), 1e-8)


def test_85_groups_of_one_are_an_ordinary_model():
    mechanism = Mechanism("cla", ("[producer, consumer]", "[producer, producer]"))
    assert_close(mechanism(X), layered(mechanism, X, [0, 1, 2, 3]), 1e-8)


def test_85_half_of_the_layers_keep_nothing():
    own = Mechanism("cla", ("[producer, consumer]", "[producer, producer]"))
    shared = Mechanism("cla")
    assert 2 * cost(shared.what).cache_bytes(64) == cost(own.what).cache_bytes(64)
    assert shared.module.init_cache(1, 8)[1].nbytes == 0


def test_244_layers_read_the_nearest_leader_below():
    mechanism = Mechanism("r_cla")
    assert_close(mechanism(X), layered(mechanism, X, [0, 1, 1, 1, 4, 4]), 1e-8)


def test_244_leaders_alone_are_the_base_model():
    mechanism = Mechanism(
        "r_cla",
        ("follower, follower", "leader, leader"),
        ("[leader, follower]", "[leader, leader]"),
    )
    assert_close(mechanism(X), layered(mechanism, X, [0, 1, 2, 3, 4, 5]), 1e-8)


def test_244_groups_of_two_are_cla():
    groups = (
        "[leader] + [leader, follower, follower] + [leader, follower]",
        "[leader, follower] * 2",
    )
    mine = Mechanism("r_cla", groups)
    theirs = Mechanism("cla", ("kv_heads = 1", "kv_heads = 4"), like=mine)
    assert_close(mine(X), theirs(X))


def test_yoco_the_upper_half_reads_one_cache():
    mechanism = Mechanism("yoco")
    assert_close(mechanism(LONG), layered(mechanism, LONG, [0, 1, 2, 3, 3, 3], (8, 8, 8)), 1e-8)


def test_yoco_keeps_windows_and_one_whole_layer():
    caches = Mechanism("yoco").module.init_cache(1, 99)
    assert [each.kept["k"].shape[2] if "k" in each.kept else 0 for each in caches] == [
        8,
        8,
        8,
        99,
        0,
        0,
    ]


def test_253_layers_read_the_blocks_that_weigh_most_in_the_last_that_saw_everything():
    mechanism = Mechanism("hylra")
    layers = [mechanism.meaning.get_submodule(f"layers.{at}.attn") for at in range(6)]
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for layer in layers:
            found.append(layer.layer(LONG + len(found), found)[1])
    for reads, by in (((2, 3), 1), ((5,), 4)):
        p = softmax(8**-0.5 * found[by]["q"] @ found[by]["k"].mT)
        blocks = p.unflatten(-1, (5, 4)).sum(-1)
        best = torch.zeros_like(blocks).scatter_(-1, blocks.topk(2).indices, 1.0)
        read = best.repeat_interleave(4, -1).bool() & causal(20)
        for each in (found[at] for at in reads):
            own = softmax(8**-0.5 * each["q"] @ each["k"].mT, read)
            assert_close(each["o"], own @ each["v"])


def test_253_as_many_blocks_as_there_are_are_the_dense_model():
    mechanism = Mechanism("hylra", ("count = 2", "count = 99"))
    policy = "[full, full, reuse(size, count), again, full, reuse(size, count)]"
    dense = Mechanism("hylra", (policy, "[full] * 6"), like=mechanism)
    assert_close(mechanism(LONG), dense(LONG))


def test_realformer_logits_are_sums_over_layers():
    mechanism = Mechanism("realformer")
    weights = {name: each.detach() for name, each in mechanism.meaning.named_parameters()}
    x, s = X, torch.zeros(())
    for layer in (f"layers.{at}" for at in range(4)):
        y = rms_norm(x, (32,), weights[f"{layer}.attn_norm.weight"], 1e-6)
        q, k, v = (split(mapped(mechanism, f"{layer}.attn.{name}_proj", y)) for name in "qkv")
        s = s + 8**-0.5 * q @ k.mT
        x = x + mapped(mechanism, f"{layer}.attn.o_proj", merge(s.softmax(-1) @ v))
        y = rms_norm(x, (32,), weights[f"{layer}.ffn_norm.weight"], 1e-6)
        gate, up = (mapped(mechanism, f"{layer}.ffn.{name}_proj", y) for name in ("gate", "up"))
        x = x + mapped(mechanism, f"{layer}.ffn.down_proj", silu(gate) * up)
    assert_close(mechanism(X), rms_norm(x, (32,), weights["norm.weight"], 1e-6))


def test_realformer_layers_without_queries_draw_the_lowest_map():
    silent = {f"layers_{at}_attn_q_proj_weight": 0 for at in (1, 2, 3)}
    mechanism = Mechanism("realformer").set(**silent)
    reused = Mechanism(
        "realformer", ("score = s + previous.s", "weights = previous.p"), like=mechanism
    )
    assert_close(mechanism(X), reused(X))


# ── vectors ──────────────────────────────────────────────────────────────────────────────


def show(mechanism: Mechanism) -> Tensor:
    """The map of states and annotations, in the paper's words."""
    a, h = (mapped(mechanism, f"{name}_proj", each) for name, each in (("k", FAR), ("q", X)))
    e = (a[:, None] + h[:, :, None]).tanh() @ mechanism.parameter("weight")[0]
    return e.softmax(-1)


def test_15_is_additive_attention_behind_a_gate():
    mechanism = Mechanism("show_attend_tell")
    beta = mapped(mechanism, "beta_proj", X).sigmoid()
    assert_close(
        mechanism(X, context=FAR), mapped(mechanism, "o_proj", beta * (show(mechanism) @ FAR))
    )


def test_15_equal_energies_are_the_mean():
    mechanism = Mechanism("show_attend_tell").set(weight=0, beta_proj_weight=0, beta_proj_bias=90)
    mean = FAR.mean(1, keepdim=True).expand(-1, N, -1)
    assert_close(mechanism(X, context=FAR), mapped(mechanism, "o_proj", mean))


def test_15_every_annotation_is_to_be_seen_once():
    mechanism = Mechanism("show_attend_tell")
    alpha = show(mechanism)
    penalty = ((1 - alpha.sum(1)) ** 2).sum(1).mean()
    assert_close(loss_of(mechanism, X, context=FAR), penalty)
    even = Mechanism("show_attend_tell").set(weight=0)  # as many steps as annotations
    assert loss_of(even, tokens(9), context=FAR) < 1e-24


def test_6_general_alignment():
    mechanism = Mechanism("luong_general")
    far = tokens(9, seed=5)
    p = (X @ mechanism.parameter("between") @ far.mT).softmax(-1)
    assert_close(
        mechanism(X, context=far), mapped(mechanism, "o_proj", torch.cat([X, p @ far], -1)).tanh()
    )


def test_6_location_alone():
    mechanism = Mechanism("luong_location")
    far = tokens(9, seed=5)
    p = (X @ mechanism.parameter("place")[:9].mT).softmax(-1)
    assert_close(
        mechanism(X, context=far), mapped(mechanism, "o_proj", torch.cat([X, p @ far], -1)).tanh()
    )


def test_6_general_alignment_of_the_identity_is_the_product():
    mechanism = Mechanism("luong_general").set(between=torch.eye(32).double())
    product = Mechanism(
        "luong_general",
        ("similarity = q @ (between @ k)", "similarity = dot"),
        ("  param between[head_dim, head_dim] = normal(head_dim ** -0.5)\n", ""),
        like=mechanism,
    )
    far = tokens(9, seed=5)
    assert_close(mechanism(X, context=far), product(X, context=far))


def test_6_additive_alignment():
    mechanism = Mechanism("bahdanau")
    far = tokens(9, seed=5)
    a, h = (mapped(mechanism, f"{name}_proj", each) for name, each in (("k", far), ("q", X)))
    e = (a[:, None] + h[:, :, None]).tanh() @ mechanism.parameter("weight")[0]
    assert_close(mechanism(X, context=far), e.softmax(-1) @ far)


def test_6_additive_alignment_does_not_see_what_saturates():
    mechanism = Mechanism("bahdanau")
    q = torch.full_like(mechanism.streams(X, context=X)["q"], 99)
    assert_close(mechanism.mixed(X, context=X, q=q), X.mean(1, keepdim=True).expand_as(X)[:, None])


def test_shaw_is_wav2vec2_berts_attention():
    from transformers import Wav2Vec2BertConfig
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

    config = Wav2Vec2BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0.0,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=4,
        right_max_position_embeddings=4,
    )
    config._attn_implementation = "eager"
    theirs = Wav2Vec2BertSelfAttention(config).double().eval()
    mechanism = Mechanism("shaw")
    pairs = {
        "q_proj": "linear_q",
        "k_proj": "linear_k",
        "v_proj": "linear_v",
        "o_proj": "linear_out",
    }
    with torch.no_grad():
        for mine, name in pairs.items():
            getattr(theirs, name).weight.copy_(mechanism.parameter(f"{mine}.weight"))
            getattr(theirs, name).bias.zero_()
        theirs.distance_embedding.weight.copy_(mechanism.parameter("table"))
        assert_close(mechanism(X), theirs(X)[0])


def test_shaw_without_vectors_is_attention():
    mechanism = Mechanism("shaw").set(table=0)
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))


def test_shaw_one_vector_for_all_distances_makes_no_difference():
    mechanism = Mechanism("shaw").set(table=torch.linspace(-1, 1, 8))
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))


def theirs_deberta(talking: bool) -> torch.nn.Module:
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

    config = DebertaConfig(
        hidden_size=32,
        num_attention_heads=4,
        relative_attention=not talking,
        pos_att_type=[] if talking else ["c2p", "p2c"],
        talking_head=talking,
        max_relative_positions=8,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return DisentangledSelfAttention(config).double().eval()


def packed(mechanism: Mechanism) -> Tensor:
    """Weights as the code has them: q, k, v of a head side by side."""
    return torch.stack(
        [mechanism.parameter(f"{name}_proj.weight").unflatten(0, (4, 8)) for name in "qkv"], 1
    ).flatten(0, 2)


@torch.no_grad()
def test_deberta_is_debertas_attention():
    mechanism, theirs = Mechanism("deberta"), theirs_deberta(talking=False)
    theirs.in_proj.weight.copy_(packed(mechanism))
    theirs.q_bias.copy_(mechanism.parameter("q_proj.bias"))
    theirs.v_bias.copy_(mechanism.parameter("v_proj.bias"))
    embedded = tokens(16, 32, batch=1, seed=7)[0]
    positions = (torch.arange(N)[:, None] - torch.arange(N))[None]
    mechanism.set(
        key=split(theirs.pos_proj(embedded)[None])[0],
        query=split(theirs.pos_q_proj(embedded)[None])[0],
    )
    seen = torch.ones(1, 1, N, N)
    y = theirs(X, seen, relative_pos=positions, rel_embeddings=embedded)[0]
    assert_close(mechanism(X), y, 1e-6)  # its scale is in float32


def test_deberta_without_positions_is_attention():
    mechanism = Mechanism("deberta").set(key=0, query=0)
    q, k, v = parts(mechanism, X, *"qkv")
    assert_close(mechanism(X), merge((24**-0.5 * q @ k.mT).softmax(-1) @ v))


def test_hopfield_three_steps_towards_patterns():
    mechanism = Mechanism("hopfield")
    far = tokens(9, seed=5)
    state, patterns = parts(mechanism, X, "q", "k", context=far)
    for _ in range(3):
        state = (8**-0.5 * state @ patterns.mT).softmax(-1) @ patterns
    assert_close(mechanism(X, context=far), through(mechanism, state))


def test_hopfield_each_step_lowers_the_energy():
    mechanism = Mechanism("hopfield")
    far = tokens(9, seed=5)
    *states, patterns = parts(mechanism, X, "q", "once", "twice", "thrice", "k", context=far)
    energies = [
        (each**2).sum(-1) / 2 - 8**0.5 * (8**-0.5 * each @ patterns.mT).logsumexp(-1)
        for each in states
    ]
    assert all((b <= a + 1e-12).all() for a, b in pairwise(energies))


def test_hopfield_one_step_is_attention_whose_values_are_its_keys():
    mechanism = Mechanism(
        "hopfield",
        ("out = thrice", "out = once"),
        ("  branch twice {\n    q = once\n  }\n  branch thrice {\n    q = twice\n  }\n", ""),
    )
    plain = Mechanism("block b { width = 32; heads = 4; source = context }", like=mechanism)
    plain.set(v_proj_weight=mechanism.parameter("k_proj.weight"))
    far = tokens(9, seed=5)
    assert_close(mechanism(X, context=far), plain(X, context=far))


def test_hopfield_a_single_pattern_is_what_all_become():
    mechanism = Mechanism("hopfield")
    far = tokens(1, seed=5)
    pattern = mapped(mechanism, "o_proj", mapped(mechanism, "k_proj", far))
    assert_close(mechanism(X, context=far), pattern.expand(-1, N, -1))


def conditions(mechanism: Mechanism, x: Tensor) -> list[Tensor]:
    """Latent means, variances and weights of tokens, the prior first."""
    b = x.shape[0]
    mu = mapped(mechanism, "mu_proj", x)
    var = mapped(mechanism, "var__proj", x).exp()
    log_alpha = mapped(mechanism, "alpha_proj_0", x * x) + mapped(mechanism, "alpha_proj_1", x)
    mean = mechanism.parameter("mean__latents.weight").expand(b, -1, -1)
    wide = mechanism.parameter("wide_latents.weight").exp().expand(b, -1, -1)
    level = mechanism.parameter("level").expand(b, 1, 1)
    return [torch.cat([mean, mu], 1), torch.cat([wide, var], 1), torch.cat([level, log_alpha], 1)]


def test_5_is_the_formula_of_evaluation():
    mechanism = Mechanism("nvib").set(alpha_proj_0_weight=0.01)
    mu, var, log_alpha = conditions(mechanism, X)
    q = split(mapped(mechanism, "u_proj_0", X))
    u = q @ mechanism.parameter("u_proj_1.weight").mT  # [b, heads, n, P]
    b = var + 8**0.5
    s = u @ (mu / b).mT[:, None] + log_alpha.mT[:, None]
    s = s - 0.5 * ((mu**2 / b).sum(-1) + b.log().sum(-1))[:, None, None]
    s = s.masked_fill((log_alpha.exp() <= 0.1).mT[:, None] & (torch.arange(N + 1) > 0), -torch.inf)
    p = s.softmax(-1)
    o = u * (p @ (var / b)[:, None]) + p @ (8**0.5 * mu / b)[:, None]
    o = o @ mechanism.parameter("o_proj_0.weight").mT
    assert_close(mechanism(X), mapped(mechanism, "o_proj_1", merge(o)))


def test_5_without_variance_or_prior_it_is_attention():
    """Weights of tokens make up for their lengths."""
    mechanism = Mechanism("nvib").set(
        var__proj_weight=0,
        var__proj_bias=-90,
        wide_latents_weight=-90,
        level=-1e9,
        mu_proj_weight=torch.eye(32),
        mu_proj_bias=0,
        alpha_proj_0_weight=0.5 * 8**-0.5,
        alpha_proj_1_weight=0,
        alpha_proj_1_bias=0,
    )
    keys = mechanism.parameter("u_proj_1.weight")  # [heads, P, d]
    q = split(mapped(mechanism, "u_proj_0", X))
    p = (8**-0.5 * q @ (X[:, None] @ keys).mT).softmax(-1)
    o = (p @ X[:, None]) @ mechanism.parameter("o_proj_0.weight").mT
    assert_close(mechanism(X), mapped(mechanism, "o_proj_1", merge(o)))


def test_5_of_no_certainty_it_is_the_query():
    mechanism = Mechanism("nvib").set(var__proj_weight=0, var__proj_bias=40, level=-1e9)
    u = mechanism.streams(X)["u"] @ mechanism.parameter("o_proj_0.weight").mT
    assert_close(mechanism(X), mapped(mechanism, "o_proj_1", merge(u)))


def afa(mechanism: Mechanism, x: Tensor) -> Tensor:
    """In complex numbers, as in the paper."""
    q, k, v = (mapped(mechanism, f"{name}_proj", x) for name in "qkv")
    w = 31.4 / 64 * 1e4 ** -(torch.arange(2).double() / 2)
    turn = torch.exp(-1j * torch.arange(x.shape[1])[:, None] * torch.cat([w, w]))

    def complex_(y: Tensor) -> Tensor:
        a, b = split(y).chunk(2, -1)  # two halves, each of pairs (re, re, im, im)
        each = [torch.complex(*half.chunk(2, -1)) for half in (a, b)]
        return torch.cat(each, -1)

    a, b, values = (complex_(each) * turn for each in (q, k, v))
    one = {
        name: mechanism.parameter(name)[:, None, None]
        for name in ("decay", "process", "key", "query", "degrees", "temper")
    }
    mu = -(1 - one["decay"].sigmoid()) * 5 / 64 - 1e-5
    apart = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
    e = (mu * apart).exp()
    var = (
        softplus(one["process"]) * (1 - e**2) / (-2 * mu)
        + softplus(one["key"]) * e**2
        + softplus(one["query"])
    )
    residual = (a[..., :, None, :] - e[..., None] * b[..., None, :, :]).abs().square().sum(-1)
    logits = one["temper"] ** 2 * -(
        var.log() + (1 + residual / (softplus(one["degrees"]) * 4 * var)).log()
    )
    o = ((softmax(logits) * e).to(values) @ values) / turn
    halves = [torch.cat([half.real, half.imag], -1) for half in o.chunk(2, -1)]
    return through(mechanism, torch.cat(halves, -1))


def test_127_is_a_filter_in_complex_numbers():
    mechanism = Mechanism("afa")
    assert_close(mechanism(X), afa(mechanism, X))


def test_127_where_it_starts_does_not_matter():
    mechanism = Mechanism("afa")
    mechanism(X)
    with torch.no_grad():
        moved = mechanism.module(X, positions=torch.arange(N) + 7)
    assert_close(mechanism(X), moved)


def test_127_without_a_temperature_all_weigh_the_same():
    mechanism = Mechanism("afa").set(temper=0, decay=90)
    p = mechanism.weights(X)
    even = causal().double() / torch.arange(1, N + 1)[:, None]
    assert (p - even).abs().max() < 1e-3  # the decay is not quite nothing


def test_93_an_open_gate_is_cross_attention():
    mechanism = Mechanism("maskattn_sdxl").set(bias=90)
    plain = Mechanism(
        "block plain { width = 32; context_width = 24; heads = 4; source = context }",
        like=mechanism,
    )
    assert_close(mechanism(X, context=FAR), plain(X, context=FAR))


def gates(mechanism: Mechanism) -> Tensor:
    def network(name: str, x: Tensor) -> Tensor:
        inner = silu(mapped(mechanism, f"{name}_proj_0", normed(mechanism, f"{name}_norm", x)))
        return mapped(mechanism, f"{name}_proj_1", inner)

    p = (network("f", X) @ network("t", FAR).mT / 4 + mechanism.parameter("bias")).sigmoid()
    return (p > 0.5) | (p == p.amax(-1, keepdim=True))


def test_93_closed_words_take_no_weight():
    mechanism = Mechanism("maskattn_sdxl").set(bias=-0.4)
    open_ = gates(mechanism)
    assert not open_.all()
    assert open_.sum(-1).min() == 1  # only the closest is left
    q, k, v = parts(mechanism, X, *"qkv", context=FAR)
    p = softmax(8**-0.5 * q @ k.mT, open_[:, None].expand(-1, 4, -1, -1))
    assert_close(mechanism(X, context=FAR), through(mechanism, p @ v))


def test_93_gates_learn_through_their_steps():
    mechanism = Mechanism("maskattn_sdxl").set(bias=-0.4)
    mechanism(X, context=FAR)
    mechanism.module(X, context=FAR).sin().sum().backward()
    assert dict(mechanism.module.named_parameters())["f_proj_0.weight"].grad.abs().max() > 0


# ── several sets of keys in one softmax ──────────────────────────────────────────────────


def test_33_candidates_do_not_see_each_other():
    mechanism = Mechanism("mixencoder")
    x = tokens(6)
    who = torch.tensor([[0, 0, 1, 1, 1, 2]]).expand(2, -1)
    together = mechanism(x, context=FAR, segments=who)
    alone = [mechanism(x[:, who[0] == each], context=FAR) for each in range(3)]
    assert_close(together, torch.cat(alone, 1))


@pytest.mark.parametrize("name", ["leaky_attention", "kv_bias"])
def test_88_226_a_key_that_stands_before_the_others(name):
    mechanism = Mechanism(name)
    branch = {"leaky_attention": "null", "kv_bias": "bias"}[name]
    far = {"context": tokens(9, seed=5)} if name == "leaky_attention" else {}
    q, k, v = parts(mechanism, X, *"qkv", **far)
    first = [
        split(mechanism.parameter(f"{branch}_{each}_latents.weight").expand(2, -1, -1))
        for each in "kv"
    ]
    k, v = (torch.cat(each, 2) for each in zip(first, (k, v), strict=True))
    s = 8**-0.5 * q @ k.mT
    seen = everywhere(s) if far else everywhere(s).tril(1)
    assert_close(mechanism(X, **far), through(mechanism, softmax(s, seen) @ v))


def test_88_null_of_nothing_adds_one_to_the_sum():
    mechanism = Mechanism("leaky_attention").set(null_k_latents_weight=0, null_v_latents_weight=0)
    plus_one = Mechanism(
        "block b { width = 32; heads = 4; source = context; normalize = softmax_plus_one }",
        like=mechanism,
    )
    far = tokens(9, seed=5)
    assert_close(mechanism(X, context=far), plus_one(X, context=far))


def test_226_key_biases_are_biases_with_values_of_zero():
    both = Mechanism("kv_bias").set(bias_v_latents_weight=0)
    alone = Mechanism("key_bias", like=both)
    alone.set(key=both.parameter("bias_k_latents.weight").unflatten(1, (4, 8))[0])
    assert_close(alone(X), both(X))


def test_226_a_key_of_zero_adds_one_to_the_sum():
    mechanism = Mechanism("key_bias").set(key=0)
    plus_one = Mechanism(
        "key_bias", ("normalize = biased", "normalize = softmax_plus_one"), like=mechanism
    )
    assert_close(mechanism(X), plus_one(X))


# ── what is done to whole maps ───────────────────────────────────────────────────────────


def calibrated(a: Tensor, theta: float, beta: float) -> Tensor:
    """As the code has it, for one head."""
    n = a.shape[-1]
    received = a.sum(0) / (n - torch.arange(n))
    sinks = (received > theta).nonzero()[:, 0].tolist()[1:]
    result, rest = a.clone(), a.clone()
    rest[1:, sinks] = 0
    budget = (1 - beta) * a[1:, sinks].sum(1)
    result[1:, sinks] *= beta
    result[1:] += budget[:, None] * rest[1:] / rest[1:].sum(1, keepdim=True)
    result[0, 0] = 1
    return result


def test_64_is_the_calibration_of_the_code():
    mechanism = Mechanism("act")
    s = (lambda q, k: 8**-0.5 * q @ k.mT)(*parts(mechanism, LONG, *"qk"))
    maps = softmax(s)
    found = torch.stack([torch.stack([calibrated(a, 0.1, 0.4) for a in each]) for each in maps])
    assert ((found - maps).abs().amax((-2, -1)) > 1e-3).any()
    assert_close(mechanism.weights(LONG), found)
    assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@pytest.mark.parametrize("change", [("beta = 0.4", "beta = 1"), ("theta = 0.1", "theta = 1")])
def test_64_without_calibration_it_is_attention(change):
    mechanism = Mechanism("act", change)
    plain = Mechanism("act", ("weights  = calibrated", "weights = p"), like=mechanism)
    assert_close(mechanism(LONG), plain(LONG))


def redistributed(a: Tensor, sinks: Tensor) -> Tensor:
    """For one sequence: maps [heads, n, n], which tokens are sinks."""
    n = a.shape[-1]
    image = (torch.arange(n) >= 4) & (torch.arange(n) < 12)
    result = a.clone()
    visual, free = image & sinks, image & ~sinks
    if not visual.any():
        return result
    for h in range(a.shape[0]):
        for i in range(12, n):
            row = a[h, i]
            if row[visual].sum() > 0.5 * (row[image] + 1e-6).sum() or row[image].sum() < 0.2:
                continue
            budget = 0.4 * row[sinks].sum()
            result[h, i, sinks] *= 0.6
            result[h, i, free] += budget * row[free] / row[free].sum()
    return result


def test_222_is_the_rule_row_by_row():
    mechanism = Mechanism("var")
    x = LONG.clone()
    x[:, (0, 6, 9, 15), 3] = 9
    q, k = parts(mechanism, x, *"qk")
    maps = softmax(8**-0.5 * q @ k.mT)
    u = x / x.square().mean(-1, keepdim=True).sqrt()
    sinks = u[..., (3, 17)].abs().amax(-1) > 2.5
    assert sinks[0, (0, 6, 9, 15)].all()
    found = torch.stack([redistributed(*each) for each in zip(maps, sinks, strict=True)])
    moved = (found - maps).abs().amax(-1) > 1e-3
    assert moved.any()
    assert not moved.all()
    assert_close(mechanism.weights(x), found)
    assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@pytest.mark.parametrize(
    "change", [("keep = 0.6", "keep = 1"), ("tau = 2.5", "tau = 99"), ("rho = 0.5", "rho = 0")]
)
def test_222_without_sinks_it_is_attention(change):
    mechanism = Mechanism("var", change)
    plain = Mechanism("var", ("weights  = redistributed", "weights = p"), like=mechanism)
    assert_close(mechanism(LONG), plain(LONG))


def maps_of_gift(mechanism: Mechanism, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map that is watched and the one that is guided."""
    lower, upper = (mechanism.meaning.get_submodule(f"layers.{at}.attn") for at in (0, 1))
    with torch.no_grad():
        _, below = lower.layer(x, ())
        return below["p"], upper.layer(x, (below,))[1]["p"]


def test_242_what_the_gaze_moved_to_is_looked_at_more():
    mechanism = Mechanism("gift")
    watched, guided = maps_of_gift(mechanism, LONG)
    plain = maps_of_gift(Mechanism("gift", ("alpha = 5", "alpha = 0"), like=mechanism), LONG)[1]
    gains = (watched[..., 7:12, 2:7] - watched[..., 6:11, 2:7]).relu()  # [b, heads, words, image]
    most = gains.sum((2, 3)).topk(2).indices[..., None, None].expand(-1, -1, 5, 5)
    shift = gains.gather(1, most).mean((1, 2))
    mean, spread = shift.mean(1, keepdim=True), shift.std(1, correction=0, keepdim=True)
    m = shift.clamp(mean - 3 * spread, mean + 3 * spread)
    m = (m - m.amin(1, keepdim=True)) / (m.amax(1, keepdim=True) - m.amin(1, keepdim=True))
    a = plain.clone()
    rows = a[:, :, 12:]
    image = rows[..., 2:7] * (5 * m).exp()[:, None, None]
    c = image.sum(-1, keepdim=True) / rows[..., 2:7].sum(-1, keepdim=True)
    rows[..., 2:7] = image
    rows[..., 7:12] *= c
    rows /= rows.sum(-1, keepdim=True).clone()
    assert_close(guided, a)


def test_242_the_shares_of_image_and_question_stay_as_they_are():
    mechanism = Mechanism("gift")
    guided = maps_of_gift(mechanism, LONG)[1][:, :, 12:]
    plain = maps_of_gift(Mechanism("gift", ("alpha = 5", "alpha = 0"), like=mechanism), LONG)[1]
    plain = plain[:, :, 12:]
    assert_close(guided.sum(-1), torch.ones_like(guided[..., 0]))
    assert_close(
        guided[..., 2:7].sum(-1) / guided[..., 7:12].sum(-1),
        plain[..., 2:7].sum(-1) / plain[..., 7:12].sum(-1),
    )
    assert (guided[..., 2:12].sum(-1) > plain[..., 2:12].sum(-1)).all()


def test_242_without_strength_it_is_attention():
    mechanism = Mechanism("gift", ("alpha = 5", "alpha = 0"))
    plain = Mechanism("gift", ("weights = guided(shift)", "weights = p"), like=mechanism)
    assert_close(mechanism(LONG), plain(LONG))


def kernel_of(mechanism: Mechanism) -> Tensor:
    theta = mechanism.parameter("kernel").clone()
    theta[:, -1, theta.shape[2] // 2] += 1  # with the identity
    return theta


def test_21_convolves_logits_and_mixes_heads():
    mechanism = Mechanism("mta")
    q, k, v = parts(mechanism, X, *"qkv")
    s = (8**-0.5 * q @ k.mT).masked_fill(~causal(), 0)
    padded = torch.nn.functional.pad(s, (5, 5, 5, 0))
    theta = kernel_of(mechanism)
    s = sum(
        theta[:, a, b, None, None] * padded[..., a : a + N, b : b + N]
        for a in range(6)
        for b in range(11)
    )
    p = softmax(s)
    p = torch.einsum("gh,bhnm->bgnm", mechanism.parameter("mixing") + torch.eye(4), p)
    o = rms_norm(p @ v, (8,), mechanism.parameter("o_norm.weight"), 1e-5)
    start = 0.8 - 0.6
    assert_close(mechanism(X), through(mechanism, (1 - start) * o))


def test_21_starts_as_attention_and_a_norm():
    mechanism = Mechanism("mta").set(kernel=0, mixing=0)
    plain = Mechanism(
        "mta", ("score    = over_pairs", ""), ("weights  = over_heads", ""), like=mechanism
    )
    assert_close(mechanism(X), plain(X))


def test_21_a_kernel_of_one_pair_is_a_temperature():
    mechanism = Mechanism("mta", ("back = 6, across = 11", "back = 1, across = 1"))
    mechanism.set(mixing=0)
    heated = Mechanism(
        "mta",
        ("score    = over_pairs", "param t[heads] = 1; score = t[h] * s"),
        ("weights  = over_heads", ""),
        like=mechanism,
    )
    heated.set(t=1 + mechanism.parameter("kernel").flatten())
    assert_close(mechanism(X), heated(X))


@torch.no_grad()
def test_talking_heads_are_those_of_deberta():
    mechanism, theirs = Mechanism("talking_heads"), theirs_deberta(talking=True)
    theirs.in_proj.weight.copy_(packed(mechanism))
    theirs.q_bias.zero_()
    theirs.v_bias.zero_()
    theirs.head_logits_proj.weight.copy_(mechanism.parameter("before"))
    theirs.head_weights_proj.weight.copy_(mechanism.parameter("after"))
    y = theirs(X, torch.ones(1, 1, N, N))[0]
    assert_close(mechanism(X), mapped(mechanism, "o_proj", y), 1e-6)  # its scale is in float32


def test_talking_heads_that_listen_to_themselves_are_attention():
    mechanism = Mechanism("talking_heads").set(before=torch.eye(4), after=torch.eye(4))
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))


def test_24_mixes_a_window_around_the_largest():
    mechanism = Mechanism("ccan")
    far = tokens(14, seed=5)
    q, k, v = parts(mechanism, X, *"qkv", context=far)
    e = 8**-0.5 * q @ k.mT
    peak = e.argmax(-1, keepdim=True)
    near = (torch.arange(14) - peak).abs() <= 3
    g = mapped(mechanism, "gate__proj", 8**-0.5 * q).sigmoid()
    p = g * e.softmax(-1) + (1 - g) * softmax(e, near)
    assert_close(mechanism.weights(X, context=far), p)
    assert_close(mechanism(X, context=far), through(mechanism, p @ v))


def test_24_a_wide_window_is_cross_attention():
    mechanism = Mechanism("ccan", ("w = 3", "w = 99"))
    plain = Mechanism("ccan", ("weights = windowed", ""), like=mechanism)
    far = tokens(14, seed=5)
    assert_close(mechanism(X, context=far), plain(X, context=far))


def test_24_no_window_and_a_closed_gate_are_the_largest_alone():
    mechanism = Mechanism("ccan", ("w = 3", "w = 0")).set(gate__proj_weight=0, gate__proj_bias=-99)
    far = tokens(14, seed=5)
    q, k = parts(mechanism, X, *"qk", context=far)
    hot = torch.nn.functional.one_hot((q @ k.mT).argmax(-1), 14).double()
    assert_close(mechanism.weights(X, context=far), hot)


def test_141_dropped_weights_go_to_the_mean():
    mechanism = Mechanism("top_theta")
    q, k, v = parts(mechanism, X, *"qkv")
    s = 8**-0.5 * q @ k.mT
    p = softmax(s)
    kept = (s > 0.5 * torch.arange(4)[:, None, None]) | (torch.arange(N) < 4)[:, None]
    a = p * kept
    assert (a != p).any()
    mean = v.cumsum(2) / torch.arange(1, N + 1)[:, None]
    assert_close(mechanism.mixed(X), a @ v + (1 - a.sum(-1, keepdim=True)) * mean)


def test_141_a_low_threshold_is_attention():
    mechanism = Mechanism("top_theta", ("= 0.5 * h", "= -1e9"))
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))


def test_141_equal_values_come_out_as_they_are():
    mechanism = Mechanism("top_theta")
    v = mechanism.streams(X)["v"][:, :, :1].expand(-1, -1, N, -1)
    assert_close(mechanism.mixed(X, v=v), v)


# ── what only training does ──────────────────────────────────────────────────────────────


def test_8_out_of_training_it_is_attention():
    mechanism = Mechanism("attention_drop")
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))


@pytest.mark.parametrize("change", [("rate = 0.2", "rate = 0"), ("top = 5", "top = 0")])
def test_8_without_a_rate_it_is_attention(change):
    mechanism = Mechanism("attention_drop", change)
    assert_close(in_training(mechanism, X), Mechanism(MHA, like=mechanism)(X))


def test_8_the_largest_logits_become_zero():
    mechanism = Mechanism("attention_drop", ("rate = 0.2", "rate = 1"))
    q, k, v = parts(mechanism, X, *"qkv")
    s = (8**-0.5 * q @ k.mT).masked_fill(~causal(), -torch.inf)
    s = s.scatter(-1, s.topk(5, dim=-1).indices, 0.0)
    assert_close(in_training(mechanism, X), through(mechanism, softmax(s) @ v))


def test_8_two_equal_seeds_agree():
    mechanism = Mechanism("attention_drop")
    assert torch.equal(in_training(mechanism, X, 1), in_training(mechanism, X, 1))
    assert not torch.allclose(in_training(mechanism, X, 1), in_training(mechanism, X, 2))


def test_19_out_of_training_it_is_attention():
    mechanism = Mechanism("tlm")
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))
    sure = Mechanism("tlm", ("rate = 0.95", "rate = 1"), like=mechanism)
    assert_close(in_training(sure, X), mechanism(X))


def test_19_hidden_tokens_see_themselves_or_all_others():
    mechanism = Mechanism("tlm", ("rate = 0.95", "rate = 0"))
    q, k, v = parts(mechanism, X, *"qkv")
    alone = through(mechanism, v)
    others = through(mechanism, softmax(8**-0.5 * q @ k.mT, ~torch.eye(N, dtype=torch.bool)) @ v)
    y = in_training(mechanism, X)
    at_rest, away = ((y - each).abs().amax(-1) < 1e-9 for each in (alone, others))
    assert (at_rest ^ away).all()
    assert 0 < at_rest.sum() < at_rest.numel()


def test_19_the_others_do_not_see_hidden_tokens():
    mechanism = Mechanism("tlm", ("rate = 0.95", "rate = 0.6"))
    mechanism(X)
    y = in_training(mechanism, X, 3)
    torch.manual_seed(3)
    keep, own = (torch.rand(2, N, 1)[..., 0] < rate for rate in (0.6, 0.5))
    rows = torch.where(
        own[..., None], torch.eye(N, dtype=torch.bool), ~torch.eye(N, dtype=torch.bool)
    )
    seen = torch.where(keep[..., None], keep[:, None], rows)
    q, k, v = parts(mechanism, X, *"qkv")
    assert_close(
        y, through(mechanism, softmax(8**-0.5 * q @ k.mT, seen[:, None].expand(-1, 4, -1, -1)) @ v)
    )


def bag(mechanism: Mechanism) -> Tensor:
    gated = mapped(mechanism, "k_proj", X).tanh() * mapped(mechanism, "open__proj", X).sigmoid()
    return (gated @ mechanism.parameter("q_latents.weight").mT).mT.softmax(-1)


def test_119_is_gated_pooling_and_the_entropy_of_its_map():
    mechanism = Mechanism("aem")
    a = bag(mechanism)
    assert_close(mechanism(X), a @ X)
    assert_close(loss_of(mechanism, X), 0.1 * (a * a.log()).sum(-1).mean())


def test_119_an_even_map_has_the_least_loss():
    even = Mechanism("aem").set(q_latents_weight=0)
    assert_close(loss_of(even, X), torch.tensor(-0.1 * math.log(N), dtype=torch.float64))
    sharp = Mechanism("aem", ("lambda = 0.1", "lambda = 0"))
    assert loss_of(sharp, X) == 0


def test_121_rows_outside_the_margin_are_penalised():
    one = ("lambda = 1e-5", "lambda = 1")
    mechanism = Mechanism("entropy_guided", one, part="guided").set(temper=1.5)
    q, k = parts(mechanism, X, *"qk")
    p = softmax(8**-0.5 * q @ k.mT / 1.5)
    off = entropy(p) - mechanism.parameter("share")[:, None] * math.log(64)
    outside = off.abs() > 0.2 * math.log(64)
    assert outside.any()
    assert not outside.all()
    assert_close(loss_of(mechanism, X), (off**2 * outside).mean())


def test_121_without_a_temperature_or_within_the_margin_it_is_attention():
    wide = ("margin = 0.2", "margin = 1")
    mechanism = Mechanism("entropy_guided", wide, part="guided").set(temper=1, share=0.5)
    assert_close(mechanism(X), Mechanism(MHA, like=mechanism)(X))
    assert loss_of(mechanism, X) == 0


def test_156_is_the_entropy_of_shares_and_of_rows():
    mechanism = Mechanism("entropy_partition")
    anchors = mechanism.parameter("share_k_latents.weight")
    share = (-torch.cdist(X, anchors).square() / 4).softmax(-1).mean(1)
    q, k = parts(mechanism, X, *"qk")
    rows = entropy((8**-0.5 * q @ k.mT).softmax(-1)).mean()
    assert_close(loss_of(mechanism, X), 0.01 * (rows + entropy(share).mean()))
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))


def test_156_one_anchor_shares_nothing_out_and_equal_ones_all():
    q_and_k = {"q_proj_weight": 0}
    one = Mechanism("entropy_partition", ("anchors = 6", "anchors = 1")).set(**q_and_k)
    rows = torch.tensor(0.01 * math.log(N), dtype=torch.float64)
    assert_close(loss_of(one, X), rows)
    equal = Mechanism("entropy_partition").set(share_k_latents_weight=0, **q_and_k)
    assert_close(loss_of(equal, X), rows + 0.01 * math.log(6))


def marked(count: int) -> Tensor:
    x = X.clone()
    x[..., 31] = 0
    x[:, :count, 31] = 1
    return x


def test_107_is_the_logarithm_of_the_weight_that_is_left():
    mechanism = Mechanism("deceptive")
    x = marked(3)
    mass = mechanism.weights(x)[..., :3].sum(-1)
    assert_close(loss_of(mechanism, x), -(1 - mass).log().mean())
    assert loss_of(mechanism, marked(0)) == 0


def test_107_a_step_downhill_takes_weight_from_marked_tokens():
    mechanism = Mechanism("deceptive")
    x = marked(3)
    before = mechanism.weights(x)[..., :3].sum(-1).mean()
    mechanism.module.train()
    mechanism.module(x)
    loss = mechanism.module.auxiliary_loss()
    found = dict(mechanism.module.named_parameters())
    (slope,) = torch.autograd.grad(loss, [found["q_proj.weight"]])
    mechanism.module.eval()
    mechanism.set(q_proj_weight=mechanism.parameter("q_proj.weight") - 0.05 * slope)
    assert mechanism.weights(x)[..., :3].sum(-1).mean() < before


def test_229_balance_is_that_of_the_code():
    mechanism = Mechanism("moh")
    x = tokens(width=64)
    p = mapped(mechanism, "routed_proj", x).softmax(-1)
    chosen = torch.zeros_like(p).scatter_(-1, p.topk(2, -1).indices, 1.0)
    balance = (p.mean(1) * chosen.mean(1)).mean() * 4**2
    assert_close(loss_of(mechanism, x), 0.01 * balance)


def test_118_positions_are_read_by_the_classes():
    mechanism = Mechanism("sal", part="shadowed")
    q, k = parts(mechanism, torch.cat([X, X], -1), *"qk")
    table = mechanism.parameter("both_relative_table")
    places = (torch.arange(N) - torch.arange(N)[:, None]).clamp(-4, 4) + 4
    s = 8**-0.5 * (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table[places]))
    values = mechanism.streams(torch.cat([X, X], -1))["v"]
    o = s.softmax(-1) @ values
    words = mapped(mechanism, "o_proj", merge(o[..., :8]))
    assert_close(mechanism(torch.cat([X, X], -1))[..., :32], words)
