"""Mechanisms that run along keys and queries: written out, and what they are without it."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize, softplus

from .mechanisms import MHA, Mechanism, assert_close, softmax, text_of, tokens

X = tokens()
N = X.shape[1]


def test_sticks_are_broken_from_the_nearest_key():
    mechanism = Mechanism("stick_breaking")
    s, p = mechanism.logits(X), mechanism.weights(X)
    for i in range(N):
        left = torch.ones_like(s[..., 0, 0])
        for j in reversed(range(i)):
            assert_close(p[..., i, j], left * s[..., i, j].sigmoid())
            left = left * (1 - s[..., i, j].sigmoid())
        assert_close(p[..., i, :].sum(-1), 1 - left)


def test_contextual_positions():
    plain = Mechanism(MHA)
    mechanism = Mechanism("cope", like=plain)
    assert_close(mechanism.set(table=0)(X), plain(X))
    # where all gates are open, a key stands as many keys back as it is
    row = torch.arange(6.0, dtype=torch.float64)[:, None].expand(6, 8)
    streams = mechanism.set(table=row).streams(X)
    ones = torch.ones_like(streams["q"])
    far = 1e3 * ones  # the gate's logit; q · row is its number times 8 e3
    found = mechanism.weights(X, q=far, k=ones)
    at = torch.arange(N)
    position = (at[:, None] - at + 1).clamp(0, 5).double()
    assert_close(found[0, 0], softmax(8e3 * position))


def test_selection_by_the_first_head():
    plain = Mechanism(MHA)
    mechanism = Mechanism("selective", like=plain)
    s = mechanism.logits(X)
    lost = torch.zeros_like(s[:, 0])
    for i in range(N):
        for j in range(1, i):
            lost[:, i, j] = sum(s[:, 0, late, j].relu() for late in range(j + 1, i))
    assert_close(mechanism.weights(X), softmax(s - lost[:, None]))
    q = mechanism.streams(X)["q"].clone()
    q[:, 0] = 0  # the first head says nothing of any key
    assert_close(mechanism.mixed(X, q=q), plain.mixed(X, q=q))


def test_what_is_read_is_taken_from_the_values():
    plain = Mechanism(MHA)
    mechanism = Mechanism("deltaformer", like=plain)
    with torch.no_grad():
        mechanism.meaning.get_parameter("w_proj.weight").copy_(plain.parameter("v_proj.weight"))
    streams = mechanism.streams(X)
    values, beta, s = streams["w"].clone(), streams["beta"].mT, mechanism.logits(X)
    for i in range(1, N):
        p = s[:, :, i, :i].softmax(-1)
        values[:, :, i] -= beta[:, :, i, None] * (p[:, :, None] @ values[:, :, :i])[:, :, 0]
    assert_close(streams["v"], values)
    assert_close(mechanism.mixed(X), softmax(s) @ values)
    nothing = text_of("deltaformer", ("linear(heads) | sigmoid", "linear(heads) | scale(0)"))
    assert_close(Mechanism(nothing, like=mechanism)(X), plain(X))


def test_keys_are_reflected_on_their_way():
    plain = Mechanism(MHA)
    mechanism = Mechanism("path", like=plain)
    streams = mechanism.streams(X)
    q, k, w, b = streams["q"], streams["k"], streams["w"], streams["b"].mT
    turn = torch.eye(8, dtype=X.dtype) - b[..., None, None] * w[..., :, None] * w[..., None, :]
    s = torch.zeros_like(mechanism.logits(X))
    for j in range(N):
        key = k[:, :, j]
        for i in range(j, N):
            key = key if i == j else (turn[:, :, i] @ key[..., None])[..., 0]
            s[:, :, i, j] = 8**-0.5 * (q[:, :, i] * key).sum(-1)
    assert_close(mechanism.weights(X), softmax(s))
    nothing = text_of("path", ("scale(2)", "scale(0)"))
    assert_close(Mechanism(nothing, like=mechanism)(X), plain(X))
    fading = Mechanism("path_forgetting", like=mechanism)
    c = fading.streams(X)["c"].mT
    assert_close(fading.weights(X), softmax(s + c[..., :, None] - c[..., None, :]))
    # a key that is reflected twice along one direction is where it was
    along = normalize(w[:, :, :1], dim=-1).expand(w.shape)
    twice = mechanism.weights(X, w=along, b=torch.full_like(streams["b"], 2))
    logits = 8**-0.5 * q @ k.mT
    even = (torch.arange(N)[:, None] - torch.arange(N)) % 2 == 0
    mirrored = 8**-0.5 * q @ (k - 2 * along * (along * k).sum(-1, keepdim=True)).mT
    assert_close(twice, softmax(torch.where(even, logits, mirrored)))


def test_mesa_reads_with_a_ridge_regression():
    mechanism = Mechanism("mesa_net")
    streams = mechanism.streams(X)
    q, k, v = (streams[name] for name in "qkv")
    gamma, beta = (streams[name].mT for name in ("gamma", "beta"))  # [b, heads, n]
    ridge = torch.diag_embed(0.25 + softplus(mechanism.parameter("ridge")))
    found = mechanism.mixed(X)
    for t in range(N):
        kept = gamma[..., : t + 1].log().flip(-1).cumsum(-1).flip(-1)
        share = beta[..., : t + 1] * torch.cat([kept[..., 1:], 0 * kept[..., :1]], -1).exp()
        keys = k[:, :, : t + 1]
        least = (keys * share[..., None]).mT @ keys + ridge
        values = (keys * share[..., None]).mT @ v[:, :, : t + 1]
        expected = torch.linalg.solve(least, q[:, :, t, :, None]).mT @ values
        assert_close(found[:, :, t], expected[:, :, 0])


def test_steps_of_conjugate_gradients_end_at_the_ridge_regression():
    """In as many steps as there are features they are done, and fewer come close."""
    for heads, bar in ((16, 1e-9), (4, 0.02)):
        exact = Mechanism("mesa_net", ("heads = 4", f"heads = {heads}"))
        steps = Mechanism("mesa_net_steps", ("heads = 4", f"heads = {heads}"), like=exact)
        assert_close(steps.mixed(X), exact.mixed(X), bar)
    assert (steps.mixed(X) - exact.mixed(X)).abs().max() > 1e-6


def test_gates_of_pairs():
    half = Mechanism("forget_pairs").set(a_proj_weight=0)
    slope = f"score = s - {math.log(2)!r} * abs(i - j)"
    alibi = Mechanism(MHA.replace("mask = causal", f"mask = causal; {slope}"), like=half)
    assert_close(half(X), alibi(X))


def test_a_ring_that_does_not_turn():
    """With a clock that stands, every token writes to the same places: plain fading sums."""
    mechanism = Mechanism("cyclic_flow")
    streams = mechanism.streams(X)
    still = torch.zeros_like(streams["time"])
    zero = mechanism.set(readout=0).mixed(X, time=still)
    gamma, beta = (streams[name].mT for name in ("gamma", "beta"))
    state, mixed = torch.zeros_like(streams["v"][:, :, 0]), []
    for t in range(N):
        state = gamma[..., t, None] * state + beta[..., t, None] * streams["v"][:, :, t]
        mixed.append(state)
    assert not zero.any()  # a readout of nothing reads nothing
    equal = mechanism.set(readout=torch.eye(5)).mixed(X, q=0 * streams["q"], time=still)
    assert_close(equal, torch.stack(mixed, 2) / 5)  # each slot has a fifth of the softmax
