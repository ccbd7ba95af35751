"""Blocks that reach a kernel in ways of their own: in the interpreter they are what they mean."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.pipeline import lower
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify import cases as verify_cases
from headloom.compiler.verify.cases import CASES, Subject
from headloom.compiler.verify.verify import CHECKS
from headloom.grammar.parse import parse

from .battery import block, inputs

FUSED = [
    "cosine", "distance", "trilinear", "matrix_form", "bias_table", "bias_past_the_end", "joint",
    "statistics_of_sinks", "weightless", "branch_beside", "latents_from_tokens",
]  # fmt: skip
OBSTACLES = {
    "relative_keys": "is no product of a query and a key",
    "l1": "is no product of a query and a key",
    "mask_of_vectors": "queries and keys meet in a second product",
    "top_of_row": "weights edited after the normaliser",
    "convolved_over_keys": "`convolve` looks at other pairs",
    "statistics": "`rows` of the map is not computed by the kernels",
    "entmax": "needs a row threshold",
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_it_is_what_it_means(name):
    what = block(name)
    paths = {each.path for each in lower(what, Target("triton")).lowerings.values()}
    assert paths == {"triton"}
    cases, worst, *_ = CHECKS["kernels in the interpreter"](Subject.of(what))
    assert cases > 0
    assert worst < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_queries_of_latents_and_numbers_of_keys():
    """Queries run along latents, keys and a stream that the score reads along the tokens."""
    settings = "width = 16; heads = 2; q = latents(4) | linear | split; let g = x | linear(1)"
    what = find(check(parse(f"block a {{ {settings}; score = s + g[j]; out = o | merge }}")), "a")
    cases, worst, *_ = CHECKS["kernels in the interpreter"](Subject.of(what))
    assert cases > 0
    assert worst < 1e-5


def test_what_a_query_says_in_several_ways_is_learned(monkeypatch):
    """Each way has a gradient by row, all in one buffer, of which an operator returned views."""
    monkeypatch.setattr(verify_cases, "CASES", CASES[:2])
    settings = "width = 8; heads = 2; param u[heads, 8] = 1; param w[heads, 8] = 1"
    score = "s * tanh(dot(x[i], u[h])) + dot(x[i], w[h]) * (i - j)"
    what = find(check(parse(f"block a {{ {settings}; score = {score} }}")), "a")
    cases, worst, *_ = CHECKS["kernels in the interpreter"](Subject.of(what))
    assert cases > 0
    assert worst < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "similarity = cosine; score = s + k[h // 2, j, 1]",
        "similarity = cosine; score = s + norm(k[h // 2, j]) * k[0, j, 2]",
        "let f = x | linear(heads); let g = x | linear(heads); score = s + f[i, h] + g[i, h]",
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_numbers_made_of_a_shared_key(text):
    """Two query heads share a key: what is made of it beside the kernel is made for both."""
    settings = "width = 16; heads = 4; kv_heads = 2; head_dim = 8; mask = h < 1 or window(3)"
    what = find(check(parse(f"block a {{ {settings}; {text} }}")), "a")
    assert {each.path for each in lower(what, Target("triton")).lowerings.values()} == {"triton"}
    meaning = reference(what, dtype=torch.float64, seed=0)
    module = build_module(what, Target("triton"), dtype=torch.float32)
    module.load_state_dict(meaning.state_dict())
    found = []
    for each, dtype in ((module, torch.float32), (meaning, torch.float64)):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.to(dtype).requires_grad_()
        y = each(x)
        inputs = (x, *dict(sorted(each.named_parameters())).values())
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBSTACLES)
def test_why_there_is_no_kernel(name):
    (chosen,) = lower(block(name), Target("triton")).lowerings.values()
    assert chosen.path != "triton"
    assert OBSTACLES[name] in dict(chosen.obstacles)["triton"]


def test_the_entropy_of_the_loss_comes_from_the_kernel():
    what = block("regularized_by_kernel")
    module = build_module(what, Target("triton"), dtype=torch.float32).train()
    meaning = reference(what, dtype=torch.float64).train()
    meaning.load_state_dict(module.state_dict())
    x = inputs(what)["x"]
    module(x.float()), meaning(x)
    one, two = module.auxiliary_loss(), meaning.auxiliary_loss()
    torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(one, list(module.parameters()), allow_unused=True)
    expected = torch.autograd.grad(two, list(meaning.parameters()), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
