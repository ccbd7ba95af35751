"""Mechanisms of several mixings, of latents and of short convolutions, each by its identities."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_avg_pool2d,
    conv1d,
    conv2d,
    elu,
    gelu,
    interpolate,
    layer_norm,
    linear,
    normalize,
    pad,
    scaled_dot_product_attention,
    silu,
    softplus,
)

from .mechanisms import (
    MHA,
    Mechanism,
    assert_close,
    attended,
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
OTHER = tokens(9, seed=5)
ORDER = torch.tensor([3, 0, 6, 8, 1, 5, 2, 4, 7])


def moved(one: Tensor, other: Tensor) -> list[int]:
    """Return the tokens that differ."""
    return (one - other).abs().amax((0, 2)).gt(1e-12).nonzero()[:, 0].tolist()


def changed(x: Tensor, at: int) -> Tensor:
    return x.index_fill(1, torch.tensor([at]), 1.0)


@torch.no_grad()
def found(theirs: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    y = theirs(*inputs, **named)
    return y[0] if isinstance(y, tuple) else y


def assert_near(mine: Tensor, theirs: Tensor) -> None:
    """For oracles that compute in float32."""
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


# ── sets and latents ─────────────────────────────────────────────────────────────────────


def mab(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the authors' MAB before its last layer: heads lie along the batch."""
    parts = [torch.cat(each.split(8, 2), 0) for each in (q, k, v)]
    a = (parts[0] @ parts[1].mT / 32**0.5).softmax(2)
    return torch.cat((parts[0] + a @ parts[2]).split(q.shape[0], 0), 2)


def test_136_pma_is_mab_of_seeds():
    mechanism = Mechanism("set_transformer_pma")
    seeds = mechanism.parameter("q_latents.weight").expand(2, -1, -1)
    hidden = mab(
        *(
            mapped(mechanism, f"{name}_proj", each)
            for name, each in zip("qkv", (seeds, X, X), strict=True)
        )
    )
    assert_close(mechanism(X), hidden + mapped(mechanism, "o_proj", hidden).relu())


def test_136_pma_has_no_order():
    mechanism = Mechanism("set_transformer_pma")
    assert mechanism(OTHER).shape == (2, 4, 32)
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER))


def test_136_pma_of_one_element_adds_its_value():
    mechanism = Mechanism("set_transformer_pma")
    x = tokens(1)
    seeds = mapped(mechanism, "q_proj", mechanism.parameter("q_latents.weight"))
    hidden = seeds + mapped(mechanism, "v_proj", x)
    assert_close(mechanism(x), hidden + mapped(mechanism, "o_proj", hidden).relu())


def test_136_isab_is_mab_of_mab():
    mechanism = Mechanism("set_transformer_isab")
    points = mechanism.parameter("own_latents.weight").expand(2, -1, -1)
    names = ("own_proj", "read_k_proj", "read_v_proj")
    held = mab(
        *(mapped(mechanism, name, each) for name, each in zip(names, (points, X, X), strict=True))
    )
    summary = held + mapped(mechanism, "summary_proj", held).relu()
    hidden = mab(
        *(
            mapped(mechanism, f"{name}_proj", each)
            for name, each in zip("qkv", (X, summary, summary), strict=True)
        )
    )
    assert_close(mechanism(X), hidden + mapped(mechanism, "o_proj", hidden).relu())


def test_136_isab_keeps_the_order():
    mechanism = Mechanism("set_transformer_isab")
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER)[:, ORDER])


def test_136_isab_passes_as_many_directions_as_points():
    mechanism = Mechanism("set_transformer_isab")
    ranks = torch.linalg.matrix_rank(mechanism.streams(X)["written"])
    assert (ranks == 4).all()  # of eight features


def probing() -> Mechanism:
    """Return it with statistics that norm nothing."""
    return Mechanism("efficient_probing").set(spread=1 - 1e-6)


def test_105_each_query_pools_its_own_block():
    mechanism = probing()
    queries = mechanism.parameter("q_latents.weight").unflatten(1, (4, 32))[0]
    a = (queries @ X.mT / 32**0.5).softmax(-1)
    values = mapped(mechanism, "v_proj", X)
    blocks = [a[:, at : at + 1] @ values[..., 8 * at : 8 * at + 8] for at in range(4)]
    assert_close(mechanism(X), torch.cat(blocks, -1))


def test_105_of_no_query_it_is_the_mean():
    mechanism = probing().set(q_latents_weight=0)
    assert_close(mechanism(X), mapped(mechanism, "v_proj", X.mean(1, keepdim=True)))


def test_105_of_one_patch_it_is_its_value():
    mechanism = probing()
    x = tokens(1)
    assert_close(mechanism(x), mapped(mechanism, "v_proj", x))


def test_105_statistics_follow_what_is_pooled():
    mechanism = probing()
    batches, centre, spread = [tokens(5, seed=at) for at in range(3)], torch.zeros(32), 1 - 1e-6
    for x in batches:
        pooled = mechanism(x)[:, 0]
        centre = 0.9 * centre + 0.1 * pooled.mean(0)
        spread = 0.9 * spread + 0.1 * pooled.var(0, unbiased=False)
    moved = mechanism.trained(*batches)
    assert_close(moved["centre"], centre)
    assert_close(moved["spread"], spread)
    normed = mechanism.set(centre=centre, spread=spread)(X)
    assert_close(normed, (probing()(X) - centre) / (spread + 1e-6).sqrt())


def test_105_has_few_parameters_and_no_order():
    mechanism = Mechanism("efficient_probing")
    assert sum(each.numel() for each in mechanism.module.parameters()) == 4 * 32 + 32 * 32
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER))


def energies(mechanism: Mechanism, conditioned: Tensor) -> Tensor:
    return conditioned @ mechanism.parameter("q_latents.weight")[0]


def test_172_pools_states_by_energies_of_what_is_conditioned():
    mechanism = Mechanism("lexicon_affine")
    h, f = X.split((24, 8), -1)
    e = energies(
        mechanism, mapped(mechanism, "factor_proj", f) * h + mapped(mechanism, "shift_proj", f)
    )
    pooled = (e.softmax(-1)[..., None] * h).sum(1, keepdim=True)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", pooled))


def test_172_without_a_condition_it_is_plain_pooling():
    mechanism = Mechanism("lexicon_affine").set(
        factor_proj_weight=0, factor_proj_bias=1, shift_proj_weight=0, shift_proj_bias=0
    )
    h = X[..., :24]
    pooled = (energies(mechanism, h).softmax(-1)[..., None] * h).sum(1, keepdim=True)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", pooled))


def test_172_a_gate_of_nothing_halves_energies():
    mechanism = Mechanism("lexicon_affine", ("factor * h_ + shift", "sigmoid(factor) * h_"))
    mechanism.set(factor_proj_weight=0, factor_proj_bias=0)
    h = X[..., :24]
    pooled = ((energies(mechanism, h) / 2).softmax(-1)[..., None] * h).sum(1, keepdim=True)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", pooled))


def test_172_concatenated_features_add_to_the_energy():
    mechanism = Mechanism(
        "lexicon_affine",
        ("head_dim = width - features", "head_dim = width; value_dim = 24"),
        ("  let factor = f | linear(head_dim, bias = true)\n", ""),
        ("  let shift  = f | linear(head_dim, bias = true)\n", ""),
        ("factor * h_ + shift", "h_ | concat(f)"),
    )
    w = mechanism.parameter("q_latents.weight").clone()
    w[:, 24:] = 0
    mechanism.set(q_latents_weight=w)
    h = X[..., :24]
    pooled = ((h @ w[0, :24]).softmax(-1)[..., None] * h).sum(1, keepdim=True)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", pooled))


def gated_map(mechanism: Mechanism) -> Tensor:
    gated = mapped(mechanism, "k_proj", X).tanh() * mapped(mechanism, "open__proj", X).sigmoid()
    return (gated @ mechanism.parameter("q_latents.weight").mT).mT.softmax(-1)


