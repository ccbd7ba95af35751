"""Family `recurrent`: states against the maps, products and loops they come from."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu, layer_norm, relu, sigmoid, silu, softplus

from .mechanisms import Mechanism, assert_close, causal, softmax, tokens

X = tokens()
N = X.shape[1]
GAP = torch.arange(N)[:, None] - torch.arange(N)


def qkv(mechanism: Mechanism, x: Tensor = X) -> list[Tensor]:
    return [mechanism.streams(x)[name] for name in "qkv"]


def shared_out(a: Tensor) -> Tensor:
    return a / a.sum(-1, keepdim=True)


def per_head(stream: Tensor, heads: int = 4) -> Tensor:
    """[b, n, heads · d] → [b, heads, n, d]"""
    return stream.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize(
    "name",
    ["linear_attention", "relu_linear", "efficient_attention", "hedgehog", "key_only", "inline"],
)
def test_weights_sum_to_one(name):
    mechanism = Mechanism(name)
    v = torch.full_like(mechanism.streams(X)["v"], 3)
    assert_close(mechanism.mixed(X, v=v), v)


@pytest.mark.parametrize(
    "name", ["linear_attention", "efficient_attention", "hedgehog", "key_only", "inline"]
)
def test_one_token_gives_its_value(name):
    mechanism = Mechanism(name)
    x = tokens(1)
    assert_close(mechanism.mixed(x), mechanism.streams(x)["v"])


def test_226_linear_attention_has_a_map():
    mechanism = Mechanism("linear_attention")
    q, k, v = qkv(mechanism)
    a = (elu(q) + 1) @ (elu(k) + 1).mT * causal()
    assert_close(mechanism.mixed(X), shared_out(a) @ v)


def test_relu_linear_has_a_map_over_all_tokens():
    mechanism = Mechanism("relu_linear")
    q, k, v = qkv(mechanism)
    assert_close(mechanism.mixed(X), shared_out(relu(q) @ relu(k).mT) @ v)
    assert_close(mechanism.mixed(X, q=3 * q), mechanism.mixed(X))


def test_98_two_softmaxes():
    mechanism = Mechanism("efficient_attention")
    q, k, v = qkv(mechanism)
    assert_close(mechanism.mixed(X), q.softmax(-1) @ (k.softmax(-2).mT @ v))


def test_98_constants_that_cancel():
    mechanism = Mechanism("efficient_attention")
    q, k, _ = qkv(mechanism)
    shifted = mechanism.mixed(X, q=q + torch.arange(N)[:, None], k=k + torch.arange(8))
    assert_close(shifted, mechanism.mixed(X))


def test_retention_is_a_map_that_fades():
    mechanism = Mechanism("retnet")
    q, k, v = qkv(mechanism)
    decay = 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64)[:, None, None]
    fading = decay ** GAP.clip(min=0) * causal()
    assert_close(mechanism.mixed(X), 8**-0.5 * (q @ k.mT * fading) @ v)


def test_retention_norms_each_head_and_gates():
    mechanism = Mechanism("retnet").set(o_norm_weight=1, o_norm_bias=0)
    normed = layer_norm(mechanism.mixed(X), (8,)).transpose(1, 2).flatten(2)
    gate = silu(X @ mechanism.parameter("g_proj.weight").mT)
    assert_close(mechanism(X), (normed * gate) @ mechanism.parameter("o_proj.weight").mT)


def test_17_without_decay_it_is_a_plain_sum():
    mechanism = Mechanism(
        "transnormer", ("exp(-8 * h / heads * (1 - layer / depth))", "1"), part="upper"
    )
    q, k, v = qkv(mechanism)
    assert_close(mechanism.mixed(X), (q @ k.mT * causal()) @ v)


def test_a_gate_of_a_head_is_a_product_of_gates():
    mechanism = Mechanism("simple_gla")
    q, k, v = qkv(mechanism)
    total = per_head(mechanism.streams(X)["alpha"])[..., 0].log().cumsum(-1)
    fading = (total[..., :, None] - total[..., None, :]).exp() * causal()
    assert_close(mechanism.mixed(X), 8**-0.5 * (q @ k.mT * fading) @ v)


@pytest.mark.parametrize("name", ["simple_gla", "gla"])
def test_open_gates_forget_nothing(name):
    mechanism = Mechanism(name)
    q, k, v = qkv(mechanism)
    open_ = torch.ones_like(mechanism.streams(X)["alpha"])
    assert_close(mechanism.mixed(X, alpha=open_), 8**-0.5 * (q @ k.mT * causal()) @ v)


def test_gates_of_rows_weigh_features():
    mechanism = Mechanism("gla")
    q, k, v = qkv(mechanism)
    total = mechanism.streams(X)["alpha"].log().cumsum(-2)  # [b, h, n, d]
    s = (q * total.exp()) @ (k * (-total).exp()).mT * causal()
    assert_close(mechanism.mixed(X), 8**-0.5 * s @ v)


def test_gla_gates_are_near_one():
    mechanism = Mechanism("gla").set(alpha_proj_1_weight=0, alpha_proj_1_bias=-4)
    alpha = mechanism.streams(X)["alpha"]
    assert_close(alpha**16, torch.full_like(alpha, -4).sigmoid())
    assert alpha.min() > 0.75


def looped(mechanism: Mechanism, alpha: Tensor, beta: Tensor) -> Tensor:
    """The delta rule as a product of matrices, token by token; alpha, beta [b, h, n]."""
    q, k, v = qkv(mechanism)
    state = torch.zeros(*q.shape[:2], 8, 8, dtype=q.dtype)
    out = []
    for t in range(q.shape[2]):
        key, a, b = k[:, :, t, :, None], alpha[..., t, None, None], beta[..., t, None, None]
        state = a * (torch.eye(8) - b * key @ key.mT) @ state + b * key @ v[:, :, t, None]
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2)


def test_the_delta_rule_is_a_product_of_reflections():
    mechanism = Mechanism("deltanet")
    beta = per_head(mechanism.streams(X)["beta"])[..., 0]
    assert_close(mechanism.mixed(X), looped(mechanism, torch.ones_like(beta), beta))


def test_the_delta_rule_recalls_what_was_written_last():
    mechanism = Mechanism("deltanet", ("l2_norm", "l2_norm(eps = 0)"))
    streams = mechanism.streams(X)
    wholly = torch.ones_like(streams["beta"])
    assert_close(mechanism.mixed(X, q=streams["k"], beta=wholly), streams["v"])


def test_the_gated_delta_rule_is_a_product_too():
    mechanism = Mechanism("gated_deltanet")
    streams = mechanism.streams(X)
    rate = mechanism.parameter("rate").exp()[:, None]
    alpha = torch.exp(-rate * per_head(streams["step"])[..., 0])
    assert_close(mechanism.mixed(X), looped(mechanism, alpha, per_head(streams["beta"])[..., 0]))


def test_without_forgetting_the_gated_delta_rule_is_the_delta_rule():
    gated = Mechanism("gated_deltanet").set(rate=-60)
    assert_close(gated.mixed(X), Mechanism("deltanet", like=gated).mixed(X))


def test_174_levels_of_a_token():
    assert [weighed_level(6, j) for j in range(7)] == [3, 3, 3, 3, 2, 2, 0]


def weighed_level(i: int, j: int) -> int:
    """The level in which token i finds token j, bit by bit from the top."""
    if i == j:
        return 0
    top = i.bit_length() - 1
    return top + 1 if j < 1 << top else weighed_level(i - (1 << top), j - (1 << top))


def in_levels(mechanism: Mechanism) -> Tensor:
    """The weight of each pair [b, h, n, n]: that of the level in which i finds j."""
    lam = softplus(mechanism.parameter("spread")[:, None] * mechanism.streams(X)["lam"])
    levels = torch.tensor([[weighed_level(i, min(i, j)) for j in range(N)] for i in range(N)])
    return lam.gather(-1, levels.expand(*lam.shape[:2], N, N)) * causal()


def test_174_mamba2_weighed_by_levels_has_a_map():
    mechanism = Mechanism("log_linear_mamba2")
    q, k, v = qkv(mechanism)
    time = per_head(mechanism.streams(X)["time"])[..., 0]
    total = (-mechanism.parameter("rate").exp()[:, None] * time).cumsum(-1)
    fading = (total[..., :, None] - total[..., None, :]).exp()
    written = time[..., None] * v
    skipped = mechanism.parameter("skip")[:, None, None] * v
    weighed = in_levels(mechanism)
    assert_close(mechanism.mixed(X), (q @ k.mT * fading * weighed) @ written + skipped)


def test_174_the_gated_delta_rule_weighed_by_levels_has_a_map():
    """What the keys leave of each other, all at once: a triangular system (the parallel form)."""
    mechanism = Mechanism("log_linear_gated_deltanet")
    q, k, v = qkv(mechanism)
    streams = mechanism.streams(X)
    rate = mechanism.parameter("rate").exp()[:, None]
    total = (-rate * per_head(streams["step"])[..., 0]).cumsum(-1)
    fading = (total[..., :, None] - total[..., None, :]).exp()
    beta = per_head(streams["beta"])
    left = torch.linalg.inv(torch.eye(N) + (beta * (k @ k.mT)).tril(-1))
    a = (q @ k.mT * causal()) @ left * fading * in_levels(mechanism)
    assert_close(mechanism.mixed(X), a @ (beta * v))


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_174_with_all_weights_one_nothing_changes(name):
    ones = ("by softplus(spread * lam)", "by spread + 0 * lam")
    mechanism = Mechanism(f"log_linear_{name}", ones).set(spread=1)
    short = [("x | linear | split", "x | linear | conv(4) | split")]
    short += [("linear | split | silu", "linear | conv(4) | silu | split")]
    changes = short[1:] if name == "gated_deltanet" else ()
    assert_close(mechanism(X), Mechanism(name, *changes, like=mechanism)(X))


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_174_the_first_level_alone_is_the_token_itself(name):
    first = ("by softplus(spread * lam)", "by spread + 0 * lam")
    mechanism = (
        Mechanism(f"log_linear_{name}", first, (" + skip * v", ""))
        if (name == "mamba2")
        else Mechanism(f"log_linear_{name}", first)
    )
    mechanism.set(spread=torch.arange(15) == 0)
    q, k, v = qkv(mechanism)
    wrote = per_head(mechanism.streams(X)["time" if name == "mamba2" else "beta"])
    assert_close(mechanism.mixed(X), (q * k).sum(-1, keepdim=True) * wrote * v)


def test_mlstm_is_a_map_with_a_floor_under_its_denominator():
    mechanism = Mechanism("mlstm")
    q, k, v = qkv(mechanism)
    streams = mechanism.streams(X)
    total = per_head(streams["keep"])[..., 0].log().cumsum(-1)
    write = per_head(streams["write"])[..., 0]
    fading = (total[..., :, None] - total[..., None, :]).exp() * write[..., None, :] * causal()
    a = 8**-0.5 * q @ k.mT * fading
    assert_close(mechanism.mixed(X), a @ v / a.sum(-1, keepdim=True).abs().clip(min=1))


def test_mlstm_is_its_stable_form():
    """A running maximum m of the log gates, as in the paper's appendix, changes nothing."""
    mechanism = Mechanism("mlstm")
    stable = Mechanism(
        "mlstm",
        ("state z[head_dim] = 0\n", "state z[head_dim] = 0\n  state m_ = 0\n"),
        (
            "  C <- keep * C + write * outer(u, v)\n  z <- keep * z + write * u\n",
            "  top <- max(log(keep) + m_, log(write))\n  f <- exp(log(keep) + m_ - top)\n"
            "  C <- f * C + exp(log(write) - top) * outer(u, v)\n"
            "  z <- f * z + exp(log(write) - top) * u\n  m_ <- top\n",
        ),
        ("max(abs(dot(q, z)), 1)", "max(abs(dot(q, z)), exp(-m_))"),
        like=mechanism,
    )
    assert_close(mechanism(X), stable(X))


