"""Tiles that wait for those before them: keys that are carried, sums so far, channels that fade."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.pieces import maps, turns
from headloom.compiler.plan.plan import Lowering

PATH = (
    "heads = 4; kv_heads = 2; let w = x | linear(kv_heads * head_dim) | split(kv_heads) | l2_norm; "
    "let b = x | linear(kv_heads) | sigmoid"
)
WALL = "heads = 4; let c = x | linear(bias = true) | log_sigmoid | split | running(sum)"


def way_of(body: str) -> Lowering:
    mask = "" if "mask = " in body else "mask = causal; "
    arch = hl.load(f"block a {{ width = 16; {mask}{body} }}", format="loom")
    (found,) = hl.explain(arch, "a", backend="torch").lowerings
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ── keys that are carried ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "carry",
    [
        "k - 2 * b * w * dot(w, k)",
        "k - w * (b * dot(k, w)) * 2",
        "-(b * outer(w, w) @ k / 3 - k)",
        "b * dot(w, k) * 0.1 + k",
        "k - w * (dot(w, k) / (1 + b))",
    ],
)
def test_one_product_is_carried_by_chunks(carry: str) -> None:
    """However it is written, tiles give what all pairs at once give, and the same gradients."""
    body = f"block a {{ width = 16; mask = causal; {PATH}; carry = {carry} }}"
    arch = hl.load(body, format="loom")
    assert way_of(f"{PATH}; carry = {carry}").path == "tiles"
    module = hl.compile(arch, "a", backend="torch", dtype=torch.float64, seed=0)
    dense = hl.compile(arch, "a", backend="torch", lowering="dense", dtype=torch.float64)
    dense.load_state_dict(module.state_dict())
    sys.modules[type(module).__module__].TILE = 1  # type: ignore[attr-defined]
    x, segments = drawn(2, 37, 16).requires_grad_(), torch.arange(37).div(14).floor().expand(2, 37)
    for given in ({}, {"segments": segments}):
        found = [each(x, **given) for each in (module, dense)]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
        slopes = [torch.autograd.grad(y.sin().sum(), [x, *each.parameters()])
                  for y, each in zip(found, (module, dense), strict=True)]  # fmt: skip
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("carry", "why"),
    [
        ("b * k - w * dot(w, k)", "`b * k` is neither the key nor `a * dot(c, k)`"),
        ("k - w * dot(w, k) - b * w * dot(w, k)", "adds several products to a key"),
        ("w * dot(w, k)", "is not `k + a * dot(c, k)`"),
    ],
)
def test_what_else_is_carried_pair_by_pair_and_said(carry: str, why: str) -> None:
    found = way_of(f"{PATH}; carry = {carry}")
    assert found.path == "dense"
    assert why in dict(found.obstacles)["tiles"]


def test_a_cache_holds_keys_as_they_are_after_all_tokens() -> None:
    """One token at a time and many leave the same keys, which no later step makes anew."""
    body = f"block a {{ width = 16; mask = causal; {PATH}; carry = k - 2 * b * w * dot(w, k) }}"
    module = hl.compile(hl.load(body, format="loom"), "a", backend="torch", dtype=torch.float64)
    x, kept = drawn(1, 9, 16), []
    for parts in ([9], [1] * 9, [4, 1, 4]):
        cache = module.init_cache(batch=1, length=9)
        with torch.no_grad():
            for part in x.split(parts, 1):
                module(part, cache=cache)
        kept.append(cache.state_dict())
    for one, other in pairwise(kept):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_reflections_lose_no_digits_over_many_chunks() -> None:
    """Two equal reflections are none: after an even number of tokens a key is what it was."""
    w = torch.nn.functional.normalize(drawn(1, 1, 1, 4), dim=-1).expand(1, 1, 600, 4).float()
    q, k = (drawn(1, 1, 600, 4, seed=seed).float() for seed in (1, 2))
    chunks = turns.carried_chunks(q, k, -2 * w, w, None, 16)
    _, _, left, passed = (each.unbind(-3) for each in chunks)
    keys = turns.keys_after([k[:, :, :0], *left], passed)[:, :, :600]
    torch.testing.assert_close(keys[:, :, 1::2], k[:, :, 1::2], rtol=1e-4, atol=1e-4)


# ── sums over the queries so far ─────────────────────────────────────────────────────────


def test_sums_of_rows_are_running_sums() -> None:
    for n in (0, 1, 31, 32, 33, 100):
        x = drawn(2, 3, n, 5)
        torch.testing.assert_close(maps.sums_of_rows(x), x.cumsum(-2))


def test_tiles_wait_for_sums() -> None:
    found = way_of("heads = 4; score = s - running_queries(relu(s))")
    assert found.path == "tiles"
    assert "a sum for each key" in found.reason
    other = way_of("heads = 4; score = s - running_queries(relu(s)) - sum_queries(s)")
    assert dict(other.obstacles)["tiles"] == "its expressions read other queries"


def test_what_is_kept_of_tiles_that_wait_grows_with_the_tokens() -> None:
    """Of every tile one number a key is kept for the backward pass, and no map."""
    kept: list[int] = []
    text = "block a { width = 16; heads = 4; mask = causal; score = s - running_queries(relu(s)) }"
    module = hl.compile(hl.load(text, format="loom"), "a", backend="torch")
    sys.modules[type(module).__module__].TILE = 1  # type: ignore[attr-defined]

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(torch.randn(1, 512, 16))
    assert max(kept) < 4 * 512 * 64


# ── channels that fade ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strength", [0.01, 3.0, 200.0])
def test_fading_that_would_overflow(strength: float) -> None:
    """Sums of a million and more: no factor is above one, whatever fades."""
    n = 600
    q, k = drawn(1, 2, n, 3), drawn(1, 1, n, 3, seed=1)
    sums = (-strength * drawn(1, 2, n, 3, seed=2).abs()).cumsum(-2)
    sums[..., n // 2 :, 0] -= 1e6  # a wall
    leaves = [x.requires_grad_() for x in (q, k, sums)]
    gap = (sums[:, :, :, None] - sums[:, :, None]).clamp(max=0)
    expected = torch.einsum("bhic,bxjc,bhijc->bhij", q, k, gap.exp()).tril()
    found = turns.fading_products(q, k, sums, sums).tril()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    upstream = drawn(1, 2, n, n, seed=3)
    slopes = [torch.autograd.grad(x, leaves, upstream) for x in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-8)
    short = turns.fading_products(q.float(), k.float(), sums.float(), sums.float())
    assert short.isfinite().all()


def test_walls_of_many_tokens_are_finite() -> None:
    """32,768 tokens whose gates are nearly shut, some of the last queries."""
    n = 32768
    q, k = (drawn(1, 1, n, 2, seed=seed).float() for seed in (0, 1))
    sums = torch.full((1, 1, n, 2), -40.0).cumsum(-2).requires_grad_()
    found = turns.fading_products(q[:, :, -64:], k, sums[:, :, -64:], sums)
    found.tril(n - 64).square().sum().backward()
    assert found.isfinite().all()
    assert sums.grad is not None
    assert sums.grad.isfinite().all()
    own = (q * k).sum(-1)[0, 0, -64:]
    torch.testing.assert_close(found[0, 0].diagonal(n - 64), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"{WALL}; similarity = sum(q * k * exp(c[h, i] - c[h, j])) + 1", "is not `sum(q * k"),
        (f"{WALL}; similarity = sum(q * k * exp(c[h, j] - c[h, i]))", "is not `sum(q * k"),
        (f"{WALL}; mask = causal and window(5); similarity = sum(q * k * exp(c[h, i] - c[h, j]))",
         "its mask reaches 4 tokens back"),
        ("heads = 4; let c = x | linear | split | running(sum); "
         "similarity = sum(q * k * exp(min(c[h, i] - c[h, j], 0)))", "`c` may rise"),
        (f"{WALL}; mask = all; similarity = sum(q * k * exp(min(c[h, i] - c[h, j], 0)))",
         "keys that are yet to come"),
    ],
)  # fmt: skip
def test_what_does_not_fade_by_channels(body: str, why: str) -> None:
    found = way_of(body)
    assert found.path == "tiles"
    assert why in dict(found.obstacles)["faded"]


def test_channels_that_fade_take_padding_and_documents() -> None:
    found = way_of(f"{WALL}; similarity = sum(exp(c[h, i] - c[h, j]) * k * q)")
    assert (found.path, found.needs) == ("faded", ("counted",))


# ── powers ───────────────────────────────────────────────────────────────────────────────


def test_powers_without_subnormal_numbers() -> None:
    x = torch.tensor([0.0, 3.0, -80.0, -88.0, -100.0, -1e30, -torch.inf, torch.nan])
    x.requires_grad_()
    made = maps.normal_exp(x)
    expected = x.detach().exp()
    expected[3:7] = 0
    torch.testing.assert_close(made, expected, equal_nan=True)
    (slope,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(slope, expected, equal_nan=True)
    wide = drawn(5).requires_grad_()
    assert torch.autograd.gradgradcheck(maps.normal_exp, wide)
    assert torch.autograd.gradgradcheck(maps.sum_after, drawn(2, 3).requires_grad_())