def trained_map(mechanism: Mechanism, seed: int = 0) -> Tensor:
    """Return the map of a pass in training [b, branches, n]."""
    mechanism(X)
    mechanism.module.train()
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            y = mechanism.module(X)
    finally:
        mechanism.module.eval()
    return torch.linalg.lstsq(X.mT, y.mT).solution.mT  # 11 tokens of 32 features


def test_224_is_gated_pooling():
    mechanism = Mechanism("acmil")
    a = gated_map(mechanism)
    assert_close(mechanism(X), a @ X)
    assert_close(mechanism.weights(X)[:, 0].sum(-1), torch.ones(2, 5).double())
    assert_close(mechanism(X).mean(1), (a.mean(1, keepdim=True) @ X)[:, 0])


def test_224_some_of_the_largest_energies_are_taken_away_in_training():
    """Of the ten largest of eleven six, at random: of the smallest, and four others."""
    mechanism = Mechanism("acmil")
    a = trained_map(mechanism)
    full = gated_map(mechanism)
    assert (a > 1e-6).sum(-1).eq(N - 6).all()
    smallest = full.argmin(-1, keepdim=True)
    assert a.gather(-1, smallest).gt(1e-9).all()
    shared = full * (a > 1e-6)
    assert_close(a, shared / shared.sum(-1, keepdim=True))
    assert not torch.equal(a > 1e-6, trained_map(mechanism, seed=1) > 1e-6)
    for change in (("rate = 0.6", "rate = 0"), ("top = 10", "top = 0")):
        assert_close(trained_map(Mechanism("acmil", change, like=mechanism)), full)


def test_224_branches_are_kept_apart():
    mechanism = Mechanism("acmil", ("rate = 0.6", "rate = 0"))
    a = gated_map(mechanism)
    a = a / a.norm(dim=-1, keepdim=True)
    likeness = [(a[:, i] * a[:, j]).sum(-1) for i, j in combinations(range(5), 2)]
    trained_map(mechanism)
    assert_close(mechanism.module.auxiliary_loss(), torch.stack(likeness).mean())
    equal = mechanism.set(q_latents_weight=mechanism.parameter("q_latents.weight")[:1])
    trained_map(equal)
    assert_close(equal.module.auxiliary_loss(), torch.tensor(1.0).double())


def test_224_equal_branches_find_the_same():
    mechanism = Mechanism("acmil")
    mechanism.set(q_latents_weight=mechanism.parameter("q_latents.weight")[:1])
    y = mechanism(X)
    assert_close(y, y[:, :1].expand_as(y))
    one = Mechanism("acmil", ("branches = 5", "branches = 1"), like=mechanism)
    one.set(q_latents_weight=mechanism.parameter("q_latents.weight")[:1])
    assert_close(one(X), y[:, :1])


def test_224_a_bag_has_no_order():
    mechanism = Mechanism("acmil")
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER))


def fit_by_groups(mechanism: Mechanism, x: Tensor) -> Tensor:
    """The stage with groups along the batch, and latents shifted by a group, as in the paper."""

    def attend(read: str, name: str, q: Tensor, kv: Tensor, **options: Any) -> Tensor:
        streams = (
            mapped(mechanism, f"{read}{at}_proj", each)
            for at, each in zip("qkv", (q, kv, kv), strict=True)
        )
        return mapped(mechanism, f"{name}_proj", attended(*streams, **options))

    def network(inner: str, outer: str, x: Tensor) -> Tensor:
        hidden = gelu(mapped(mechanism, f"{inner}_proj", normed(mechanism, f"{inner}_norm", x)))
        return x + mapped(mechanism, f"{outer}_proj", hidden)

    groups = x.unflatten(1, (-1, 4)) + mechanism.parameter("place_v_latents.weight")
    count, shape = groups.shape[1], groups.shape
    local = normed(mechanism, "local_own__norm", groups.flatten(0, 1))
    near = groups + attend("local_", "near", local, local, is_causal=True).view(shape)
    y = network("inner", "y", near)
    latents = mechanism.parameter("empty_latents.weight").unflatten(0, (8, 2))[:count]
    latents = latents.expand(2, -1, -1, -1)
    read = attend(
        "read_",
        "filled",
        normed(mechanism, "read_q_norm", latents).flatten(0, 1),
        normed(mechanism, "read_normed_norm", y).flatten(0, 1),
    )
    latents = (latents + read.view(latents.shape)).flatten(1, 2)
    own = normed(mechanism, "global_own__norm", latents)
    chunks = torch.arange(2 * count) // 2
    met = latents + attend("global_", "met", own, own, attn_mask=chunks[:, None] >= chunks)
    told = network("deep", "told", met)
    told = normed(mechanism, "told_norm", pad(told, (0, 0, 2, 0))[:, :-2]).unflatten(1, (count, 2))
    back = attend("", "o", normed(mechanism, "q_norm", y).flatten(0, 1), told.flatten(0, 1))
    return (y + back.view(shape)).flatten(1, 2)


def test_248_is_attention_of_folded_groups():
    mechanism = Mechanism("fit")
    x = tokens(24)
    assert_close(mechanism(x), fit_by_groups(mechanism, x))


def test_248_nothing_leaks_back():
    mechanism = Mechanism("fit")
    x = tokens(24)
    assert moved(mechanism(x), mechanism(changed(x, 9))) == [9, 10, 11, *range(12, 24)]


def test_248_groups_meet_through_latents_alone():
    mechanism = Mechanism("fit").set(o_proj_weight=0)
    x = tokens(24)
    assert moved(mechanism(x), mechanism(changed(x, 9))) == [9, 10, 11]
    assert_close(mechanism(x)[:, 4:8], mechanism(x[:, 4:8]))  # places are those in the group


def test_248_latents_that_do_not_meet_tell_of_one_group():
    mechanism = Mechanism("fit").set(met_proj_weight=0)
    x = tokens(24)
    assert moved(mechanism(x), mechanism(changed(x, 9))) == list(range(9, 16))


def copied(theirs: nn.Module, mechanism: Mechanism, pairs: dict[str, str]) -> None:
    """Give layers of an oracle the weights and biases of ours."""
    with torch.no_grad():
        for name, mine in pairs.items():
            layer = theirs.get_submodule(name)
            layer.weight.copy_(mechanism.parameter(f"{mine}.weight"))
            layer.bias.copy_(mechanism.parameter(f"{mine}.bias"))


def test_perceiver_is_that_of_transformers():
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverLayer

    config = PerceiverConfig(d_model=32, d_latents=32, attention_probs_dropout_prob=0.0)
    theirs = (
        PerceiverLayer(
            config, is_cross_attention=True, num_heads=4, q_dim=32, kv_dim=32, widening_factor=1
        )
        .double()
        .eval()
    )
    mechanism = Mechanism("perceiver")
    copied(
        theirs,
        mechanism,
        {
            "attention.self.layernorm1": "q_norm",
            "attention.self.layernorm2": "given_norm",
            "attention.self.query": "q_proj",
            "attention.self.key": "k_proj",
            "attention.self.value": "v_proj",
            "attention.output.dense": "told_proj",
            "layernorm": "inner_norm",
            "mlp.dense1": "inner_proj",
            "mlp.dense2": "o_proj",
        },
    )
    own = mechanism.parameter("own_latents.weight").expand(2, -1, -1)
    assert_close(mechanism(X), found(theirs, own, inputs=X))


def test_perceiver_input_has_no_order():
    mechanism = Mechanism("perceiver")
    assert mechanism(OTHER).shape == (2, 4, 32)
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER))


def test_perceiver_of_equal_tokens_has_no_length():
    mechanism = Mechanism("perceiver")
    x = tokens(1)
    assert_close(mechanism(x.expand(-1, 7, -1)), mechanism(x))


def test_map_head_is_that_of_siglip():
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = SiglipVisionConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    theirs = SiglipMultiheadAttentionPoolingHead(config).double().eval()
    mechanism = Mechanism("map_head")
    copied(
        theirs,
        mechanism,
        {
            "attention.out_proj": "found_proj",
            "layernorm": "inner_norm",
            "mlp.fc1": "inner_proj",
            "mlp.fc2": "o_proj",
        },
    )
    with torch.no_grad():
        theirs.probe.copy_(mechanism.parameter("q_latents.weight"))
        for part in ("weight", "bias"):
            mine = torch.cat([mechanism.parameter(f"{name}_proj.{part}") for name in "qkv"])
            getattr(theirs.attention, f"in_proj_{part}").copy_(mine)
    assert_close(mechanism(X)[:, 0], found(theirs, X))


