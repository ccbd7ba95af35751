"""Which lowering carries an attention, and what each says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.graph.operations import Attend
from headloom.compiler.lowerings.choose import WAYS
from headloom.compiler.pieces import tiles
from headloom.compiler.pieces.tiles import over_tiles, ranges_of, united
from headloom.compiler.pipeline import generate, lower
from headloom.compiler.plan.attention import Attention
from headloom.compiler.plan.kernel_form import kernel_form
from headloom.compiler.plan.plan import Target

from .battery import block

CASES = {  # settings: (path, needs, what tiles are given)
    "mask = causal": ("sdpa", ("plain",), {"line", "apart", "ahead=0"}),
    "mask = all": ("sdpa", ("plain", "run"), {"apart"}),
    "mask = causal and window(4)": ("tiles", None, {"line", "apart", "back=3", "ahead=0"}),
    "mask = causal; score = softcap(5)": ("tiles", None, {"line", "apart", "ahead=0"}),
    "mask = causal; position = alibi": ("tiles", None, {"line", "apart", "ahead=0"}),
    "mask = causal; normalize = sigmoid": ("tiles", None, {"apart", "ahead=0"}),
    "mask = causal; normalize = sink": ("tiles", None, {"line", "ahead=0"}),
    "mask = causal and (window(4) or sink(2))": (
        "tiles", None, {"apart", "back=3", "ahead=0", "prefix=2"}),
    "mask = i // 4 == j // 4": ("tiles", None, {"apart", "back=3", "ahead=3", "visible="}),
    "let t = x | linear(1); mask = causal and t[j, 0] > 0": (
        "tiles", None, {"ahead=0", "visible="}),
    "mask = causal; dropout = 0.1; score = softcap(5)": ("dense", None, {"whole=True"}),
    "score = s + max_queries(s)": ("dense", None, {"whole=True"}),
}  # fmt: skip


def test_the_form_for_kernels_is_worked_out_once(monkeypatch):
    made = []

    def counted(*given):
        made.append(given)
        return kernel_form(*given)

    monkeypatch.setattr("headloom.compiler.plan.attention.kernel_form", counted)
    for backend, times in (("triton", 1), ("torch", 0)):
        made.clear()
        generate(block("block b { heads = 2; mask = causal; score = softcap(5) }"), Target(backend))
        assert len(made) == times


@pytest.mark.parametrize("settings", CASES)
def test_the_fastest_that_fits_is_taken(settings):
    path, needs, given = CASES[settings]
    plan = lower(block(f"block b {{ heads = 2; {settings} }}"), Target("torch"))
    (lowering,) = plan.lowerings.values()
    assert (lowering.path, lowering.needs) == (path, needs)
    assert (lowering.beside is None) == (not needs)
    assert [name for name, _ in lowering.obstacles] == [
        way.name for way in WAYS[: [way.name for way in WAYS].index(path)]
    ]
    text = hl.emit(
        hl.load(f"block a {{ width = 16; heads = 2; {settings} }}", format="loom"),
        "a",
        backend="torch",
    )
    call = text[text.index("return over_tiles(") :]
    call = call[: call.index("\n\n")]
    for word in (
        "line",
        "apart",
        "back=3",
        "ahead=0",
        "prefix=2",
        "whole=True",
        "ahead=3",
        "visible=",
    ):
        assert (word in call) == (word in given), (word, call)


def test_a_lowering_that_does_not_fit_says_why():
    arch = hl.load("block a { width = 16; heads = 2; normalize = sigmoid }", format="loom")
    with pytest.raises(ValueError, match="`o` does not take `sdpa`: it normalises by softmax only"):
        hl.compile(arch, "a", backend="torch", lowering="sdpa")
    every = "a lowering is one of triton, gathered, sdpa, keyed, faded, tiles, dense"
    with pytest.raises(ValueError, match=every):
        hl.compile(arch, "a", backend="torch", lowering="quick")


@pytest.mark.parametrize("lowering", ["sdpa", "dense", "tiles"])
def test_lowerings_agree(lowering):
    arch = hl.load(
        "block a { width = 16; heads = 4; kv_heads = 2; mask = causal and window(3) }",
        format="loom",
    )
    ours, other = (
        hl.compile(arch, "a", backend="torch", dtype=torch.float64, seed=0, lowering=each)
        for each in (None, lowering)
    )
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for given in ({}, {"segments": torch.tensor([[0] * 4 + [1] * 5] * 2)}):
        torch.testing.assert_close(ours(x, **given), other(x, **given), rtol=1e-12, atol=1e-12)


FACTS = {  # settings: (apart, tame, leaves_out, by_rows)
    "score = softcap(5)": (True, True, True, True),
    "score = alibi": (True, True, True, True),
    "param z[heads] = 1; score = s * z[h]": (False, True, True, True),
    "score = s + log(1 + abs(i - j))": (True, False, True, True),
    "score = s - max_keys(s)": (True, False, True, True),
    "score = s + j / m": (True, False, False, True),
    "score = s + sum_queries(s)": (True, False, True, False),
}


@pytest.mark.parametrize("settings", FACTS)
def test_facts(settings):
    graph = lower(
        block(f"block b {{ heads = 2; mask = causal; {settings} }}"), Target("torch")
    ).graph
    facts = Attention(graph, next(graph.of(Attend)))
    assert (facts.apart, facts.tame, facts.leaves_out, facts.by_rows) == FACTS[settings]


def test_ranges_of_keys():
    q = torch.empty(1, 1, 600, 1)
    assert [keys for *_, keys in ranges_of(q, 600, 0, 99, 0, 4, None, 256)] == [
        (slice(0, 256),),
        (slice(0, 4), slice(157, 512)),
        (slice(0, 4), slice(413, 600)),
    ]
    own = torch.tensor([0] * 300 + [1] * 300)[None, None, :, None]
    assert [keys for *_, keys in ranges_of(q, 600, 0, 99, 0, 4, own, 256)] == [
        (slice(0, 256),),
        (slice(0, 512),),  # of both sequences
        (slice(300, 304), slice(413, 600)),
    ]
    assert ranges_of(q, 700, None, 99, 0, 4, None, 600)[0][-1] == (slice(0, 700),)
    assert united(0, 0, 3, 2) == (slice(3, 3),)


def test_keys_that_nobody_sees_are_left_out():
    q = torch.empty(1, 1, 256, 1)
    standing = tiles.Standing(1, 1, 1, False)
    given = (torch.arange(256)[:, None], q, torch.arange(256)[None])

    def visible(i: Tensor, _: Tensor, j: Tensor) -> Tensor:
        return (j >= 250) & (i < 100) | (j < 3)

    row = (slice(0, 1), 0, 128, (slice(0, 256),))
    assert tiles.seen_ranges(visible, row, standing, given)[-1] == (slice(0, 64), slice(192, 256))
    row = (slice(0, 1), 128, 256, (slice(10, 200),))
    assert tiles.seen_ranges(visible, row, standing, given)[-1] == (slice(0, 1),)  # a key at least


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True])
def test_products_made_before_the_weights_have_their_gradients(monkeypatch, apart, dtype, reads):
    monkeypatch.setattr(tiles, "TILE", 1)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=draw, dtype=torch.float64).to(dtype)
               .requires_grad_() for h, n in ((4, 40), (2, 33), (2, 33)))  # fmt: skip

    def weigh(s: Tensor, q: Tensor, k: Tensor) -> Tensor:
        more = q.sum(-1, keepdim=True) * k.repeat_interleave(2, 1).sum(-1)[..., None, :]
        return (s + 0.1 * more if reads else s).softmax(-1)

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        found = over_tiles(weigh, given[2], given[:1], given[1:2], scale=0.3, reads=reads,
                           apart=apart and not reads)  # fmt: skip
        return found.detach(), *torch.autograd.grad(found.square().sum(), given)

    def dense(*given: Tensor) -> tuple[Tensor, ...]:
        q, k, v = given
        s = 0.3 * q @ k.repeat_interleave(2, 1).mT
        found = weigh(s, q, k) @ v.repeat_interleave(2, 1)
        return found.detach(), *torch.autograd.grad(found.square().sum(), given)

    exact = dtype == torch.float64
    expected = dense(*(each.detach().double().requires_grad_() for each in (q, k, v)))
    for got, wanted in zip(results(q, k, v), expected, strict=True):
        near = 1e-10 if exact else 0.05 * wanted.abs().max().item()
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=near)


def test_a_tile_holds_no_more_pairs_than_it_may(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 2**12)
    most = []

    def weigh(q: Tensor, k: Tensor) -> Tensor:
        most.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return (q @ k.mT).softmax(-1)

    q, k = (torch.randn(3, 4, n, 8) for n in (300, 200))
    for apart in (False, True):
        most.clear()
        found = over_tiles(weigh, k, (q,), (k,), apart=apart)
        torch.testing.assert_close(found, (q @ k.mT).softmax(-1) @ k)
        assert max(most) <= max(2**12, 4 * 16 * 200)
        assert sum(most) == 3 * 4 * 300 * 200
