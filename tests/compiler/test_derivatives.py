"""Symbolic derivatives against autograd, in float64: by the logit, and by all that is learned."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from headloom.compiler.meaning.values import value
from headloom.grammar.derive import derivative
from headloom.grammar.expr import names
from headloom.grammar.parse import parse_expression
from headloom.grammar.syntax import Expr, Index, Name, walk

SCORES = [
    "20 * tanh(s / 20)",
    "s - slope[h] * abs(i - j)",
    "s * t[i, h] + g[j]",
    "s + table[h, 3] * sigmoid(g[j]) - table[h, 3] ** 2",
    "where(j < i, s * softplus(t[i, h]), -s / (1 + exp(g[j])))",
    "max(s, slope[h]) + min(s * g[j], 0.3) + clip(s, -0.5, t[i, h])",
    "relu(s - slope[h]) ** 2 / (1 + abs(i - j)) + log(seen) * g[j]",
    "gelu(s) * silu(t[i, h]) + erf(s) - sqrt(1 + s * s)",
    "s * detach(g[j]) + elu(slope[h] - s)",
    "exp(s - slope[h] * log(1 + abs(i - j))) * cos(g[j]) + sin(s)",
]
NORMALISERS = ["exp(s)", "relu(s - slope[h]) ** 2", "sigmoid(s + g[j] - log(seen))", "elu(s) + 1"]
DENOMINATORS = [
    "sum",
    "exp(slope[h]) + sum",
    "1 + sum",
    "sqrt(sum) * t[i, h]",
    "detach(sum) + 2 * sum",
]
PAIRS = 23


@pytest.mark.parametrize("text", [*SCORES, *NORMALISERS, *DENOMINATORS])
def test_derivatives_are_those_of_autograd(text):
    expr = parse_expression(text)
    draw = torch.Generator().manual_seed(len(text))
    fixed = {
        name: torch.randint(1, 9, (PAIRS,), generator=draw).double()
        for name in ("i", "j", "h", "seen")
    }
    targets = [each for each in dict.fromkeys(walk(expr)) if isinstance(each, Index)]
    targets += [Name(name) for name in ("s", "sum") if name in names(expr)]
    start = [torch.rand(PAIRS, generator=draw, dtype=torch.float64) + 0.2 for _ in targets]

    class Written(torch.autograd.Function):
        """The expression, whose backward pass is its symbolic derivatives."""

        @staticmethod
        def forward(ctx, *given: Tensor) -> Tensor:
            ctx.save_for_backward(*given)
            return evaluated(expr, fixed, dict(zip(targets, given, strict=True)))

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(targets, ctx.saved_tensors, strict=True))
            return tuple(grad * evaluated(derivative(expr, each), fixed, given) for each in targets)

    given = [each.requires_grad_() for each in start]
    plain = evaluated(expr, fixed, dict(zip(targets, given, strict=True)))
    weigh = torch.randn(PAIRS, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weigh).sum(), given, allow_unused=True)
    got = torch.autograd.grad((Written.apply(*given) * weigh).sum(), given)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two)
    if "detach" not in text:
        assert torch.autograd.gradcheck(Written.apply, given)


def evaluated(expr: Expr, fixed: Mapping[str, Tensor], given: Mapping[Expr, Tensor]) -> Tensor:
    def leaf(node: Expr) -> Tensor | None:
        if node in given:
            return given[node]
        return fixed.get(node.id) if isinstance(node, Name) else None

    found = torch.as_tensor(value(expr, leaf, lead=1), dtype=torch.float64)
    return found.expand(PAIRS).clone()