def test_map_head_has_no_order():
    mechanism = Mechanism("map_head")
    assert_close(mechanism(OTHER[:, ORDER]), mechanism(OTHER))


def test_map_head_of_a_probe_that_asks_nothing_is_a_mean():
    mechanism = Mechanism("map_head").set(q_proj_weight=0, q_proj_bias=0)
    mean = mapped(mechanism, "v_proj", X.mean(1, keepdim=True))
    assert_close(merge(mechanism.streams(X)["pooled"]), mean)


# ── heads ────────────────────────────────────────────────────────────────────────────────


def mhe_streams(mechanism: Mechanism) -> list[Tensor]:
    return [mapped(mechanism, f"{name}_proj", X)[:, None] for name in ("one", "two", "three")]


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
def test_161_without_embeddings_it_is_one_head(name):
    mechanism = Mechanism(name).set(eq=0, ek=0, ev=0)
    o = scaled_dot_product_attention(*mhe_streams(mechanism))[:, 0]
    summed = mechanism.parameter("o_proj.weight").unflatten(1, (4, 8)).sum(1)
    assert_close(mechanism(X), linear(o, summed))


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
def test_161_has_few_parameters(name):
    count = sum(each.numel() for each in Mechanism(name).module.parameters())
    assert count == 3 * 32 * 8 + 3 * 4 * 8 + 32**2


def test_161_what_is_added_to_keys_has_no_effect():
    mechanism = Mechanism("mhe_add")
    y = mechanism(X)
    assert_close(mechanism.set(ek=torch.randn(4, 8))(X), y)


def test_161_what_is_added_to_values_comes_out():
    mechanism = Mechanism("mhe_add")
    ev = mechanism.parameter("ev").clone()
    o = mechanism.mixed(X)
    assert_close(mechanism.set(ev=0).mixed(X) + ev[:, None], o)


def test_161_factors_are_a_metric_of_each_head():
    mechanism = Mechanism("mhe_mul")
    q, k, v = mhe_streams(mechanism)
    eq, ek, ev = (1 + mechanism.parameter(name)[:, None] for name in ("eq", "ek", "ev"))
    s = 8**-0.5 * (q * eq * ek) @ k.mT
    assert_close(mechanism.mixed(X), s.softmax(-1) @ v * ev)


def test_229_equal_shares_of_all_heads_are_plain_attention():
    mechanism = Mechanism("moh", ("active = 2", "active = 4"))
    mechanism.set(always_proj_weight=0, routed_proj_weight=0, parts_proj_weight=0)
    x = tokens(width=64)
    plain = Mechanism("block plain { width = 64; heads = 8 }", like=mechanism)
    assert_close(mechanism(x), plain(x))


def test_229_gates_are_those_of_the_code():
    mechanism = Mechanism("moh")
    x = tokens(width=64)
    always, chosen, parts = (
        mapped(mechanism, f"{name}_proj", x).softmax(-1) for name in ("always", "routed", "parts")
    )
    _, places = chosen.topk(2, dim=-1)
    hot = torch.zeros_like(chosen).scatter_(-1, places, 1.0)
    routed = chosen * hot / (chosen * hot).sum(-1, keepdim=True) * 2
    alpha = 2 * parts
    g = torch.cat([alpha[..., :1] * 4 * always, alpha[..., 1:] * routed], -1)
    streams = mechanism.streams(x)
    assert_close(streams["g"], g)
    assert_close(streams["chosen"].sum(-1), torch.full((2, N), 2.0).double())
    assert_close(
        mechanism(x), mapped(mechanism, "o_proj", merge(mechanism.mixed(x) * g.mT[..., None]))
    )


def test_229_heads_that_are_not_chosen_may_be_anything():
    mechanism = Mechanism("moh")
    x = tokens(1, width=64, batch=1)
    idle = (mechanism.streams(x)["g"][0, 0] == 0).nonzero()[:, 0]
    assert len(idle) == 2
    y = mechanism(x)
    v = mechanism.parameter("v_proj.weight").clone().unflatten(0, (8, 8))
    v[idle] = 7
    assert_close(mechanism.set(v_proj_weight=v.flatten(0, 1))(x), y)


def in_training(mechanism: Mechanism, x: Tensor) -> Tensor:
    mechanism.module.train()
    try:
        return mechanism(x)
    finally:
        mechanism.module.eval()


def test_48_out_of_training_it_is_plain_attention():
    mechanism = Mechanism("headmask")
    plain = Mechanism(MHA, like=mechanism)
    assert_close(mechanism(X), plain(X) + mechanism.parameter("o_proj.bias"))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_48_in_training_heads_are_pruned_and_not_scaled(count):
    mechanism = Mechanism("headmask", ("masked = 2", f"masked = {count}"))
    y, o = in_training(mechanism, X), mechanism.mixed(X)
    for each, heads in zip(y, o, strict=True):
        pruned = []
        for kept in combinations(range(4), 4 - count):
            mask = torch.zeros(4, dtype=torch.float64)
            mask[list(kept)] = 1
            pruned.append(mapped(mechanism, "o_proj", merge((heads * mask[:, None, None])[None])))
        assert min((each - other[0]).abs().max() for other in pruned) < 1e-12


def test_48_sequences_draw_their_own():
    mechanism = Mechanism("headmask")
    x = tokens(3, batch=1).expand(64, -1, -1)
    y = in_training(mechanism, x)
    assert len(y.flatten(1).round(decimals=9).unique(dim=0)) == 6


def test_133_a_factor_as_large_as_the_map_is_plain_attention():
    mechanism = Mechanism("sigma_reparam")
    for name in "qkvo":
        size = torch.linalg.matrix_norm(mechanism.parameter(f"{name}_proj.weight"), ord=2)
        mechanism.set(**{f"{name}_proj_gain": size})
    assert_close(mechanism(X), Mechanism(FULL, like=mechanism)(X))


def test_133_the_length_of_a_weight_has_no_effect():
    mechanism = Mechanism("sigma_reparam")
    y = mechanism(X)
    for name in "qkvo":
        mechanism.set(**{f"{name}_proj_weight": 5 * mechanism.parameter(f"{name}_proj.weight")})
    assert_close(mechanism(X), y)


def test_133_is_torchs_spectral_norm_times_a_factor():
    mechanism = Mechanism("sigma_reparam").set(q_proj_gain=1.7)
    layer = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(mechanism.parameter("q_proj.weight"))
        nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500)
        layer(X)
        layer.eval()
        assert_close(merge(mechanism.streams(X)["q"]), 1.7 * layer(X), 1e-6)


def test_118_of_equal_streams_both_are_plain_attention():
    mechanism = Mechanism("sal", part="shadowed")
    plain = Mechanism("shaw", like=mechanism)
    plain.set(
        v_proj_weight=mechanism.parameter("values_proj.weight"),
        table=mechanism.parameter("both_relative_table"),
    )
    y = plain(X)
    assert_close(mechanism(torch.cat([X, X], -1)), torch.cat([y, y], -1))


