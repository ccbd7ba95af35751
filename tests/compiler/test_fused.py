"""Tiles compiled by `torch.compile`: once for all sizes, and what is said where they cannot be."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.pieces import fused, tiles
from headloom.compiler.pieces.tiles import in_steps, over_tiles, two_keys

CAPPED = "block a { width = 16; heads = 4; kv_heads = 2; mask = causal; score = softcap(5) }"


@pytest.fixture
def counted(monkeypatch):
    """Count what is compiled, with a compiler that changes nothing; tiles of sixteen queries."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiler(f, backend=backend, **given))
    monkeypatch.setattr(fused, "COMPILED_TILES", {})
    monkeypatch.setattr(tiles, "TILE", 1)
    return graphs


@pytest.mark.parametrize("biased", [False, True])
def test_tiles_are_compiled_once_for_all_sizes(counted, biased):
    slope = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)

    def weigh(s: Tensor, _q: Tensor, _k: Tensor, slope: Tensor, bias: Tensor | None) -> Tensor:
        more = -slope[:, None, None] if bias is None else bias
        return (5 * torch.tanh(s / 5) + more).softmax(-1)

    def line(_: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = -(slope[:, None, None] * (i - j).abs())
        return far.masked_fill(i < j, -torch.inf)

    for b, n, m in [(1, 40, 40), (2, 33, 33), (1, 97, 97), (3, 49, 49), (1, 18, 18)]:
        q, k = (torch.randn(b, 4, each, 8, dtype=torch.float64, requires_grad=True)
                for each in (n, m))  # fmt: skip
        results = []
        for compiled in (None, fused.compiled_tile):
            found = over_tiles(
                weigh, k, (q,), (k,), (), (slope,), scale=0.3, apart=biased, compiled=compiled,
                line=line if biased else lambda *_: None, start=0 if biased else None, ahead=0,
            )  # fmt: skip
            grads = torch.autograd.grad(found.square().sum(), (q, k, slope))
            results.append((found.detach(), *grads))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert len(counted) == 2  # the weights, and their derivative


def test_blocks_of_one_class_share_what_is_compiled(counted, monkeypatch):
    arch = hl.load(CAPPED, format="loom")
    modules = [hl.compile(arch, optimize="max", backend="torch", seed=each) for each in (0, 1)]
    emitted = sys.modules[type(modules[0]).__module__]
    monkeypatch.setattr(emitted, "TILE", 1)
    emitted.COMPILED_TILES.clear()
    for module in [*modules, copy.deepcopy(modules[0])]:
        for n in (20, 33):
            x = torch.randn(2, n, 16)
            module(x).sum().backward()
            with torch.no_grad():
                module(x)
    assert len(counted) == 2
    plain = hl.compile(arch, backend="torch", seed=0)
    plain.load_state_dict(modules[0].state_dict())
    torch.testing.assert_close(modules[0](x), plain(x))
    again = pickle.loads(pickle.dumps(modules[0].state_dict()))
    modules[1].load_state_dict(again)
    torch.testing.assert_close(modules[1](x), plain(x))


def test_inside_other_graphs_nothing_is_compiled_by_itself(counted):
    arch = hl.load(CAPPED, format="loom")
    module = hl.compile(arch, optimize="max", backend="torch", seed=0).eval()
    x = torch.randn(1, 9, 16)
    outer = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(outer(x), module(x))
    assert len(counted) == 1
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


def test_a_compiler_that_fails_is_an_error_with_the_fix(monkeypatch):
    def backend(*_):
        raise OSError("no g++ here")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiler(f, backend=backend, **given))
    called = fused.compiled_alike(lambda x: x + 1)
    with pytest.raises(RuntimeError, match=r"could not be compiled.*no g\+\+ here.*install"):
        called(torch.ones(2))


def test_the_plan_says_what_is_compiled_and_what_is_not():
    arch = hl.load(
        f"""{CAPPED}
        block plain {{ width = 16; heads = 2; mask = causal; position = alibi }}
        block drawn {{ width = 16; heads = 2; normalize = sigmoid; dropout = 0.1 }}
        """,
        format="loom",
    )
    (capped,), (plain,), (drawn,) = (
        hl.explain(arch, name, backend="torch", optimize="max").lowerings
        for name in ("a", "plain", "drawn")
    )
    assert capped.reason.endswith("each compiled by torch.compile")
    assert dict(plain.obstacles)["compiled tiles"] == "a softmax of products is one pass already"
    assert "compiled" not in drawn.reason
    texts = [hl.emit(arch, name, backend="torch", optimize="max") for name in ("a", "plain")]
    assert ["compiled_tile" in text for text in texts] == [True, False]
    assert "compiled_tile" not in hl.emit(arch, "a", backend="torch")
    with pytest.raises(ValueError, match="optimize is one of default, max, not 'most'"):
        hl.compile(arch, "a", optimize="most")


def test_steps_are_of_two_at_least():
    assert in_steps(0, 9, 4) == [(0, 4), (4, 9)]
    assert in_steps(3, 4, 4) == [(3, 4)]
    assert in_steps(0, 6, 4) == [(0, 4), (4, 6)]
    assert two_keys((slice(4, 5),), 5) == (slice(3, 5),)
    assert two_keys((slice(2, 2),), 5) == (slice(2, 4),)
    assert two_keys((slice(0, 3),), 5) == (slice(0, 3),)
    assert two_keys((slice(0, 1),), 1) == (slice(0, 1),)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "settings",
    [
        "mask = causal; score = softcap(5); position = alibi; kv_heads = 1",
        "mask = causal and (window(4) or sink(2)); normalize = sigmoid",
        "similarity = -sum(abs(q - k)); mask = causal and window(7); normalize = relu",
    ],
)
def test_compiled_tiles_are_verified(settings):
    arch = hl.load(f"block a {{ width = 16; heads = 2; {settings} }}", format="loom")
    assert hl.verify(arch, optimize="max", strict=True).ok


@pytest.mark.sweep
def test_a_compiled_threshold_is_that_of_plain_tiles(monkeypatch):
    arch = hl.load(
        "block a { width = 16; heads = 2; mask = causal; normalize = entmax(1.5) }", format="loom"
    )
    found = []
    for optimize in ("default", "max"):
        module = hl.compile(arch, optimize=optimize, backend="torch", seed=0)
        monkeypatch.setattr(sys.modules[type(module).__module__], "TILE", 1)
        x = torch.randn(2, 37, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
