"""One exported program for all batches and lengths from one on: no size is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

import headloom as hl
from headloom.compiler.pieces.groups import top_groups, top_of_any
from headloom.compiler.pieces.maps import sum_after
from headloom.compiler.pieces.turns import side_by_side

WINDOW = "block b { width = 16; heads = 2; mask = causal and window(4) }"
TAKES = {
    "a window": WINDOW,
    "a context": "block b { width = 16; context_width = 8; heads = 2; source = context }",
    "documents": "block b { width = 16; heads = 2; mask = causal and document }",
    "a choice": (
        "block b { width = 16; heads = 2; mask = causal; select = top(3, dot(q[h, i], k[h, j])) }"
    ),
    "sums of the map": hl.zoo("cope").text,
    "keys that are carried": hl.zoo("path").text,
    "a choice in a layer": hl.zoo("deepseek_sparse").text,
}
SIZES = {"x": ("b", "n"), "context": ("b", "m"), "segments": ("b", "n")}


def given(block: Any, b: int, n: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(n)
    found = {"x": torch.randn(b, n, block.width, generator=draw)}
    if block.context_width:
        found["context"] = torch.randn(b, 6, block.context_width, generator=draw)
    return found


@pytest.mark.parametrize("text", TAKES.values(), ids=TAKES)
def test_from_one_token_and_one_row_on(text):
    arch = hl.load(text, "loom")
    (block,) = arch.blocks.values()
    module = hl.compile(arch, block.name, seed=0, backend="torch").eval()
    drawn = given(block, 3, 37)
    if "document" in text:
        drawn["segments"] = torch.arange(37).expand(3, -1) // 10
    free = {name: {at: Dim(size, min=1) for at, size in enumerate(SIZES[name])} for name in drawn}
    with torch.no_grad():
        program = torch.export.export(module, (), drawn, dynamic_shapes=free).module()
        for b, n in ((1, 1), (2, 5), (1, 130), (5, 5)):
            drawn = given(block, b, n)
            if "document" in text:
                drawn["segments"] = torch.arange(n).expand(b, -1) // 10
            torch.testing.assert_close(program(**drawn), module(**drawn), atol=1e-5, rtol=0)


def test_a_length_alone_is_free_down_to_one():
    """A mask [b, n] was asked whether b is n: the least length was above b."""
    module = hl.compile(hl.load(WINDOW, "loom"), "b", seed=0, backend="torch").eval()
    x, n = torch.randn(4, 9, 16), Dim("n", min=1)
    sizes = {"x": {1: n}, "attention_mask": {1: n}}
    with torch.no_grad():
        program = torch.export.export(
            module, (x,), {"attention_mask": torch.ones(4, 9)}, dynamic_shapes=sizes
        ).module()
        for length in (2, 4, 7):
            mask = torch.ones(4, length)
            mask[1, 0] = 0
            got = program(x[:, :length], attention_mask=mask)
            expected = module(x[:, :length], attention_mask=mask)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (5,)])
def test_a_number_of_each_token_has_these_shapes(shape):
    module = hl.compile(hl.load(WINDOW, "loom"), "b", seed=0, backend="torch").eval()
    assert module(torch.randn(3, 5, 16), attention_mask=torch.ones(shape)).shape == (3, 5, 16)


@pytest.mark.parametrize("shape", [(2, 5), (5, 3), (3, 4), (3, 5, 1), ()])
def test_and_no_others(shape):
    module = hl.compile(hl.load(WINDOW, "loom"), "b", seed=0, backend="torch").eval()
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[5\] or \[3, 5\]"):
        module(torch.randn(3, 5, 16), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("groups", [0, 1, 2, 7])
def test_the_top_of_any_number_of_groups(groups):
    draw = torch.Generator().manual_seed(groups)
    e = torch.randint(3, (2, 2, 4, groups), generator=draw).float()
    e[e == 0] = torch.inf
    e[0, 0, 0] = torch.nan
    free = torch.rand(e.shape, generator=draw) < 0.7
    for count in (1, 2, 5):
        assert torch.equal(top_of_any(e, free, count), top_groups(e, free, count))
    counts = torch.randint(0, 4, (2, 2, 4, 1), generator=draw)
    if groups:
        assert torch.equal(top_of_any(e, free, counts), top_groups(e, free, counts))


@pytest.mark.parametrize("n", [0, 1, 2, 6])
def test_sums_after_each(n):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([x[:, at + 1 :].sum(-1) for at in range(n)], -1) if n else x * 1
    torch.testing.assert_close(sum_after(x), expected)
    weigh = torch.arange(1.0, n + 1, dtype=torch.float64)
    grads = [torch.autograd.grad((y * weigh).sum(), x)[0] for y in (sum_after(x), expected)]
    torch.testing.assert_close(*grads)


def test_all_tokens_are_one_chunk():
    x = torch.randn(2, 3, 7, 4)
    assert torch.equal(side_by_side(x, 7), x[:, :, None])