def test_118_codes_follow_their_words():
    mechanism = Mechanism("sal", ("rate = 0.01", "rate = 0.1"))
    codes = mechanism.parameter("embed_quantised.code").clone()
    batches = [torch.cat([tokens(3, seed=at), X[:, :3]], -1) for at in range(3)]
    for x in batches:
        words = x[..., :32].flatten(0, 1)
        unit = words / (words.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        nearest = (unit @ codes.mT).argmax(-1)
        for c, code in enumerate(codes.clone()):
            own = unit[nearest == c]
            towards = 0.9 * code + 0.1 * own.mean(0) if len(own) else code
            codes[c] = towards / (towards.square().sum() + 1e-6).sqrt()
    assert_close(mechanism.trained(*batches)["embed_quantised.code"], codes)


def test_118_words_of_one_class_are_read_alike():
    mechanism = Mechanism("sal")
    longer = torch.linspace(1, 3, X.shape[1])[:, None]
    plain, scaled = (mechanism(torch.cat([each, X], -1)) for each in (X, longer * X))
    assert_close(plain[..., 32:], scaled[..., 32:])  # of one direction, so of one code
    assert (plain[..., :32] - scaled[..., :32]).abs().max() > 1e-3


def test_118_classes_alone_say_who_reads_whom():
    mechanism = Mechanism("sal", part="shadowed")
    classes, one, two = X, tokens(seed=1), tokens(seed=2)
    first, second, both = (
        mechanism(torch.cat([each, classes], -1)) for each in (one, two, 3 * one - 2 * two)
    )
    assert_close(both[..., :32], 3 * first[..., :32] - 2 * second[..., :32])
    assert_close(first[..., 32:], second[..., 32:])


def test_differential_is_diffllamas_attention():
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import (
        DiffLlamaAttention,
        DiffLlamaRotaryEmbedding,
    )

    config = DiffLlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        attention_dropout=0.0,
    )
    config._attn_implementation = "eager"
    theirs = DiffLlamaAttention(config, 0).double().eval()
    mechanism = Mechanism("differential").set(o_norm_weight=1)
    with torch.no_grad():
        for name in "qk":
            mine = [mechanism.parameter(f"{part}_{name}_proj.weight") for part in ("one", "two")]
            getattr(theirs, f"{name}_proj").weight.copy_(torch.cat(mine))
        v = mechanism.parameter("v_proj.weight").unflatten(0, (2, 2, 8))
        theirs.v_proj.weight.copy_(v.transpose(0, 1).flatten(0, 2))
        theirs.o_proj.weight.copy_(mechanism.parameter("o_proj.weight"))
    mechanism.set(
        **{
            f"lambda_{name}": getattr(theirs, f"lambda_{name}").detach()
            for name in ("q1", "k1", "q2", "k2")
        }
    )
    angles = DiffLlamaRotaryEmbedding(config)(X, torch.arange(N)[None])
    hidden = torch.zeros(N, N, dtype=torch.float64).masked_fill(~causal(), -torch.inf)
    y = found(theirs, X, position_embeddings=angles, attention_mask=hidden[None, None])
    assert_close(mechanism(X), y, 1e-5)  # theirs has lambda and angles in float32


def lambdas(plus: float, minus: float) -> Mechanism:
    """Return the mechanism, its two products of learned vectors these."""
    first = torch.eye(8, dtype=torch.float64)[0]
    return Mechanism("differential").set(
        lambda_q1=plus * first, lambda_k1=first, lambda_q2=first, lambda_k2=minus * first
    )


def test_differential_equal_maps_cancel():
    mechanism = lambdas(0, math.log(0.2))
    for name in "qk":
        mechanism.set(**{f"two_{name}_proj_weight": mechanism.parameter(f"one_{name}_proj.weight")})
    assert mechanism.streams(X)["rest"].abs().max() < 1e-12


def test_differential_without_the_second_map_it_is_attention_and_a_norm():
    mechanism = lambdas(-1e4, math.log(0.2))
    one = Mechanism(
        "block one { width = 32; heads = 2; head_dim = 8; value_dim = 16; "
        "mask = causal; position = rope; v = x | linear | split; "
        "out = o | rms_norm(eps = 1e-5) | scale(0.8) | merge | linear }",
        like=mechanism,
    )
    one.set(
        **{f"{name}_proj_weight": mechanism.parameter(f"one_{name}_proj.weight") for name in "qk"}
    )
    assert_close(mechanism(X), one(X))


def test_14_the_identity_mixes_nothing():
    mechanism = Mechanism("super_attention").set(mixing=torch.eye(32), shift=0)
    assert_close(mechanism(X), Mechanism("efficient_slices", like=mechanism)(X))


def test_14_the_map_is_between_attention_and_slices():
    mechanism = Mechanism("super_attention")
    v = split(mechanism.parameter("mixing")[:N, :N] @ X + mechanism.parameter("shift")[:N, None])
    a = (8**-0.5 * split(mapped(mechanism, "q_proj", X)) @ split(X).mT).softmax(-1)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(a @ v)))


def test_75_relations_may_be_written_out():
    """All maps of relations in full: [b, relations, n, n]."""
    mechanism = Mechanism("dual_attention")
    q, k = (mapped(mechanism, f"rel_{name}_proj", X).unflatten(-1, (2, 8)) for name in "qk")
    r = 2**-0.5 * torch.einsum("bicr,bjcr->bijr", q, k)
    q, k = (split(mapped(mechanism, f"relational_{name}_proj", X), 2) for name in "qk")
    a = (8**-0.5 * q @ k.mT).softmax(-1)
    library = mechanism.parameter("symbols_library_latents.weight").expand(2, -1, -1)
    symbols = attended(mapped(mechanism, "symbols_q_proj", X), *library.chunk(2, -1))
    symbols = split(mapped(mechanism, "symbol_proj", symbols), 2)
    of_relations = torch.einsum("hdr,bijr->bhijd", mechanism.parameter("told_proj.weight"), r)
    o = torch.einsum("bhij,bhijd->bhid", a, of_relations + symbols[:, :, None])
    assert_close(mechanism(X)[..., 16:], mapped(mechanism, "related_proj", merge(o)))


def test_75_sensory_heads_are_plain_attention():
    mechanism = Mechanism("dual_attention")
    plain = Mechanism(
        "block plain { width = 32; heads = 2; head_dim = 8; "
        "out = o | merge | linear(16) | concat(x | slice(16)) }",
        like=mechanism,
    )
    assert_close(mechanism(X)[..., :16], plain(X)[..., :16])


def test_75_without_relations_symbols_are_the_values():
    mechanism = Mechanism("dual_attention").set(told_proj_weight=0)
    streams = mechanism.streams(X)
    o = scaled_dot_product_attention(
        streams["relational_q"], streams["relational_k"], streams["symbol"]
    )
    assert_close(mechanism(X)[..., 16:], mapped(mechanism, "related_proj", merge(o)))


# ── cross-attention and vision ───────────────────────────────────────────────────────────

LAYERS = tokens(9, width=96, seed=5)


KINDS = torch.tensor([[0] * 5 + [1] * 6] * 2)


CONDITION = tokens(1, width=6, seed=5)


def test_90_all_tokens_are_told_the_same():
    mechanism = Mechanism("conditional_cross")
    told = mechanism.streams(X, context=CONDITION)["told"] - X
    assert_close(told, told[:, :1].expand_as(told))


def test_90_the_attribute_asks():
    mechanism = Mechanism("conditional_cross")
    image = normed(mechanism, "normed_norm", X)
    asked = mapped(mechanism, "asked_v_proj", CONDITION)
    o = attended(
        *(
            mapped(mechanism, f"{name}_proj", each)
            for name, each in zip("qkv", (asked, image, image), strict=True)
        )
    )
    told = X + mapped(mechanism, "told_proj", o)
    inner = gelu(mapped(mechanism, "inner_proj", normed(mechanism, "inner_norm", told)))
    embedding = normalize(told + mapped(mechanism, "o_proj", inner), dim=-1)
    assert_close(mechanism(X, context=CONDITION), embedding, atol=1e-6)  # of the length's eps


def test_90_attributes_do_not_meet():
    mechanism = Mechanism("conditional_cross")
    conditions = torch.cat([CONDITION[:1], tokens(1, width=6, batch=1, seed=6)])
    image = X[:1].expand(2, -1, -1)
    both = mechanism(image, context=conditions)
    assert not torch.allclose(both[0], both[1])
    assert_close(both[:1], mechanism(X[:1], context=CONDITION[:1]))


SENTENCE = tokens(1, width=24, seed=5)


def channels(mechanism: Mechanism) -> Tensor:
    inner = mapped(mechanism, "weights__v_proj_0", SENTENCE)
    inner = normed(mechanism, "weights__v_norm", inner).relu()
    return mapped(mechanism, "weights__v_proj_1", inner).softmax(-1)


