"""Blocks that reach a kernel in ways of their own: in the interpreter they are what they mean."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.api import build_module
from headloom.compiler.choose import Target, lowerings
from headloom.compiler.pipeline import lower
from headloom.compiler.reference import reference
from headloom.compiler.verify import CHECKS
from headloom.compiler.verify_cases import Subject

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
    paths = {each.path for each in lowerings(lower(what, Target("triton")))}
    assert paths == {"triton"}
    cases, worst = CHECKS["kernels in the interpreter"](Subject.of(what))
    assert cases > 0
    assert worst < 1e-5


@pytest.mark.parametrize("name", OBSTACLES)
def test_why_there_is_no_kernel(name):
    (chosen,) = lowerings(lower(block(name), Target("triton")))
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
