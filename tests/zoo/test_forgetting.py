"""Caches that forget by a score: token by token, written out, and what they are without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from .mechanisms import MHA, Mechanism, assert_close, merge, tokens

N = 17
ROPED = MHA.replace("mask", "position = rope; mask")

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
Leaves = Callable[[list[int], list[Tensor], Tensor, int], list[int]]


def decoded(mechanism: Mechanism, x: Tensor, share: int, leaves: Leaves) -> Tensor:
    """Return what an eviction policy leaves of attention: a list of places for `share` heads.

    leaves(held, weights, values, i) says which places stay after query i, of those that are held,
    from the weights [held] that each of these heads gave them and their values.
    """
    with torch.no_grad():
        streams = mechanism.meaning.layer(x, {})[1]
    q, k, v = (streams[name][0] for name in "qkv")
    heads, n, d = q.shape
    k, v = (each.repeat_interleave(heads // len(each), 0) for each in (k, v))
    o = torch.zeros_like(q)
    for first in range(0, heads, share):
        held: list[int] = []
        for i in range(n):
            held = [*held, i]
            p = [(k[h, held] @ q[h, i] / d**0.5).softmax(0) for h in range(first, first + share)]
            for h, weights in zip(range(first, first + share), p, strict=True):
                o[h, i] = weights @ v[h, held]
            held = leaves(held, p, v[first : first + share, held], i)
            assert len(held) < n // 2
    return linear(merge(o[None]), mechanism.parameter("o_proj.weight"))


def without_least(held: list[int], scores: dict[int, float], count: int, near: int) -> list[int]:
    """Drop the lowest of what is older than the last tokens, until so many of these are left."""
    held = list(held)
    while len(old := [j for j in held if j <= held[-1] - near]) > count:
        held.remove(min(reversed(old), key=lambda j: scores[j]))
    return held


def h2o() -> Leaves:
    got: dict[int, float] = {}

    def leaves(held: list[int], p: list[Tensor], _: Tensor, i: int) -> list[int]:
        if i == 0:
            got.clear()
        for at, j in enumerate(held):
            got[j] = got.get(j, 0.0) + float(p[0][at])
        return without_least(held, got, 3, 4)

    return leaves


def tova() -> Leaves:
    def leaves(held: list[int], p: list[Tensor], *_: object) -> list[int]:
        mean = torch.stack(p).mean(0)
        return held if len(held) <= 6 else [j for at, j in enumerate(held) if at != mean.argmin()]

    return leaves


def caote() -> Leaves:
    def leaves(held: list[int], p: list[Tensor], v: Tensor, _: int) -> list[int]:
        moved = dict.fromkeys(held, 0.0)
        for weights, values in zip(p, v, strict=True):
            for at, j in enumerate(held[:-1]):
                rest = weights.clone()
                rest[at] = 0
                moved[j] += float((rest / rest.sum() @ values - weights @ values).norm())
        return without_least(held, moved, 4, 2)

    return leaves


POLICIES = {"h2o": (1, h2o()), "tova": (4, tova()), "caote": (2, caote())}


@pytest.mark.parametrize("name", POLICIES)
def test_it_drops_what_its_paper_drops(name):
    mechanism, x = Mechanism(name), tokens(N, batch=1)
    assert_close(mechanism(x), decoded(mechanism, x, *POLICIES[name]))


@pytest.mark.parametrize(("name", "count"), [("h2o", 3), ("tova", 6), ("caote", 4)])
def test_a_budget_for_all_tokens_forgets_nothing(name, count):
    wide = Mechanism(name, (f"count = {count}", f"count = {N}"))
    plain = ROPED.replace("4; ", "4; kv_heads = 2; ") if name == "caote" else ROPED
    x = tokens(N)
    assert_close(wide(x), Mechanism(plain, like=wide)(x), 1e-12)
    assert (Mechanism(name)(x) - wide(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_gone_does_not_come_back(name):
    mechanism, x = Mechanism(name), tokens(N, batch=1)
    mechanism(x)
    cache = mechanism.module.init_cache(1)
    before: set[int] | None = None
    for t in range(N):
        with torch.no_grad():
            mechanism.module(x[:, t : t + 1], cache=cache)
        held = cache.kept["numbers"][0, 0, :, 0]
        assert len(held) == {"h2o": 7, "tova": 6, "caote": 6}[name]
        assert held[held > 0].tolist() == sorted(set(held.tolist()) - {0})
        now = set(held.tolist()) - {0}
        assert before is None or now <= before | {t + 1}
        before = now


def test_sinks_and_the_last_tokens_are_a_mask():
    """StreamingLLM drops by places alone (Xiao et al. 2023): 7 last ones, and a query's own."""
    masked = Mechanism("streaming_llm")
    kept = Mechanism(
        "block a { width = 32; heads = 4; mask = causal; "
        "keep = top(0, p, always = window(7) or j < 2) }",
        like=masked,
    )
    x = tokens(N)
    assert_close(kept(x), masked(x), 1e-12)
    shapes = [each.module.init_cache(1).kept["k"].shape for each in (kept, masked)]
    assert shapes == [(1, 4, 9, 8), (1, 4, 10, 8)]
