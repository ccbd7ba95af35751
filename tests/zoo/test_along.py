"""Mechanisms along the tokens: written out, with gates that are open, with nothing learned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

from .mechanisms import MHA, Mechanism, assert_close, causal, mapped, merge, softmax, split, tokens

X = tokens()
N = X.shape[1]
GAP = torch.arange(N)[:, None] - torch.arange(N)


@pytest.fixture(scope="module")
def plain() -> Mechanism:
    return Mechanism(MHA)


def by_hand(mechanism: Mechanism, s: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return what the block gives by its values and a softmax of logits written out."""
    v = mechanism.streams(X)["v"].repeat_interleave(4 // mechanism.block.value_heads, 1)
    return mapped(mechanism, "o_proj", merge(softmax(s, seen) @ v))


# ── gates that are open ──────────────────────────────────────────────────────────────────


def test_d6_who_forgets_nothing_attends(plain: Mechanism):
    open_ = {"kept_proj_weight": 0, "kept_proj_bias": 1e3}
    assert_close(Mechanism("forgetting", like=plain).set(**open_)(X), plain(X))
    window = Mechanism(MHA.replace("causal", "causal and window(6); kv_heads = 2"))
    assert_close(Mechanism("forgetting_window", like=window).set(**open_)(X), window(X))
    both = Mechanism(MHA.replace("; mask = causal", ""))
    names = {f"{way}_proj_{each}": value for way in ("back", "ahead")
             for each, value in (("weight", 0), ("bias", 1e3))}  # fmt: skip
    assert_close(Mechanism("forgetting_both_ways", like=both).set(**names)(X), both(X))


def test_d7_a_wall_without_fading_is_none(plain: Mechanism):
    open_ = {"faded_proj_weight": 0, "faded_proj_bias": 1e3}
    assert_close(Mechanism("wall", like=plain).set(**open_)(X), plain(X))


def test_d7_a_wall_that_fades_alike_is_a_factor(plain: Mechanism):
    mechanism = Mechanism("wall", like=plain).set(faded_proj_weight=0, faded_proj_bias=0)
    s = plain.logits(X) * 0.5 ** GAP.clamp(min=0)
    assert_close(mechanism(X), by_hand(plain, s))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_d6_a_gate_that_is_shut_hides_what_was_before(scale: float):
    """Sums that large lose no digit that the next token needs."""
    mechanism = Mechanism("forgetting").set(kept_proj_weight=0, kept_proj_bias=-scale)
    shut = softplus(torch.tensor(scale, dtype=torch.float64))
    s = mechanism.logits(X) - shut * GAP.clamp(min=0)
    assert_close(mechanism(X), by_hand(mechanism, s), 1e-8)


def test_d6_both_ways_sum_gates_of_their_own():
    """Each direction sums its own gates, from the token after the earlier one to the later."""
    mechanism = Mechanism("forgetting_both_ways")
    there = mechanism.streams(X)
    back, ahead = (there[name] for name in ("back", "ahead"))
    s = mechanism.logits(X)
    for i in range(N):
        for j in range(N):
            low, high = min(i, j), max(i, j)
            gates = (back if j <= i else ahead).diff(dim=1)[:, low:high].sum(1)
            s[:, :, i, j] += gates
    assert_close(mechanism(X), by_hand(mechanism, s, torch.ones(N, N, dtype=torch.bool)))


# ── recurrences ──────────────────────────────────────────────────────────────────────────


def test_d1_one_gate_for_all_channels_is_the_gated_delta_rule():
    """With decay, erasure and writing the same numbers for all channels."""
    one = Mechanism("gated_delta_2", ("fade  = x | linear(bias = true) | log_sigmoid | split",
                                      "fade  = x | linear(heads) | log_sigmoid"),
                    ("erase = x | linear | sigmoid | split", "erase = x | linear(heads) | sigmoid"),
                    ("write = x | linear | sigmoid | split", "write = erase"))  # fmt: skip
    streams = one.streams(X)
    state, found = torch.zeros(2, 4, 8, 8).double(), []
    for t in range(N):
        q, k, v = (streams[name][:, :, t] for name in "qkv")
        alpha, beta = streams["fade"][:, t].exp(), streams["erase"][:, t]
        state = alpha[..., None, None] * state
        missing = v - (k[..., None, :] @ state)[..., 0, :]
        state = state + beta[..., None, None] * k[..., :, None] * missing[..., None, :]
        found.append((q[..., None, :] @ state)[..., 0, :] * 8**-0.5)
    assert_close(one(X), mapped(one, "o_proj", merge(torch.stack(found, 2))))


def test_d2_momentum_that_forgets_at_once_is_a_delta_rule():
    """M holds the error of this token alone: a rule that reads at p and writes along k."""
    mechanism = Mechanism("momentum_delta").set(mu_proj_weight=0)
    text = ("M <- mu * M + eta", "M <- 0 * M + eta")
    still = Mechanism("momentum_delta", text, like=mechanism)
    there = still.streams(X)
    state, found = torch.zeros(2, 4, 8, 8).double(), []
    for t in range(N):
        q, k, v, p = (there[name][:, :, t] for name in ("q", "k", "v", "p_"))
        eta, alpha, beta = (there[name][:, t, :, None, None] for name in ("eta", "alpha", "beta"))
        error = v - (p[..., None, :] @ state)[..., 0, :]
        state = alpha * state + beta * eta * k[..., :, None] * error[..., None, :]
        found.append((q[..., None, :] @ state)[..., 0, :] * 8**-0.5)
    assert_close(still(X), mapped(still, "o_proj", merge(torch.stack(found, 2))))


@pytest.mark.parametrize("name", ["preconditioned_delta", "preconditioned_kda"])
def test_d3_a_base_of_one_changes_no_key(name: str):
    flat = Mechanism(name, ("base = 1.5", "base = 1"))
    bare = Mechanism(name, ("k * base ** (-r / (1 + abs(r)))", "k"), like=flat)
    assert_close(flat(X), bare(X))
    assert (Mechanism(name, like=flat)(X) - bare(X)).abs().max() > 1e-3


def test_d4_oja_is_the_delta_rule_seen_from_the_values():
    """Without decay, with keys and values exchanged, the states are each other's transposes."""
    mechanism = Mechanism("gated_oja").set(fade_proj_weight=0, fade_proj_bias=1e3)
    there = mechanism.streams(X)
    delta, found = torch.zeros(2, 4, 8, 8).double(), []
    for t in range(N):
        q, k, v = (there[name][:, :, t] for name in "qkv")
        missing = k - (v[..., None, :] @ delta)[..., 0, :]
        delta = delta + there["beta"][:, t, :, None, None] * v[..., :, None] * missing[..., None, :]
        found.append((delta @ q[..., None])[..., 0] * 8**-0.5)
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(torch.stack(found, 2))))