def test_210_weighs_channels_by_the_sentence():
    mechanism = Mechanism("sentence_gate")
    assert_close(mechanism(X, context=SENTENCE), X * channels(mechanism))
    assert_close(mechanism(torch.ones_like(X), context=SENTENCE).sum(-1), torch.ones(2, N).double())


def test_210_weights_do_not_depend_on_the_image():
    mechanism = Mechanism("sentence_gate")
    assert_close(mechanism(-3 * X, context=SENTENCE), -3 * mechanism(X, context=SENTENCE))


def test_210_equal_weights_divide_by_the_channels():
    mechanism = Mechanism("sentence_gate").set(weights__v_proj_1_weight=0, weights__v_proj_1_bias=0)
    assert_close(mechanism(X, context=SENTENCE), X / 32)


GRID = tokens(64)
BIASES = tuple(
    f"{'gathered_gathering_' * (read == 'gather')}{read}_{what}"
    for read in ("gather", "read")
    for what in ("rows", "cols", "map")
)


def agent_maps(mechanism: Mechanism) -> tuple[Tensor, Tensor, Tensor]:
    """Return how agents gather and how queries read, and the values: the authors' order."""
    q, k, v = (split(mapped(mechanism, f"{name}_proj", GRID)) for name in ("own", "keys", "values"))
    plane = merge(q).mT.unflatten(-1, (8, 8))
    agents = split(adaptive_avg_pool2d(plane, (2, 2)).flatten(2).mT)
    rows, cols, map_, back_rows, back_cols, back_map = map(mechanism.parameter, BIASES)
    map_, back_map = (
        interpolate(each, size=(8, 8), mode="bilinear", align_corners=False)
        for each in (map_, back_map)
    )
    first = (rows[..., :, None] + cols[..., None, :] + map_).flatten(2)
    second = (back_rows[:, :, None] + back_cols[:, None]).flatten(1, 2)
    second = second + back_map.flatten(2).mT
    return (
        (8**-0.5 * agents @ k.mT + first).softmax(-1),
        (8**-0.5 * q @ agents.mT + second).softmax(-1),
        v,
    )


def test_240_agents_gather_and_queries_read_them():
    mechanism = Mechanism("agent_attention")
    gather, read, v = agent_maps(mechanism)
    plane = merge(v).mT.unflatten(-1, (8, 8))
    near = conv2d(
        plane, mechanism.parameter("taps")[:, None], mechanism.parameter("taps_bias"), padding=1,
        groups=32,
    )  # fmt: skip
    o = merge(read @ (gather @ v)) + near.flatten(2).mT
    assert_close(mechanism(GRID), mapped(mechanism, "o_proj", o))


def test_240_both_maps_are_one_of_low_rank():
    mechanism = Mechanism("agent_attention")
    gather, read, v = agent_maps(mechanism)
    p = read @ gather
    assert_close(p.sum(-1), torch.ones(2, 4, 64).double())
    assert (torch.linalg.matrix_rank(p) <= 4).all()
    assert_close(mechanism.mixed(GRID), p @ v)


def test_240_without_biases_parts_of_the_grid_may_be_exchanged():
    mechanism = Mechanism("agent_attention").set(**dict.fromkeys(BIASES, 0), taps=0)
    places = torch.arange(64).unflatten(0, (2, 4, 2, 4)).permute(0, 2, 1, 3).flatten(2)
    y = mechanism(GRID)
    for order in list(permutations(range(4)))[::7]:
        moved_to = torch.empty(64, dtype=torch.long)
        moved_to[places.flatten(0, 1)] = places.flatten(0, 1)[list(order)]
        assert_close(mechanism(GRID[:, moved_to]), y[:, moved_to])


def test_240_an_agents_place_is_no_number():
    mechanism = Mechanism("agent_attention")
    y = mechanism(GRID)
    assert_close(mechanism.set(agents_q_latents_weight=9)(GRID), y)


# ── recurrences ──────────────────────────────────────────────────────────────────────────


def short(x: Tensor, mechanism: Mechanism, name: str) -> Tensor:
    """Return a causal convolution of every feature for itself, and silu after it."""
    weights = dict(mechanism.meaning.named_parameters())
    weight, bias = weights[f"{name}_conv.weight"].detach(), weights.get(f"{name}_conv.bias")
    y = conv1d(
        pad(x.mT, (3, 0)),
        weight[:, None],
        None if bias is None else bias.detach(),
        groups=len(weight),
    )
    return silu(y.mT)


