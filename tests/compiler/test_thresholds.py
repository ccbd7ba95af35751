"""Thresholds: which there are, that they hold at any size, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from headloom.compiler.algebra.thresholds import require, threshold
from headloom.compiler.algebra.trends import Unclear, trend
from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Block, Normalizer, Pairwise
from headloom.compiler.plan.plan import Target
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse, parse_expression
from headloom.grammar.ranges import ANYTHING, INF, Range, between
from headloom.grammar.show import show

SOLVED = {  # normaliser: what it means by another name
    "relu(s - tau)": "sparsemax",
    "relu(s + tau)": "sparsemax",
    "relu(3 - tau + s)": "sparsemax",
    "relu(2 * s + 4 * tau) / 2": "relu(s - tau)",
    "exp(s - tau)": "softmax",
    "exp(s + tau)": "softmax",
    "exp(2 * s - tau) / 3": "exp(2 * s) / sum",
    "sqrt(relu(2 * s - tau))": "entmax(3)",
    "relu(s * (1 + j) - tau)": "relu((j + 1) * s + tau)",
    "relu((s - tau) / exp(j))": "relu(exp(-j) * s - tau * exp(-j))",
    "max(s - tau, 0) ** 2": "relu(s + tau) ** 2",
}
REFUSED = {  # numerator: what is wrong, and with which part
    "exp(s) * tau": "`exp(s)`: `s` stands apart from `tau`",
    "exp(s) / tau": "`exp(s) / tau`: it may divide by zero",
    "relu(s - tau) + relu(s)": "`relu(s)`: `s` stands apart from `tau`",
    "relu(s * tau)": "`s`: it may have either sign",
    "relu(exp(s) * tau)": "`exp(s)`: `s` stands apart from `tau`",
    "1 / (s - tau)": "`1 / (s - tau)`: it may divide by zero",
    "relu(s - tau) ** -2": "`relu(s - tau) ** -2`: it is infinite where its base is 0",
    "(s - tau) ** 2": "`(s - tau) ** 2`: its base may be negative",
    "log(s - tau)": "`log(s - tau)`: it is not defined everywhere",
    "silu(s - tau)": "`silu(s - tau)`: it rises and falls",
    "step(s - tau)": "`step(s - tau)`: it jumps",
    "floor(s - tau)": "`floor(s - tau)`: it jumps",
    "where(s > tau, 1, 0)": "`where(s > tau, 1, 0)`: it jumps",
    "relu(s - tau) + relu(s + tau)": "one part of it rises, another falls",
    "relu(s - tau) * t[h]": "`t[h]`: it may have either sign",
    "relu(s - detach(tau))": "`detach(tau)`: it has no gradient",
    "2 ** (s - tau) + 1": "`2 ** (s - tau) + 1`: it may stay above 0, whatever `tau` is",
    "tanh(s - tau) / 2": "`tanh(s - tau) / 2`: it may stay below 1, whatever `tau` is",
    "t[h] ** (s - tau)": "a power with a varying exponent may rise or fall",
}


def block(
    normalize: str, mask: str = "causal", more: str = "param t[heads] = 0.3", width: int = 4
) -> Block:
    text = (
        f"block a {{ width = {width}; heads = 2; mask = {mask}; {more}; normalize = {normalize} }}"
    )
    return find(check(parse(text)), "a")


def both(made: Block, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    module = build_module(made, Target("torch"), dtype=dtype, seed=0)
    oracle = reference(made, dtype=dtype)
    oracle.load_state_dict(module.state_dict())
    return module, oracle


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("numerator", SOLVED)
def test_thresholds_from_either_side(numerator: str) -> None:
    module, oracle = both(block(f"{numerator} where sum == 1"))
    like = SOLVED[numerator]
    same, _ = both(block(f"{like} where sum == 1" if "tau" in like else like))
    same.load_state_dict(module.state_dict())
    x = tokens(2, 5, 4).requires_grad_()
    found = [torch.autograd.grad(y.square().sum(), x) for y in (module(x), oracle(x), same(x))]
    close(module(x), oracle(x))
    close(module(x), same(x))
    close(found[0][0], found[1][0])
    close(found[0][0], found[2][0])


@pytest.mark.parametrize("numerator", REFUSED)
def test_what_no_threshold_can_be_found_for(numerator: str) -> None:
    with pytest.raises(LoomError) as caught:
        block(f"{numerator} where sum == 1")
    (found,) = caught.value.diagnostics
    assert found.code == "L220"
    assert REFUSED[numerator] in found.label
    with pytest.raises(Unclear):
        require(parse_expression(numerator))


@pytest.mark.parametrize("alpha", ["0.5", "t[h]"])
def test_entmax_needs_more_than_one(alpha: str) -> None:
    with pytest.raises(LoomError, match="no threshold can be found") as caught:
        block(f"entmax({alpha})")
    span = caught.value.diagnostics[0].span
    assert span.source.text[span.start : span.end] == f"entmax({alpha})"


@pytest.mark.parametrize("name", ["sparsemax", "entmax(1.5)", "relu(s * (1 + 0 * j) - tau)"])
@pytest.mark.parametrize("size", [1, 1e4, 1e8, 1e9])
def test_rows_sum_to_one_at_any_size(name: str, size: float) -> None:
    normalize = f"{name} where sum == 1" if "tau" in name else name
    more = "let ones = x * 0 + 1; v = ones | linear | split"
    module, oracle = both(block(normalize, more=more), torch.float32)
    weights = {
        name: torch.eye(4) * (size**0.5 if name[0] in "qk" else 1) for name in module.state_dict()
    }
    for each in (module, oracle):
        each.load_state_dict(weights)
        y = each(tokens(1, 6, 4, dtype=torch.float32)).detach()
        torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-5, atol=1e-5)


DERIVED = ["sparsemax", "entmax(1.5)", "entmax(2.5)", "entmax(1 + sigmoid(t[h]))",
           "relu(s * (1 + j) + tau) ** 2 where sum == 1"]  # fmt: skip


@pytest.mark.parametrize("normalize", DERIVED)
def test_first_and_second_derivatives(normalize: str) -> None:
    x = tokens(1, 3, 2).requires_grad_()
    for each in both(block(normalize, mask="causal and i > 0", width=2)):
        assert gradcheck(each, (x,))
        assert gradgradcheck(each, (x,))


def test_second_derivatives_of_a_learned_exponent() -> None:
    module, _ = both(block("entmax(1 + sigmoid(t[h]))"))
    x = tokens(1, 3, 4)

    def of(t: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(module, {"t": t}, (x,))
        return found

    t = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    assert gradcheck(of, (t,))
    assert gradgradcheck(of, (t,))


@pytest.mark.slow
def test_thresholds_compile_whole() -> None:
    module, _ = both(block("entmax(1.5)"), torch.float32)
    x = tokens(2, 4, 4, dtype=torch.float32).requires_grad_()
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    (found,) = torch.autograd.grad(whole(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_thresholds_are_exported() -> None:
    module, _ = both(block("entmax(1.5)"), torch.float32)
    x = tokens(2, 4, 4, dtype=torch.float32)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(module, (x,), dynamic_shapes=({0: auto, 1: auto},))
    longer = tokens(3, 6, 4, dtype=torch.float32)
    torch.testing.assert_close(program.module()(longer), module(longer))


def test_thresholds_of_one_example_at_a_time() -> None:
    module, _ = both(block("entmax(1.5)"))
    x = tokens(3, 4, 4).requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    each = torch.func.grad(lambda one: module(one[None]).square().sum())
    close(torch.func.vmap(each)(x.detach()), expected)


@pytest.mark.parametrize("normalize", ["sparsemax", "entmax(1.2)", "exp(s - tau) where sum == 1"])
def test_thresholds_of_nothing(normalize: str) -> None:
    for each in both(block(normalize, mask="causal and i > 1")):
        for shape in ((0, 3, 4), (2, 0, 4)):
            x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            each(x).sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape
        x = tokens(1, 4, 4).requires_grad_()
        y = each(x)
        assert not y[:, :2].any()
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in (x, *each.parameters()) if p.grad is not None)


def test_the_largest_of_no_keys() -> None:
    made = block("softmax", more="score = s - max_keys(s) + max_queries(s)")
    for each in both(made):
        assert each(torch.zeros(2, 0, 4, dtype=torch.float64)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("text", "moves"),
    [("relu(s - tau)", True), ("relu(t[h] * s - tau)", True), ("relu(t[i] * s + tau)", True),
     ("relu(s - tau) + exp(2 * s - 2 * tau + t[j])", True),
     ("relu(s - tau) + exp(s - 2 * tau)", False),
     ("relu(t[j] * s - tau)", False), ("relu(sigmoid(s) - tau)", False)],
)  # fmt: skip
def test_which_thresholds_move_with_the_logits(text: str, moves: bool) -> None:
    made = Normalizer("f", parse_expression(text), None, parse_expression("sum == 1"))
    assert threshold(made).moves == moves


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2 * s - 3 * t", -1), ("exp(-t) * seen", -1), ("abs(s) * t", 1), ("-relu(t) * exp(s)", -1),
     ("t ** 3", 1), ("0.5 ** t", -1), ("(1 + relu(t)) ** -0.5", -1), ("min(t, 3) / exp(s)", 1),
     ("clip(t, s, 3)", 1), ("where(s > 0, t, 2 * t)", 1), ("s", 0), ("log(1 + softplus(t))", 1),
     ("1 / (1 + exp(-t))", 1), ("relu(-t) * relu(-t)", -1), ("t / (0 - exp(s))", -1)],
)  # fmt: skip
def test_trends(text: str, expected: int) -> None:
    assert trend(parse_expression(text), "t") == expected


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("sigmoid(t) + 1 - 1", 5e-324, 1), ("3 - 2 * relu(t)", -INF, 3),
     ("exp(t) * exp(s)", 5e-324, INF),
     ("t ** 2", 0, INF), ("clip(t, -1, 2) * 3", -3, 6), ("1 / seen", 5e-324, 1),
     ("max(t, 1) ** -2", 5e-324, 1), ("abs(tanh(t))", 0, 1),
     ("where(t > 0, 1, s)", -INF, INF)],
)  # fmt: skip
def test_bounds(text: str, low: float, high: float) -> None:
    assert between(parse_expression(text)) == Range(low, high)


def test_bounds_of_what_may_be_anything() -> None:
    for text in ("s", "1 / s", "s ** 3", "log(s)", "t[h]", "gelu(s)", "s ** t"):
        assert between(parse_expression(text)) == ANYTHING, text


def test_a_rising_numerator_is_turned_round() -> None:
    made = block("relu(2 * s + 3 * tau) ** 2 where sum == 1").mixings["o"].mix
    assert isinstance(made, Pairwise)
    form = threshold(made.normalize)
    assert show(form.numerator) == "relu(2 * s + 3 * -tau) ** 2"
