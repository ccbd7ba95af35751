"""Rows that see nothing: all that is made of them is 0, and no gradient is touched by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

LATE = "mask = causal and i >= 3"
NUMBERS = {
    "lse": f"{LATE}; out = (o * lse(o) + lse(o)) | merge | linear",
    "lse and entropy": f"{LATE}; out = (o * lse(o) * entropy(o)) | merge | linear",
    "rows": f"{LATE}; out = (o + lse(o) * rows(o, p) + rows(o, p / seen)) | merge | linear",
    "a least denominator": f"{LATE}; normalize = exp(s) / max(sum, 1); out = (o * lse(o)) | merge",
    "a denominator held": f"{LATE}; normalize = exp(s) / detach(sum); out = (o * lse(o)) | merge",
    "a branch": f"{LATE}; branch two {{ mask = causal and i >= 5 }}\n"
    "out = (joint(o, two) + o * lse(o) + lse(two)) | merge | linear",
}


def three(text: str, triton: bool = True) -> list[tuple[nn.Module, torch.dtype]]:
    """Return the reference, the PyTorch text and the kernels of a block, with equal weights."""
    block = find(check(parse(f"block a {{ width = 16; heads = 2; {text} }}")), "a")
    oracle = reference(block, dtype=torch.float64, seed=0)
    made = [(oracle, torch.float64)]
    for target, dtype in (("torch", torch.float64), ("triton", torch.float32))[: 1 + triton]:
        module = build_module(block, Target(target), dtype=dtype, seed=0)
        module.load_state_dict(oracle.state_dict())
        made.append((module, dtype))
    return made


def tokens() -> Tensor:
    return torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_rows_that_see_nothing(name: str) -> None:
    """The loss leaves these rows out; their gradients are zero, and no other is touched."""
    found = []
    for module, dtype in three(NUMBERS[name]):
        x = tokens().to(dtype).requires_grad_()
        y = module(x)
        assert not y[:, :3].any()
        inputs = (x, *dict(module.named_parameters()).values())
        gradients = torch.autograd.grad(y[:, 3:].square().sum(), inputs)
        again = torch.autograd.grad(module(x).square().sum(), inputs)
        found.append([y, *gradients, *again])
    for other in found[1:]:
        tolerance = 1e-10 if other[0].dtype == torch.float64 else 2e-5
        for mine, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def test_what_is_added_to_the_sum_counts_where_nothing_is_seen() -> None:
    text = f"{LATE}; param z[heads] = 0.3; normalize = exp(s) / (exp(z[h]) + sum)"
    for module, dtype in three(f"{text}; out = (o + lse(o)) | merge"):
        y = module(tokens().to(dtype))
        torch.testing.assert_close(y[:, :3], torch.full_like(y[:, :3], 0.3))


def test_an_empty_context() -> None:
    text = "source = context; context_width = 4; out = (o * lse(o) + lse(o)) | merge | linear"
    for module, dtype in three(text):
        x = tokens().to(dtype).requires_grad_()
        y = module(x, context=torch.zeros(1, 0, 4, dtype=dtype))
        assert not y.any()
        assert not torch.autograd.grad(y.sum(), x)[0].any()