def fading(mechanism: Mechanism, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps [b, heads, n] and the map of a state with one decay a head."""
    time = softplus(mapped(mechanism, f"{name}time_proj", x)).mT
    total = (-mechanism.parameter(f"{name}rate").exp()[:, None] * time).cumsum(-1)
    gaps = (total[..., :, None] - total[..., None, :]).masked_fill(~causal(), -torch.inf)
    return time, gaps.exp()


@pytest.mark.parametrize("wide", [False, True])
def test_139_is_the_mean_of_two(wide):
    mechanism = Mechanism("lln_diag", ("size = 4", f"size = {N if wide else 4}"))
    q, k, v = (mechanism.streams(X)[name] for name in ("ask", "told", "v"))
    wide_q, wide_k = (each.std((2, 3), correction=0, keepdim=True) for each in (q, k))
    wanted = (((wide_q * wide_k).square() + 0.25) / 0.15).sqrt()
    p = (wanted / (2**0.5 * wide_q) * q).exp() @ (wanted / (2**0.5 * wide_k) * k).exp().mT
    blocks = torch.arange(N) // (N if wide else 4)
    near = softmax(8**-0.5 * q @ k.mT, blocks[:, None] == blocks)
    o = (p / p.sum(-1, keepdim=True) @ v + near @ v) / 2
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(o)))


def test_139_a_block_as_long_as_the_row_is_full_attention():
    mechanism = Mechanism("lln_diag", ("size = 4", "size = 64"))
    q, k = (mechanism.parameter(f"{name}_proj.weight") for name in ("ask", "told"))
    full = Mechanism(FULL, like=mechanism).set(q_proj_weight=q, k_proj_weight=k)
    linear_ = Mechanism("lln_diag", ("(o + diagonal)", "(o + o)"), like=mechanism)
    assert_close(mechanism(X), (linear_(X) + full(X)) / 2)


def test_139_blocks_of_one_without_factors_are_the_value_and_the_mean():
    nothing = ("sqrt(((wide_q * wide_k) ** 2 - base) / slope / 2)", "0 * wide_q")
    mechanism = Mechanism("lln_diag", ("size = 4", "size = 1"), nothing)
    v = mechanism.streams(X)["v"]
    o = (v + v.mean(2, keepdim=True)) / 2
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(o)))


def test_gated_deltanet_is_that_of_olmo_hybrid():
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=4,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_allow_neg_eigval=False,
    )
    theirs = OlmoHybridGatedDeltaNet(config, 0).double().eval()
    mechanism = Mechanism("gated_deltanet_conv")
    pairs = {
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "a_proj": "time_proj",
        "b_proj": "beta_proj",
        "g_proj": "g_proj",
        "o_proj": "o_proj",
        "o_norm": "o_norm",
    }
    with torch.no_grad():
        for name, mine in pairs.items():
            getattr(theirs, name).weight.copy_(mechanism.parameter(f"{mine}.weight"))
        convs = [mechanism.parameter(f"{name}_conv.weight")[:, None] for name in "qkv"]
        theirs.conv1d.weight.copy_(torch.cat(convs))
        theirs.A_log.copy_(mechanism.parameter("rate"))
        theirs.dt_bias.copy_(mechanism.parameter("time_proj.bias"))
    assert_near(mechanism(X), found(theirs, X))


def test_gated_deltanet_with_convolutions_that_do_nothing():
    mechanism = Mechanism(
        "gated_deltanet_conv", ("eps = 1e-5", "eps = 1e-6"), ("head_dim ** -0.5 * (q @ S)", "q @ S")
    )
    now = torch.tensor([0.0, 0, 0, 1])
    mechanism.set(q_conv_weight=now, k_conv_weight=now, v_conv_weight=now)
    without = Mechanism("gated_deltanet", ("step", "time"), like=mechanism)
    assert_close(mechanism(X), without(X))


def test_gated_deltanet_reads_three_tokens_back_where_it_writes_nothing():
    mechanism = Mechanism("gated_deltanet_conv").set(rate=40)
    assert moved(mechanism(X), mechanism(changed(X, 4))) == [4, 5, 6, 7]


def mamba_of(name: str, **sizes: int) -> nn.Module:
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    kind, mixer = {"mamba": ("MambaConfig", MambaMixer), "mamba2": ("Mamba2Config", Mamba2Mixer)}[
        name
    ]
    config = getattr(transformers, kind)(
        hidden_size=32, state_size=8, num_hidden_layers=1, conv_kernel=4, expand=2, **sizes
    )
    return mixer(config, 0).double().eval()


def test_mamba_is_that_of_transformers():
    theirs = mamba_of("mamba", time_step_rank=2)
    mechanism = Mechanism("mamba")
    p = mechanism.parameter
    with torch.no_grad():
        theirs.in_proj.weight.copy_(torch.cat([p("u_proj.weight"), p("gate__proj.weight")]))
        theirs.conv1d.weight.copy_(p("u_conv.weight")[:, None])
        theirs.conv1d.bias.copy_(p("u_conv.bias"))
        theirs.x_proj.weight.copy_(
            torch.cat([p(f"{name}.weight") for name in ("time_proj_0", "k_proj", "q_proj")])
        )
        theirs.dt_proj.weight.copy_(p("time_proj_1.weight"))
        theirs.dt_proj.bias.copy_(p("time_proj_1.bias"))
        theirs.A_log.copy_(p("rate").flatten(0, 1))
        theirs.D.copy_(p("skip").flatten())
        theirs.out_proj.weight.copy_(p("o_proj.weight"))
    assert_near(mechanism(X), found(theirs, X))


def test_mamba_that_fades_at_once_reads_the_token_alone():
    mechanism = Mechanism("mamba").set(rate=40)
    streams = mechanism.streams(X)
    q, k, v = (streams[name] for name in "qkv")
    skip = mechanism.parameter("skip")[:, None]
    assert_close(
        mechanism.mixed(X), (q * k).sum(-1, keepdim=True) * split(streams["time"]) * v + skip * v
    )


def test_mamba_that_does_not_fade_is_a_sum():
    mechanism = Mechanism("mamba").set(rate=-80)
    streams = mechanism.streams(X)
    q, k, v = (streams[name] for name in "qkv")
    written = split(streams["time"]) * v
    o = (q @ k.mT).tril() @ written + mechanism.parameter("skip")[:, None] * v
    assert_close(mechanism.mixed(X), o)


def test_mamba2_is_that_of_transformers():
    theirs = mamba_of("mamba2", num_heads=4, head_dim=16, n_groups=1, chunk_size=16)
    mechanism = Mechanism("mamba2")
    p = mechanism.parameter
    with torch.no_grad():
        names = ("gate__proj", "v_proj", "k_proj", "q_proj", "time_proj")
        theirs.in_proj.weight.copy_(torch.cat([p(f"{name}.weight") for name in names]))
        for part in ("weight", "bias"):
            mine = torch.cat([p(f"{name}_conv.{part}") for name in "vkq"])
            getattr(theirs.conv1d, part).copy_(mine.view_as(getattr(theirs.conv1d, part)))
        theirs.dt_bias.copy_(p("time_proj.bias"))
        theirs.A_log.copy_(p("rate"))
        theirs.D.copy_(p("skip"))
        theirs.norm.weight.copy_(p("o_norm.weight"))
        theirs.out_proj.weight.copy_(p("o_proj.weight"))
    assert_near(mechanism(X), found(theirs, X))


def test_mamba2_is_a_map_that_fades():
    mechanism = Mechanism("mamba2")
    streams = mechanism.streams(X)
    q, k, v = (streams[name] for name in "qkv")
    time, fade = fading(mechanism, "", X)
    o = (q @ k.mT * fade) @ (time[..., None] * v) + mechanism.parameter("skip")[:, None, None] * v
    assert_close(mechanism.mixed(X), o)


def test_mamba2_without_writing_it_passes_values():
    mechanism = Mechanism("mamba2").set(time_proj_weight=0, time_proj_bias=-80, skip=1)
    assert_close(mechanism.mixed(X), mechanism.streams(X)["v"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_hymba_of_attention_alone():
    mechanism = Mechanism("hymba").set(far_scale=0)
    near = Mechanism(
        "block near { width = 32; heads = 4; kv_heads = 2; position = rope; "
        "mask = causal and window(8); "
        "out = o | merge | rms_norm | linear }"
    )
    near.set(
        o_norm_weight=mechanism.parameter("one_norm.weight"),
        o_proj_weight=mechanism.parameter("o_proj.weight") * mechanism.parameter("near_scale"),
        **{
            f"{name}_proj_weight": mechanism.parameter(f"near_{name}_proj.weight") for name in "qkv"
        },
    )
    assert_close(mechanism(X), near(X) / 2)


def test_hymba_of_the_state_space_alone():
    mechanism = Mechanism("hymba").set(near_scale=0)
    q, k = (
        short(mapped(mechanism, f"far_{name}_proj", X), mechanism, f"far_{name}") for name in "qk"
    )
    v = split(short(mapped(mechanism, "far_v_proj", X), mechanism, "far_v"))
    time, fade = fading(mechanism, "far_ssd_", X)
    skip = mechanism.parameter("far_ssd_skip")[:, None, None]
    o = ((q @ k.mT)[:, None] * fade) @ (time[..., None] * v) + skip * v
    gated = merge(o) * silu(mapped(mechanism, "far_gate__proj", X))
    two = rms(gated, mechanism.parameter("two_norm.weight")) * mechanism.parameter("far_scale")
    assert_close(mechanism(X), mapped(mechanism, "o_proj", two / 2))


def test_hymba_both_count_alike_however_large():
    mechanism = Mechanism("hymba", ("rms_norm", "rms_norm(eps = 1e-14)"))
    y = mechanism(X)
    v = 7 * mechanism.parameter("near_v_proj.weight")
    assert_close(mechanism.set(near_v_proj_weight=v)(X), y)


def averages(mechanism: Mechanism, x: Tensor) -> Tensor:
    """Return the moving averages as one convolution with its kernel written out."""
    delta, alpha, beta, gamma = (
        mechanism.parameter(f"average_moving_{name}").flatten(0, 1)
        for name in ("delta", "alpha", "beta", "gamma")
    )
    p, a = delta.sigmoid(), alpha.sigmoid()
    q = 1 - p * a
    lags = torch.arange(N, dtype=torch.float64)
    beta = beta + torch.tensor([1, -1, 1, -1])
    kernel = (gamma * 4**-0.5 * p * beta * q ** lags[:, None, None]).sum(-1).T
    return conv1d(pad(x.mT, (N - 1, 0)), kernel.flip(-1)[:, None], groups=32).mT


def test_173_an_average_is_a_convolution():
    mechanism = Mechanism("mega")
    streams = mechanism.streams(X)
    assert_close(merge(streams["average"]), averages(mechanism, streams["normed"]))


def test_173_mega_written_out():
    mechanism = Mechanism("mega")
    x = normed(mechanism, "normed_norm", X)
    p = mechanism.parameter
    mean = silu(averages(mechanism, x) + p("omega") * x)
    update, z, reset, hx = (
        mapped(mechanism, f"{name}_proj", mean) for name in ("update", "z", "reset", "hx")
    )
    update, z, reset = update.sigmoid(), silu(z), silu(reset)
    q, k = p("qf") * z + p("qs"), p("kf") * z + p("ks")
    gaps = torch.arange(N)[:, None] - torch.arange(N)
    a = softmax(q @ k.mT / 16**0.5 + p("bias")[gaps.clip(0)])
    found = silu(
        hx + mapped(mechanism, "found_proj", reset * (a @ silu(mapped(mechanism, "v_proj", x))))
    )
    assert_close(mechanism(X), X + update * (found - X))


def test_173_an_encoder_averages_both_ways():
    mechanism = Mechanism("mega_encoder")
    streams = mechanism.streams(X)
    x, lags = streams["normed"], torch.arange(N, dtype=torch.float64)
    both = torch.zeros_like(x)
    for back in ("", "back_"):
        delta, alpha, beta, gamma = (
            mechanism.parameter(f"average_moving_{back}{name}")
            for name in ("delta", "alpha", "beta", "gamma")
        )
        p = delta.sigmoid()
        fades = (1 - p * alpha.sigmoid()) ** lags[:, None, None]
        turned = beta + torch.tensor([1, -1, 1, -1])
        kernel = (gamma * 4**-0.5 * p * turned * fades).sum(-1).T
        told = x.flip(1) if back else x
        made = conv1d(pad(told.mT, (N - 1, 0)), kernel.flip(-1)[:, None], groups=32).mT
        both = both + (made.flip(1) if back else made)
    assert_close(merge(streams["average"]), both)
    p = mechanism.parameter
    mean = silu(both + p("omega") * x)
    update, z, reset, hx = (
        mapped(mechanism, f"{name}_proj", mean) for name in ("update", "z", "reset", "hx")
    )
    z = silu(z)
    q, k = p("qf") * z + p("qs"), p("kf") * z + p("ks")
    gaps = torch.arange(N) - torch.arange(N)[:, None]
    a = (q @ k.mT / 16**0.5 + p("bias")[gaps + 32]).softmax(-1)
    read = silu(reset) * (a @ silu(mapped(mechanism, "v_proj", x)))
    found = silu(hx + mapped(mechanism, "found_proj", read))
    assert_close(mechanism(X), X + update.sigmoid() * (found - X))


def test_173_a_closed_gate_leaves_the_input():
    mechanism = Mechanism("mega").set(update_proj_weight=0, update_proj_bias=-900)
    assert_close(mechanism(X), X)


def test_173_the_first_token_sees_itself_alone():
    mechanism = Mechanism("mega")
    assert_close(mechanism(X)[:, :1], mechanism(X[:, :1]))
    assert moved(mechanism(X), mechanism(changed(X, 6))) == [6, 7, 8, 9, 10]


# ── a query of zero, random features, a map for all layers, a prefix without end ─────────


def test_201_is_torchs_attention_twice():
    mechanism = Mechanism("gcog_cross")
    z = torch.zeros(2, 1, 32, dtype=torch.float64)
    for part, out, source in (("rules", "ruled", X), ("seen_", "o", OTHER)):
        theirs = nn.MultiheadAttention(32, 1, batch_first=True, dtype=torch.float64)
        p = dict(mechanism.meaning.named_parameters())
        with torch.no_grad():
            for at, name in enumerate("qkv"):
                rows = slice(32 * at, 32 * at + 32)
                if f"{part}_{name}_proj.weight" in p:
                    theirs.in_proj_weight[rows] = p[f"{part}_{name}_proj.weight"]
                    theirs.in_proj_bias[rows] = p[f"{part}_{name}_proj.bias"]
            if part == "rules":
                theirs.in_proj_bias[:32] = p["rules_q_latents.weight"][0]
            theirs.out_proj.weight.copy_(p[f"{out}_proj.weight"])
            theirs.out_proj.bias.copy_(p[f"{out}_proj.bias"])
        z = layer_norm(
            z + found(theirs, z, source, source),
            (32,),
            mechanism.parameter("gain"),
            mechanism.parameter("shift"),
        )
    assert_close(mechanism(X, context=OTHER), z)


def test_201_neither_rules_nor_objects_have_an_order():
    mechanism = Mechanism("gcog_cross")
    y = mechanism(OTHER, context=X[:, :9])
    assert y.shape == (2, 1, 32)
    assert_close(mechanism(OTHER[:, ORDER], context=X[:, ORDER]), y)


def random_map(mechanism: Mechanism, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features [b, n, 33] and the weights [b, heads, n, n] of others."""
    full = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    w = mechanism.parameter("k_proj.weight").unflatten(0, (4, 33))
    s = torch.einsum("bic,hcd,bjd->bhij", full, w, full).relu()
    n = x.shape[1]
    return full, s.masked_fill(torch.eye(n, dtype=torch.bool), 0) / (n - 1)


def test_171_is_a_bilinear_form_for_each_head():
    mechanism = Mechanism("random_features")
    full, p = random_map(mechanism, X)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(p @ full[:, None])))


