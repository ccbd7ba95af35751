"""A second derivative is right, or it is an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.pieces import over_queries
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

KINDS = {  # each has kernels of its own
    "attention": "mask = causal; score = softcap(5)",
    "recurrence in chunks": "mask = causal; mix = gated_delta",
    "recurrence by token": "mask = causal; mix = bent",
}
BENT = """mix bent {
  state S[head_dim, value_dim] = 0
  S <- tanh(S) + outer(k, v)
  o <- q @ S
}
"""


def made(text: str, target: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    block = find(check(parse(f"{BENT}block a {{ width = 4; heads = 2; {text} }}")), "a")
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return build_module(block, Target(target), dtype=dtype, seed=0), x.requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_has_second_derivatives(kind: str) -> None:
    module, x = made(KINDS[kind], "torch", torch.float64)
    assert gradgradcheck(module, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_say_that_they_have_none(kind: str) -> None:
    module, x = made(KINDS[kind], "triton", torch.float32)
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend=\"torch\""):
        first.square().sum().backward()


def test_scaled_dot_product_attention_has_second_derivatives_by_formulas() -> None:
    module, x = made("mask = causal", "torch", torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        assert gradgradcheck(module, (x,))


def test_second_derivatives_of_some_queries_at_a_time() -> None:
    def rows(q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ k

    def parted(q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = over_queries(rows, (q,), (k,), width=2**24)  # one query at a time
        return found

    q, k = (torch.randn(1, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    assert gradgradcheck(parted, (q, k))
