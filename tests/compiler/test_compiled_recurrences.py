"""Recurrences under torch.compile and torch.export: one graph for every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from headloom.compiler.lowerings import choose
from headloom.compiler.pieces.stages import elu

from .battery import block, compiled, inputs
from .test_chunkwise import BOTH_WAYS, MIXERS, close, source
from .test_compile import gradients


def scan(step: Callable[..., Any], state: Any, streams: Any) -> tuple[Any, Any]:
    """What `torch._higher_order_ops.scan` means."""
    made = []
    for token in zip(*(each.unbind(0) for each in streams), strict=True):
        state, one = step(state, list(token))
        made.append(one)
    if isinstance(made[0], Tensor):
        return state, torch.stack(made)
    return state, tuple(torch.stack(each) for each in zip(*made, strict=True))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Return what runs a function as a compiler would trace it."""

    def traced(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            patch.setattr(torch._higher_order_ops, "scan", scan)
            return function()

    return traced


def same(module: nn.Module, given: dict[str, Tensor], traced: Any, **more: Tensor) -> None:
    mine = gradients(module, given, **more)
    theirs = traced(lambda: gradients(module, given, **more))
    close(theirs, mine, 1e-12)


LEVELS = ["levels", "levels_of_vectors", "levels_alike"]


@pytest.mark.parametrize("name", [*MIXERS, *LEVELS])
def test_what_a_compiler_gets_of_chunks_is_the_same(name, asked):
    what = block(source(name) if name in MIXERS else name)
    module = compiled(what)
    for n in (2, 64, 130):
        same(module, inputs(what, n, batch=1), asked)


def test_what_a_compiler_gets_of_levels_leaves_the_same_behind(asked):
    what = block("levels")
    module, x = compiled(what), inputs(what, 101)["x"]

    def decoded() -> Tensor:
        cache = module.init_cache(2, 101)
        parts = [slice(0, 98), slice(98, 99), slice(99, 100), slice(100, 101)]
        return torch.cat([module(x[:, at], cache=cache) for at in parts], 1)

    torch.testing.assert_close(asked(decoded), decoded(), rtol=1e-12, atol=1e-12)


def test_what_a_compiler_gets_of_levels_and_sequences_is_the_same(asked):
    what = block("levels")
    module, given = compiled(what), inputs(what, 11)
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 5 + [7] * 3 + [1] * 3])
    same(module, given, asked, segments=segments)
    live = torch.ones(2, 11, dtype=torch.bool)
    live[0, :3] = live[1, 5] = live[1, 9:] = False

    def decoded() -> Tensor:
        cache = module.init_cache(2, 22)
        first = module(given["x"], cache=cache, attention_mask=live)
        return torch.cat([first, module(given["x"], cache=cache)], 1)

    torch.testing.assert_close(asked(decoded), decoded(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*MIXERS, *BOTH_WAYS, "levels", "levels_of_vectors"])
def test_what_a_compiler_gets_of_tokens_is_the_same(name, asked, monkeypatch):
    monkeypatch.setattr(choose, "of_node", lambda *_: "this is the other text")
    if name in BOTH_WAYS:
        monkeypatch.setitem(MIXERS, name, BOTH_WAYS[name])
    mask = "all" if name in BOTH_WAYS else "causal"
    what = block(source(name, mask) if name in MIXERS else name)
    module, given = compiled(what), inputs(what, 11)
    same(module, given, asked)
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 5 + [7] * 3 + [1] * 3])
    same(module, given, asked, segments=segments)


@pytest.mark.parametrize(
    "name",
    [
        "adds",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("delta", "before", "turned")),
    ],
)
def test_a_recurrence_is_compiled_once_for_all_lengths(name):
    module, count = compiled(block(source(name))), 0

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    whole = torch.compile(module, backend=counting, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for n in (100, 3, 130):
            x = torch.randn(2, n, 16, dtype=torch.float64)
            torch.testing.assert_close(whole(x), module(x), rtol=1e-12, atol=1e-12)
    assert count == 1


BENT = (
    "mix m { state S[head_dim, value_dim] = 0; S <- tanh(S) + outer(k, v); o <- q @ S }\n"
    "block b { heads = 4; mix = m; mask = causal }"
)


@pytest.mark.parametrize("text", [
    source("gated_delta"), BENT,
    *(pytest.param(each, marks=pytest.mark.slow)
      for each in [*map(source, ("adds", "rows", "in_turn", "before_two_writes")), "levels"]),
])  # fmt: skip
def test_a_recurrence_is_exported_for_all_lengths_and_batches(text):
    module = compiled(block(text))
    free = {"x": {0: Dim("b", min=1, max=64), 1: Dim("n", min=2, max=512)}}
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    program = torch.export.export(module, (x,), dynamic_shapes=free).module()
    for b, n in ((1, 2), (3, 100), (2, 64)):
        x = torch.randn(b, n, 16, dtype=torch.float64)
        torch.testing.assert_close(program(x), module(x), rtol=1e-12, atol=1e-12)


DECAYS = {
    "softplus": "let a = x | linear(heads) | softplus; ",
    "elu": "let a = x | linear(heads) | elu; ",
}


@pytest.mark.parametrize("stage", DECAYS)
def test_a_decay_of_numbers_is_trained_under_a_compiler(stage):
    """The gradient of a number a head comes turned around; compilers must know so."""
    text = (
        f"mix m {{ {DECAYS[stage]}state z[value_dim] = 0; z <- exp(-a * a) * z + v; o <- z }}\n"
        "block b { heads = 4; mix = m; mask = causal }"
    )
    module = compiled(block(text))
    x, weights = inputs(block(text), 7)["x"], [*module.parameters()]
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(module(x).sin().sum(), weights)
    for one, two in zip(torch.autograd.grad(whole(x).sin().sum(), weights), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_elu_is_the_same_for_a_compiler(asked):
    x = torch.tensor([-30.0, -1, -0.0, 0, 1e-9, 2], dtype=torch.float64, requires_grad=True)
    for each in (elu(x), asked(lambda: elu(x))):
        torch.testing.assert_close(each, nn.functional.elu(x), rtol=1e-12, atol=1e-15)
        (grad,) = torch.autograd.grad(each.sum(), x)
        (expected,) = torch.autograd.grad(nn.functional.elu(x).sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