def test_171_random_forms_are_not_learned_and_the_rest_is_linear():
    mechanism = Mechanism("random_features")
    full, p = random_map(mechanism, X)
    mechanism.module.load_state_dict(mechanism.meaning.state_dict())
    parameters = dict(mechanism.module.named_parameters())
    y = mechanism.module(X)[..., 0].sum()
    k, o = torch.autograd.grad(
        y, [parameters["k_proj.weight"], parameters["o_proj.weight"]], allow_unused=True
    )
    assert k is None or not k.any()
    assert_close(o[0], merge(p @ full[:, None]).sum((0, 1)))


def test_171_larger_forms_are_larger_features():
    mechanism = Mechanism("random_features")
    y = mechanism(X)
    assert_close(mechanism.set(k_proj_weight=3 * mechanism.parameter("k_proj.weight"))(X), 3 * y)


def test_171_others_have_no_order_and_may_be_doubled():
    mechanism = Mechanism("random_features")
    first, others = X[:, :1], X[:, 1:]
    y = mechanism(X)[:, :1]
    assert_close(mechanism(torch.cat([first, others.flip(1)], 1))[:, :1], y)
    assert_close(mechanism(torch.cat([first, others, others], 1))[:, :1], y)


PAGE = tokens(width=36)


def boxes(mechanism: Mechanism, x: Tensor) -> Tensor:
    """Return the embeddings of boxes, looked up in four tables."""
    left, top, right, bottom = ((20 * (x[..., 32:] + 1)).floor().clip(0, 39).long()).unbind(-1)
    tables = [mechanism.parameter(f"layers.0.attn.{name}_proj.weight").mT
              for name in ("across", "down", "high", "wide")]  # fmt: skip

    def looked_up(at: Tensor, table: Tensor) -> Tensor:
        inside = ((at >= 0) & (at < 40))[..., None]
        return torch.where(inside, table[at.clip(0, 39)], 0)

    found = looked_up(left, tables[0]) + looked_up(right, tables[0]) + looked_up(top, tables[1])
    found = found + looked_up(bottom, tables[1])
    found = found + looked_up(bottom - top, tables[2]) + looked_up(right - left, tables[3])
    return normed(mechanism, "layers.0.attn.layout_norm", found)


def skimmed(mechanism: Mechanism, x: Tensor) -> Tensor:
    """Layers of BERT that share a map, then a norm."""
    text, layout = x[..., :32], boxes(mechanism, x)
    q, k = (split(mapped(mechanism, f"layers.0.attn.{name}_proj", layout)) for name in "qk")
    p = (8**-0.5 * q @ k.mT).softmax(-1)
    for layer in (f"layers.{at}.attn." for at in range(3)):
        o = merge(p @ split(mapped(mechanism, f"{layer}v_proj", text)))
        text = normed(
            mechanism, f"{layer}read_norm", text + mapped(mechanism, f"{layer}read_proj", o)
        )
        inner = gelu(mapped(mechanism, f"{layer}inner_proj_0", text))
        text = normed(
            mechanism, f"{layer}o_norm", text + mapped(mechanism, f"{layer}inner_proj_1", inner)
        )
    return torch.cat([text, x[..., 32:]], -1)


def test_99_one_map_serves_all_layers():
    mechanism = Mechanism("skim_attention")
    assert_close(mechanism(PAGE), skimmed(mechanism, PAGE))


def test_99_only_the_lowest_layer_draws_a_map():
    names = [name for name, _ in Mechanism("skim_attention").meaning.named_parameters()]
    assert [name for name in names if "q_proj" in name or "k_proj" in name] == [
        f"layers.0.attn.{name}_proj.{part}" for name in "qk" for part in ("weight", "bias")
    ]


