"""Numbers of a text keep all their digits in a module of float64."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

WHERE = {
    "score": "score = s + where(i - j < 2, 0.7, 0.3)",
    "score with a half": "score = s * where(s > 0, i, 0.7)",
    "score with a least": "score = s * max(0.7, i) - min(j, 0.3)",
    "whole numbers": "score = s + where(s > 0, 1, 2) / 3",
    "an index": "param t[12] = 0.1 * h; score = s + t[where(i - j < 2, 0.7, 0.3) * 10]",
    "mask": "mask = i - j < where(h < 2, 3.7, 1.3) * 1.1",
    "mask of whole numbers": "mask = (i - j) % where(h < 2, 2, 3) == 0",
    "numerator": "normalize = sigmoid(s + where(j < 3, 0.7, 0.3))",
    "added": "normalize = exp(s) / (exp(where(h < 2, 0.7, 0.3)) + sum)",
    "threshold": "normalize = sparse",
    "weights": "weights = p * where(i == j, 0.7, 0.3)",
    "pipeline": "q = x | linear | split | kinked; let g = where(k > 0, 0.1, 0.2); v = v_ * g\n"
    "let v_ = x | linear | split",
    "inlined": "out = where((o | merge | linear) > 0, 0.7, 0.3) * (o | merge | linear)",
    "tensor": "const t[heads] = where(h < 2, 0.7, 0.3); score = s + t[h]",
    "mixer": "mix = kinky; mask = causal",
    "one feature": "head_dim = 1; score = s + where(i - j < 2, 0.7, 0.3)",
    "clip": "param t = 0.3; score = clip(s, -0.7, t) + clip(s, t, 0.7) + clip(0.1, t, s)",
    "clip of a stream": "let t = x | linear(1); score = clip(s, t[i], 0.7)",
    "clip in a pipeline": "let t = x | linear | split; q = clip(t, k, 0.7)",
}
DEFINITIONS = """
normalize sparse = relu(s * where(i == j, 1.7, 1.3) - tau) where sum == 1
stage kinked = where(x > 0, 0.7, 0.3)
mix kinky {
  state S[head_dim, value_dim] = 0
  S <- S * where(sum(k) > 0, 0.7, 0.3) + outer(k, v) + where(true, 0.1, 0.2)
  o <- q @ S
}
"""


@pytest.mark.parametrize("name", WHERE)
def test_two_numbers_of_a_where_are_exact(name: str) -> None:
    text = f"{DEFINITIONS}\nblock a {{ heads = 4; width = 24\n{WHERE[name]} }}"
    block = find(check(parse(text)), "a")
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 6e-2)):
        module = build_module(block, Target("torch"), dtype=dtype, seed=0)
        oracle = reference(block, dtype=torch.float64)
        oracle.load_state_dict(module.state_dict())
        got = module(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), oracle(x.to(dtype).double()), rtol=tolerance, atol=tolerance
        )