def test_241_hedgehog_has_a_map():
    mechanism = Mechanism("hedgehog")
    q, k, v, one, two = (mechanism.streams(X)[name] for name in ("ask", "told", "v", "one", "two"))
    a = one.softmax(-1) @ two.softmax(-1).mT + (-one).softmax(-1) @ (-two).softmax(-1).mT
    a = shared_out(a * causal())
    assert_close(mechanism.mixed(X), a @ v)
    teacher = (8**-0.5 * q @ k.mT).masked_fill(~causal(), -torch.inf).softmax(-1)
    mechanism.module.train()
    mechanism(X)
    mechanism.module.eval()
    apart = -(teacher * a.where(a > 0, 1).log()).sum(-1).mean()
    assert_close(mechanism.module.auxiliary_loss(), apart)


def test_241_features_of_the_teacher_itself_leave_its_entropy():
    """The loss is the teacher's entropy where both maps are one, here even."""
    mechanism = Mechanism("hedgehog").set(ask_proj_weight=0, one_proj_weight=0, asked_bias=0)
    mechanism.set(told_bias=0, two_proj_weight=0)
    mechanism.module.train()
    mechanism(X)
    mechanism.module.eval()
    even = torch.arange(1, N + 1).double().log().mean()
    assert_close(mechanism.module.auxiliary_loss(), even)