def test_d5_lightnet_with_equal_keys_is_a_running_mean():
    mechanism = Mechanism("lightnet").set(k_proj_weight=0)
    q, v = silu(split(mapped(mechanism, "q_proj", X))), split(mapped(mechanism, "v_proj", X))
    mean = v.cumsum(2) / torch.arange(1, N + 1)[:, None]
    mixed = q.sum(-1, keepdim=True) * 8**-0.5 * mean
    assert_close(mechanism(X), mapped(mechanism, "o_proj", merge(mixed)))


# ── maps and positions ───────────────────────────────────────────────────────────────────


def test_d13_parallax_with_a_second_query_of_nothing_attends(plain: Mechanism):
    assert_close(Mechanism("parallax", like=plain).set(r_proj_weight=0)(X), plain(X))


def test_d13_parallax_gives_equal_values_back():
    """Its weights sum to one, as those of a fit do."""
    mechanism = Mechanism("parallax")
    p = mechanism.weights(X)
    assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    assert (p < 0).any()


def test_d17_polar_positions_are_a_cosine_of_the_distance():
    mechanism = Mechanism("polar")
    many, much = (
        softplus(split(mapped(mechanism, f"{name}_proj", X))) for name in ("many", "much")
    )
    lag = mechanism.parameter("turn").clamp(-2 * math.pi, 0)
    pace = 10_000 ** -(torch.arange(8).double() / 8)
    angle = GAP[..., None] * pace - lag[:, None, None]
    s = torch.einsum("bhic,bhjc,hijc->bhij", many, much, angle.cos()) * 8**-0.5
    assert_close(mechanism(X), by_hand(mechanism, s))
    assert_close(mechanism(X, positions=torch.arange(7, 7 + N)), mechanism(X), 1e-8)


