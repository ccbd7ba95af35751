"""`keep`: against a loop over the tokens written by hand, its edges, its cache, what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler.checking.check import check
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

H2O = (
    "block a { width = 16; heads = 4; kv_heads = 2; mask = causal; "
    "keep = top(2, running_queries(p), always = window(2)) }"
)


def both(text: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """Return the compiled module and the meaning of block `a`, with equal weights."""
    arch = hl.load(text, format="loom")
    module = hl.compile(arch, "a", backend="torch", dtype=torch.float64, seed=1, **options)
    oracle = hl.reference(arch, "a", dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    return module, oracle


def drawn(n: int, b: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(b, n, 16, generator=generator, dtype=torch.float64)


def by_hand(module: nn.Module, x: Tensor, count: int, near: int, decay: float = 1.0) -> Tensor:
    """Heavy hitters and the last tokens, of two key heads that two query heads share each."""
    b, n, _ = x.shape
    q = module.q_proj(x).view(b, n, 2, 2, 4)
    k, v = (proj(x).view(b, n, 2, 4) for proj in (module.k_proj, module.v_proj))
    o = torch.zeros(b, n, 2, 2, 4, dtype=x.dtype)
    for row in range(b):
        for g in range(2):
            held, got = [], [0.0] * n
            for i in range(n):
                held = [*held, i]
                p = (q[row, i, g] @ k[row, held, g].mT / 2).softmax(-1)
                o[row, i, g] = p @ v[row, held, g]
                got = [each * decay for each in got]
                for at, j in enumerate(held):
                    got[j] += p[:, at].sum().item()
                old = sorted((j for j in held if i - j >= near), key=lambda j: -got[j])[:count]
                held = sorted(old) + [j for j in held if i - j < near]
    return module.o_proj(o.flatten(2))


@pytest.mark.parametrize(
    ("score", "decay"),
    [("running_queries(p)", 1.0), ("running_queries(p * 1.25 ** i)", 0.8)],
)
def test_it_means_what_a_loop_over_the_tokens_does(score, decay):
    module, oracle = both(H2O.replace("running_queries(p)", score))
    x = drawn(13)
    expected = by_hand(module, x, 2, 2, decay)
    torch.testing.assert_close(oracle(x), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-11)


def test_of_equal_scores_the_first_is_better():
    module, _ = both(H2O.replace("running_queries(p)", "0 * p"))
    masked, _ = both(H2O.replace("keep = top(2, running_queries(p), always = window(2))",
                                 "score = s + where(j < 2 or i - j < 3, 0, -1e9)"))  # fmt: skip
    masked.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(drawn(9)), masked(drawn(9)), rtol=1e-9, atol=1e-11)


def test_with_room_for_all_tokens_it_is_the_block_without_it_bit_for_bit():
    wide = H2O.replace("top(2", "top(64")
    plain = wide.partition("; keep")[0] + " }"
    found = []
    for text in (wide, plain):
        for module in both(text, lowering="dense"):
            x = drawn(9).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            found.append([y, x.grad, *(each.grad for each in module.parameters())])
    (one, meant), (other, plainly) = found[:2], found[2:]
    assert all(map(torch.equal, one, other))
    assert all(map(torch.equal, meant, plainly))


def gradients(module: nn.Module, x: Tensor, **given: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x, **given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("per", ["kv_head", "layer"])
def test_gradients_tile_by_tile_are_those_of_the_meaning(per, monkeypatch):
    module, oracle = both(H2O.replace("always", f"per = {per}, always"))
    monkeypatch.setattr(sys.modules[type(module).__module__], "TILE", 1)
    x = drawn(21)
    segments = torch.tensor([[0] * 21, [0] * 6 + [1] * 15])
    for given in ({}, {"segments": segments}):
        for got, expected in zip(*(gradients(each, x, **given) for each in (module, oracle)),
                                 strict=True):  # fmt: skip
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_the_cache_is_that_of_the_budget():
    module, _ = both(H2O)
    x = drawn(40)
    cache = module.init_cache(2)
    room = {name: each.shape for name, each in cache.kept.items()}
    assert room["k"] == (2, 2, 4, 4)
    with torch.no_grad():
        parts = [module(x[:, :3], cache=cache), module(x[:, 3:30], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(30, 40)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=1e-9, atol=1e-11)
    assert {name: each.shape for name, each in cache.kept.items()} == room
    report = hl.explain(hl.load(H2O, format="loom"), "a")
    single = hl.compile(hl.load(H2O, format="loom"), "a", seed=0).init_cache(1)
    assert report.cache_bytes(tokens=4) == report.cache_bytes(tokens=100_000) == single.nbytes
    assert report.flops(tokens=2000) < 2.01 * report.flops(tokens=1000)
    assert "token by token" in report.lowerings[0].reason
    assert "4 keys" in report.lowerings[0].reason


def test_what_always_stays_without_an_end_makes_the_cache_grow():
    text = H2O.replace("window(2)", "j % 4 == 0")
    module, oracle = both(text)
    x, cache = drawn(20), module.init_cache(2)
    with torch.no_grad():
        parts = [module(x[:, t : t + 4], cache=cache) for t in range(0, 20, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), oracle(x), rtol=1e-9, atol=1e-11)
    assert cache.kept["k"].shape[-2] == 5 + 2
    report = hl.explain(hl.load(text, format="loom"), "a")
    assert "as many keys as it always keeps" in report.lowerings[0].reason
    assert report.cache_bytes(tokens=64) == 2 * report.cache_bytes(tokens=32)
    small = module.init_cache(2, 8)
    with torch.no_grad(), pytest.raises(ValueError, match="the cache holds 8 tokens"):
        module(x, cache=small)


def test_rows_go_their_own_ways():
    module, _ = both(H2O)
    x = drawn(16, b=3)
    live = torch.ones(3, 9, dtype=torch.bool)
    live[1, :4] = False
    live[2, 3:6] = False
    cache = module.init_cache(3)

    def alone(row: int, tokens: Tensor) -> Tensor:
        return module(tokens[row][None])[0]

    with torch.no_grad():
        module(x[:, :9], cache=cache, attention_mask=live)
        expected = [alone(row, torch.cat([x[row, :9][live[row]], x[row, 9:]])[None].expand(
            3, -1, -1))[-7:] for row in range(3)]  # fmt: skip
        stored, mark = {k: v.clone() for k, v in cache.state_dict().items()}, cache.mark()
        step = torch.ones(3, 1, dtype=torch.bool)
        step[0] = False  # the first row waits
        module(x[:, 9:10], cache=cache, attention_mask=step)
        module(x[:, 10:12], cache=cache, attention_mask=step.expand(3, 2))
        cache.crop(torch.tensor([9, 6, 7]))
        y = module(x[:, 10:11], cache=cache, attention_mask=step)
        torch.testing.assert_close(y[1:, 0], torch.stack(expected)[1:, 1])
        cache.restore(mark)
        cache.reorder(torch.tensor([2, 0]))
        y = module(x[[2, 0], 9:], cache=cache)
        torch.testing.assert_close(y, torch.stack([expected[2], expected[0]]))
        other = module.init_cache(3)
        other.load_state_dict(stored)
        other.reset([0])
        y = module(x[:, 9:], cache=other)
        torch.testing.assert_close(y[1:], torch.stack(expected[1:]))
        torch.testing.assert_close(y[0], module(x[:1, 9:])[0])


def test_a_cache_notes_where_its_tokens_stand():
    module, oracle = both(H2O.replace("window(2)", "window(4)"))
    x, cache = drawn(12), module.init_cache(2)
    positions = 2 * torch.arange(12) + torch.tensor([[0], [3]])
    with torch.no_grad():
        parts = [
            module(x[:, a:b], positions=positions[:, a:b], cache=cache)
            for a, b in ((0, 5), (5, 6), (6, 12))
        ]
    expected = oracle(x, positions=positions)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("top(2", "above(2"), "does not say what is kept"),
        (("mask = causal", "mask = all"), "none after them"),
        (("mask = causal", "mask = j < i"), "their own keys"),
        (("mask = causal", "mask = causal; select = top(3, s)"), "`select` is set too"),
        (("mask = causal", "mask = causal; score = s - running_queries(s)"), "running_queries"),
        (("mask = causal", "mask = causal; let t = x | linear(4); score = s + t[j - 1, h]"),
         "other tokens"),
        (("mask = causal", "mask = causal; let t = x | linear(1); score = s + t[j, 0]"),
         "`t` has no heads"),
        (("mask = causal", "mask = causal and document"), "`doc` has no heads"),
        (("running_queries(p)", "sum_queries(p)"), "sum_queries"),
        (("running_queries(p)", "p / m"), "counts all tokens"),
        (("mask = causal", "mask = causal; source = context; context_width = 8"), "n × m tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_an_error(change, why):
    with pytest.raises(LoomError) as raised:
        check(parse(H2O.replace(*change)))
    (found,) = raised.value.diagnostics
    assert found.code == "L245"
    assert why in f"{found.message} {found.label}"
    assert found.help


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (H2O.replace("top(2", "top(1.5"), "L203"),
        (H2O.replace("always", "per = head, always"), "L222"),
        (f"{H2O}\nblock b {{ width = 16; heads = 4; kv_heads = 2; mask = causal; "
         "weights = previous.p }\nmodel m { vocab = 8; width = 16; layers = [a, b] }", "L225"),
        ("block a { width = 16; heads = 4; mask = causal; branch one { keep = top(2, p) }\n"
         "branch two { select = top(2, one.p[h, i, j]) }; out = one + two | merge | linear }",
         "L214"),
    ],
)  # fmt: skip
def test_what_it_leaves_no_one_else_reads(text, code):
    with pytest.raises(LoomError) as raised:
        check(parse(text))
    assert code in {each.code for each in raised.value.diagnostics}


def test_kernels_do_not_take_it():
    plan = hl.explain(hl.load(H2O, format="loom"), "a", backend="triton").lowerings[0]
    assert plan.path == "tiles"
    assert dict(plan.obstacles)["triton"].startswith("each query forgets keys")


def test_what_forgets_stands_between_two_that_hold_everything():
    """The second of them took the keys that were left for its own."""
    module, oracle = both(
        "block a { width = 16; heads = 4; mask = causal; branch one {}"
        "; branch two { keep = top(1, running_queries(p), always = window(2)) }"
        "; let both = one + two; branch three { score = s + both[h, i, 0] }"
        "; out = three | merge | linear }"
    )
    x, cache = drawn(9), module.init_cache(2)
    steps = torch.cat([module(x[:, t : t + 1], cache=cache) for t in range(9)], 1)
    torch.testing.assert_close(steps, oracle(x))