def first_read(x: Tensor) -> Tensor:
    """What the heads of the lowest layer read, of values without a bias."""
    mechanism = Mechanism("skim_attention").set(layers_0_attn_v_proj_bias=0)
    layer = mechanism.meaning.get_submodule("layers.0.attn")
    with torch.no_grad():
        return layer.layer(x, ())[1]["o"]


def test_99_text_does_not_change_who_reads_whom():
    louder = torch.cat([3 * PAGE[..., :32], PAGE[..., 32:]], -1)
    assert_close(first_read(louder), 3 * first_read(PAGE))


def test_99_equal_boxes_are_read_evenly():
    page = torch.cat([PAGE[..., :32], PAGE[:, :1, 32:].expand(-1, N, -1)], -1)
    read = first_read(page)
    assert_close(read, read.mean(2, keepdim=True).expand_as(read))


def ntk(mechanism: Mechanism, z: Tensor) -> Tensor:
    """The formula with its numerator and its denominator written out."""
    q, k = (split(mapped(mechanism, f"{name}_proj", X)) for name in "qk")
    v = split(mapped(mechanism, "tokens_v_proj", X))
    a = (8**-0.5 * q @ k.mT).exp() * causal()
    phi = elu(8**-0.25 * q) + 1
    above = a @ v + phi @ mechanism.parameter("found_in_prefix_Z")
    below = a.sum(-1, keepdim=True) + phi @ z.abs()[..., None]
    return mapped(mechanism, "o_proj", merge(above / below))


def test_185_shares_one_denominator():
    mechanism = Mechanism("ntk_attention")
    z = mechanism.parameter("weight_of_prefix_z").clone()
    assert_close(mechanism(X), ntk(mechanism, z))
    assert_close(mechanism.set(weight_of_prefix_z=-z)(X), ntk(mechanism, z))


def test_185_an_empty_prefix_leaves_attention():
    mechanism = Mechanism("ntk_attention").set(found_in_prefix_Z=0, weight_of_prefix_z=1e-15)
    plain = Mechanism(MHA, like=mechanism)
    plain.set(v_proj_weight=mechanism.parameter("tokens_v_proj.weight"))
    assert_close(mechanism(X), plain(X))


def test_185_is_attention_with_a_prefix_whose_kernel_is_exact():
    """A prefix of keys as features: its exponentials are replaced by products of features."""
    mechanism = Mechanism("ntk_attention")
    keys, values = tokens(5, 8, batch=4).abs(), tokens(5, 8, batch=4, seed=1)
    mechanism.set(found_in_prefix_Z=keys.mT @ values, weight_of_prefix_z=keys.sum(1))
    q, k = (split(mapped(mechanism, f"{name}_proj", X)) for name in "qk")
    v = split(mapped(mechanism, "tokens_v_proj", X))
    kernel = (elu(8**-0.25 * q) + 1) @ keys.mT
    a = torch.cat([kernel, (8**-0.5 * q @ k.mT).exp() * causal()], -1)
    o = a / a.sum(-1, keepdim=True) @ torch.cat([values.expand(2, -1, -1, -1), v], 2)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(o)))


def convolved(mechanism: Mechanism, name: str) -> Tensor:
    weight = mechanism.parameter(f"{name}_conv.weight")
    x = pad(mapped(mechanism, f"{name}_proj", X).mT, (3, 0))
    return silu(conv1d(x, weight[:, None], groups=len(weight)).mT)


def natsl(mechanism: Mechanism, stays: Tensor) -> Tensor:
    """The layer, chunk by chunk, for `stays` [b, heads, chunks]: whose keys later queries see."""
    asked, keyed, held = (convolved(mechanism, name) for name in ("asked", "keyed", "held"))
    q, k, v = (split(each, 2) for each in (asked, keyed, held))
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    beta = mapped(mechanism, "state__routed_delta_beta_proj", X).sigmoid().mT
    rate = mechanism.parameter("state__routed_delta_rate").exp()
    alpha = softplus(mapped(mechanism, "state__routed_delta_alpha__proj", X))
    alpha = (-rate * alpha).exp().mT
    found = torch.empty_like(v)
    start = torch.zeros(2, 2, 8, 16, dtype=X.dtype)
    for at in range(0, N, 4):
        state, faded = start, start
        for t in range(at, min(at + 4, N)):
            a, b, key = alpha[..., t, None, None], beta[..., t, None, None], k[..., t, :, None]
            state = a * (state - b * key @ (key.mT @ state)) + b * key @ v[..., t, None, :]
            faded = a * faded
            found[..., t, :] = 8**-0.5 * (q[..., t, None, :] @ state)[..., 0, :]
        start = torch.where(stays[..., at // 4, None, None], faded, state)
    q, k = (split(each, 4) for each in (asked, keyed))
    q, k = (nn.functional.rms_norm(each, (4,), eps=1e-6) for each in (q, k))
    q, k = (
        each * mechanism.parameter(f"both_{name}_norm.weight")
        for each, name in ((q, "q"), (k, "k"))
    )
    chunk = torch.arange(N) // 4
    later = stays.repeat_interleave(2, 1).repeat_interleave(4, 2)[:, :, None, :N]
    seen = causal() & (later | (chunk[:, None] == chunk))
    read = softmax(0.5 * q @ k.mT, seen) @ split(held, 4)
    both = [
        nn.functional.rms_norm(each, (8,), mechanism.parameter(f"both_norm_{at}.weight"), 1e-6)
        for at, each in enumerate((read, split(merge(found), 4)))
    ]
    ours, theirs = (mapped(mechanism, f"both_{name}_proj", asked) for name in ("ours", "theirs"))
    share = torch.stack([ours, theirs]).softmax(0).mT[..., None]
    o = merge(share[0] * both[0] + share[1] * both[1])
    return mapped(mechanism, "o_proj", o * silu(mapped(mechanism, "gate__proj", X)))


def test_250_chunks_stay_as_keys_or_in_the_state():
    mechanism = Mechanism("natsl")
    chunks = pad(X, (0, 0, 0, 1)).unflatten(1, (-1, 4))
    means = chunks.sum(2) / torch.tensor([4, 4, 3])[:, None]
    logits = [mapped(mechanism, f"{name}_proj", means) for name in ("stay", "vote")]
    stays = (logits[0] > logits[1]).mT
    assert stays.any()
    assert not stays.all()
    assert_close(mechanism(X), natsl(mechanism, stays))


def test_250_where_nothing_is_preferred_all_goes_into_the_state():
    mechanism = Mechanism("natsl")
    mechanism.set(stay_proj_weight=mechanism.parameter("vote_proj.weight"))
    assert_close(mechanism(X), natsl(mechanism, torch.zeros(2, 2, 3, dtype=torch.bool)))


def test_99_an_encoder_reads_what_the_map_of_boxes_gives_most():
    mechanism = Mechanism("skimming_mask")
    layout, text = boxes(mechanism, PAGE), PAGE[..., :32]
    asked, known = (
        split(mapped(mechanism, f"layers.0.attn.{name}_proj", layout))
        for name in ("asked", "known")
    )
    s = asked @ known.mT
    read = torch.zeros_like(s).scatter_(-1, s.topk(4).indices, 1.0).bool()
    for layer in (f"layers.{at}.attn." for at in range(3)):
        q, k, v = (split(mapped(mechanism, f"{layer}{name}_proj", text)) for name in "qkv")
        o = merge(softmax(8**-0.5 * q @ k.mT, read) @ v)
        text = normed(
            mechanism, f"{layer}read_norm", text + mapped(mechanism, f"{layer}read_proj", o)
        )
        inner = gelu(mapped(mechanism, f"{layer}inner_proj_0", text))
        text = normed(
            mechanism, f"{layer}o_norm", text + mapped(mechanism, f"{layer}inner_proj_1", inner)
        )
    assert_close(mechanism(PAGE), torch.cat([text, PAGE[..., 32:]], -1))


def test_99_a_mask_of_all_keys_is_the_dense_encoder():
    wide = Mechanism("skimming_mask", ("count = 4", f"count = {N}"))
    layers = "[lowest(places, count)] + [again] * 2"
    dense = Mechanism("skimming_mask", (layers, "[encoder] * 3"), like=wide)
    assert_close(wide(PAGE), dense(PAGE))