def test_d18_a_bank_of_nothing_is_none_and_reaches_so_far(plain: Mechanism):
    assert_close(Mechanism("relative_bank", like=plain).set(profiles=0)(X), plain(X))
    mechanism = Mechanism("relative_bank")
    mixed, s = mechanism.streams(X)["mixed"], mechanism.logits(X)
    for gap in range(9):
        bias = mixed @ mechanism.parameter("profiles")[gap]
        s = s + torch.where(gap == GAP, bias[..., None], 0)
    assert_close(mechanism(X), by_hand(mechanism, s))


def test_d19_nothing_is_cut_that_is_short(plain: Mechanism):
    mechanism = Mechanism(
        "length_clip", ("length = 2", "length = 1e9"), ("growth = 0.1", "growth = 0")
    )
    weights = {f"{name}_proj_weight": plain.parameter(f"{of}_proj.weight")
               for name, of in (("asks", "q"), *zip("kvo", "kvo", strict=True))}  # fmt: skip
    assert_close(mechanism.set(gain=1, **weights)(X), plain(X))
    there = Mechanism("length_clip").streams(3 * X)
    assert_close(there["asks"].norm(dim=-1).amax(), torch.tensor(2.0).double(), 1e-5)
    grown = 1 + 0.1 * ((torch.arange(N) + 1).double() / 4).clamp(min=1).log()
    assert_close(there["q"], there["asks"] * grown[:, None])


def test_d20_taps_that_choose_nothing_are_a_convolution():
    mechanism = Mechanism("chosen_convolution").set(of_k_proj_weight=0, of_v_proj_weight=0)
    short = Mechanism(
        "chosen_convolution", (" + chosen_k", ""), (" + chosen_v", ""), like=mechanism
    )
    assert_close(mechanism(X), short(X))


def test_d21_convolutions_of_nothing_leave_the_mean_and_the_token_before():
    mechanism = Mechanism("compressed_convolutional")
    x = tokens(width=48)
    mechanism.set(met_conv_1_weight=0, met_conv_1_bias=0)
    there = mechanism.streams(x)
    asked, known = (split(mapped(mechanism, f"{name}_proj", x), count)
                    for name, count in (("asked", 4), ("known", 2)))  # fmt: skip
    mean = (asked + known.repeat_interleave(2, 1)) / 2
    of_keys = mean.unflatten(1, (2, 2)).mean(2)
    for name, each in (("mean_q", mean), ("mean_k", of_keys)):
        assert_close(there[name], each)
    assert_close(there["q"].norm(dim=-1), torch.full((2, 4, N), 8**0.5, dtype=torch.float64))
    delayed = mapped(mechanism, "v_proj_1", x)
    assert_close(there["v"][:, 1, 1:], delayed[:, :-1])
    assert not there["v"][:, 1, 0].any()


def test_d22_a_value_that_was_turned_says_how_far_away_it_was():
    """What is mixed of keys alone depends on distances alone."""
    mechanism = Mechanism("counter_rotation")
    assert_close(mechanism(X, positions=torch.arange(7, 7 + N)), mechanism(X), 1e-8)
    inverse = " | rope(dims = -4, style = interleaved, inverse = true)"
    still = Mechanism("counter_rotation", (inverse, ""), like=mechanism)
    assert (still(X, positions=torch.arange(7, 7 + N)) - still(X)).abs().max() > 1e-3


def test_d6_gates_are_read_as_they_should_be():
    mechanism = Mechanism("forgetting")
    gates = logsigmoid(mapped(mechanism, "kept_proj", X)).cumsum(1).mT
    s = mechanism.logits(X) + gates[..., None] - gates[..., None, :]
    assert_close(mechanism(X), by_hand(mechanism, s, causal()))
