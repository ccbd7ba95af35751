"""Which kernels blocks ask for, and modules that call them, against those of PyTorch alone."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.checking.check import check, find
from headloom.compiler.lowerings.operators import operators
from headloom.compiler.pipeline import lower
from headloom.compiler.plan.plan import Target
from headloom.compiler.text.text import pieces
from headloom.grammar.parse import parse
from headloom.kernels.recurrence import Recurrence
from headloom.kernels.render import skeleton_text
from headloom.kernels.sequential import Scan
from headloom.kernels.spec import Attend

MIXERS = """
mix fading {
  let alpha = x | linear(heads) | sigmoid
  state S[head_dim, value_dim] = 0
  S <- alpha * S + outer(k, v)
  o <- q @ S
}
mix twice {
  let gone = x | linear(heads * head_dim) | sigmoid | split
  state S[head_dim, value_dim] = 0
  o <- q @ S
  S <- gone * (S - outer(k, k @ S)) + outer(k, v)
}
mix highest {
  param scale[heads, value_dim] = 1
  state m[value_dim] = 0
  m <- max(m, scale * v) + 0.1 * tanh(dot(q, k))
  o <- m
}
"""
BLOCK = """
block b {
  width = 16
  heads = 2
  mask  = causal and document
  branch one { mix = fading }
  branch other { mix = twice }
  branch last { kv_heads = 1; mix = highest }
  branch again { mix = fading }
  branch pairs { mask = causal and document }
  out = one + other + last + again + pairs | merge | linear
}
"""


def test_all_that_a_file_may_define_has_a_name_of_its_own():
    """A module that calls one function would else call another of its name."""
    skeletons = ast.parse(skeleton_text("pairwise", "chunked", "sequential")).body
    names = [each.name for each in skeletons if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    assert not {each for each in names if names.count(each) > 1}
    assert not pieces().keys() & names


def plan_of(text: str):
    return lower(find(check(parse(MIXERS + text)), "b"), Target("triton"))


def test_each_form_of_recurrence_has_one_operator():
    plan = plan_of(BLOCK)
    found = operators(plan, "b")
    assert {each.path for each in plan.lowerings.values()} == {"triton"}
    assert [each.name for each in found] == [
        "b_recurrence",
        "b_recurrence_2",
        "b_last_scan",
        "b_pairs_attention",
    ]
    assert found[0].spec == Recurrence("number")
    assert found[1].spec == Recurrence("rows", corrected=True, before=True)
    assert [type(each.spec) for each in found[2:]] == [Scan, Attend]


@pytest.mark.parametrize(
    ("mixer", "mask", "words"),
    [
        ("fading", "causal", None),
        ("highest", "causal", None),
        ("linear", "all", "two products"),
    ],
)
def test_why_there_is_none(mixer, mask, words):
    plan = plan_of(f"block b {{ heads = 2; width = 16; mix = {mixer}; mask = {mask} }}")
    (chosen,) = plan.lowerings.values()
    assert (chosen.path == "triton") is (words is None)
    assert words is None or words in dict(chosen.obstacles)["triton"]


def test_a_state_too_large_for_a_kernel_says_so():
    plan = plan_of("block b { heads = 2; width = 600; mix = fading; mask = causal }")
    (chosen,) = plan.lowerings.values()
    assert chosen.path == "chunkwise"
    assert dict(chosen.obstacles)["triton"] == ("`S` is 300 x 300; the kernels hold up to 256")


def test_a_file_has_the_kernels_it_calls():
    arch = hl.load(MIXERS + BLOCK, format="loom")
    both = hl.emit(arch, "b", backend="triton")
    assert all(each in both for each in ("class Pairwise", "class Chunked", "class Sequential"))
    alone = hl.emit(
        hl.load(
            MIXERS + "block b { heads = 2; width = 16; mix = fading; mask = causal }", format="loom"
        ),
        "b",
        backend="triton",
    )
    assert "class Chunked" in alone
    assert "class Pairwise" not in alone
    assert "class Sequential" not in alone


def modules() -> tuple[torch.nn.Module, torch.nn.Module, Tensor, Tensor]:
    arch = hl.load(MIXERS + BLOCK, format="loom")
    ours, plain = (hl.compile(arch, "b", backend=each, seed=0) for each in ("triton", "torch"))
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    return ours, plain, x, torch.tensor([[0] * 4 + [1] * 5, [0] * 9])


def test_kernels_do_what_pytorch_does():
    ours, plain, x, segments = modules()
    results = []
    for each in (ours, plain):
        given = x.clone().requires_grad_()
        y = each(given, segments=segments)
        y.sin().sum().backward()
        results.append([y, given.grad, *(p.grad for p in each.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kernels_go_on_from_a_cache():
    ours, plain, x, segments = modules()
    whole = plain(x, segments=segments)
    cache, parts = ours.init_cache(2, 9), []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 9)):
        parts.append(ours(x[:, cut], segments=segments[:, cut], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_float64_is_refused_by_name():
    ours, _, x, _ = modules()
    with pytest.raises(TypeError, match="float64"):
        ours.double()(x.double())