def test_241_the_two_halves_swap_with_the_sign():
    mechanism = Mechanism("hedgehog")
    y = mechanism(X)
    names = ("one_proj_weight", "two_proj_weight", "asked_bias", "told_bias")
    turned = {name: -mechanism.parameter(re.sub("_w", ".w", name)) for name in names}
    assert_close(mechanism.set(**turned)(X), y)


def test_aft_is_a_softmax_for_each_channel():
    mechanism = Mechanism("aft_simple")
    q, k, v = qkv(mechanism)
    p = softmax(k.mT[..., None, :].expand(-1, -1, -1, N, -1))  # [b, 1, channels, n, n]
    expected = sigmoid(q) * torch.einsum("bhcij,bhjc->bhic", p, v)
    assert_close(mechanism.mixed(X), expected)


def test_aft_does_not_see_what_all_keys_share():
    mechanism = Mechanism("aft_simple")
    k = mechanism.streams(X)["k"]
    assert_close(mechanism.mixed(X, k=k + 5), mechanism.mixed(X))
    assert mechanism.mixed(X, k=1000 * k).isfinite().all()


def test_208_rows_differ_by_the_causal_cut_alone():
    mechanism = Mechanism("key_only")
    q, k, v = qkv(mechanism)
    s = (silu(q) * k).sum(-1) * 8**-0.5
    assert_close(mechanism.mixed(X), softmax(s[..., None, :].expand(-1, -1, N, -1)) @ v)


def test_211_inline_has_a_map():
    mechanism = Mechanism("inline")
    q, k, v = qkv(mechanism)
    s = 8**-0.5 * q @ k.mT
    a = (s - s.mean(-1, keepdim=True)) / N + 1 / N
    assert_close(mechanism.mixed(X), a @ v)
    assert (a < 0).any()


def test_211_a_query_of_zero_takes_the_mean():
    mechanism = Mechanism("inline")
    q, _, v = qkv(mechanism)
    found = mechanism.mixed(X, q=torch.zeros_like(q))
    assert_close(found, v.mean(2, keepdim=True).expand_as(v))


def test_234_small_denominators_are_clamped():
    mechanism = Mechanism("l2vit", part="linear_").set(factor=0.5)
    q, k, v = qkv(mechanism, X / 2)
    a = relu(q) @ relu(k).mT
    assert a.sum(-1).max() < 100
    assert_close(mechanism.mixed(X / 2), 0.5 * a @ v / 100)


def test_234_large_ones_share_out_the_factor():
    mechanism = Mechanism("l2vit", part="linear_").set(factor=0.5)
    q, k, v = (50 * each.abs() for each in qkv(mechanism))
    assert_close(mechanism.mixed(X, q=q, k=k, v=v), 0.5 * shared_out(q @ k.mT) @ v)
