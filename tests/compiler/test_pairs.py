"""Expressions of pairs that the text says in a way of its own, beside the reference."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.algebra.normalizers import Exponential, exponential
from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Pairwise
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.cases import Subject
from headloom.compiler.verify.verify import CHECKS
from headloom.grammar.parse import parse

from .battery import block as battery_block


def both(text: str) -> tuple[nn.Module, nn.Module]:
    block = find(check(parse(f"block a {{ width = 6; heads = 3; {text} }}")), "a")
    module = build_module(block, Target("torch"), dtype=torch.float64, seed=0)
    oracle = reference(block, dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    return module, oracle


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same(text: str) -> None:
    """Compare values and every gradient with the reference."""
    x, found = tokens(), []
    for each in both(text):
        given = x.clone().requires_grad_()
        y = each(given)
        inputs = {"x": given, **dict(each.named_parameters())}
        gradients = torch.autograd.grad(y.square().sum(), list(inputs.values()), allow_unused=True)
        found.append({"y": y, **dict(zip(inputs, gradients, strict=True))})
    for name, mine in found[0].items():
        theirs = found[1][name]
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            zero if mine is None else mine,
            zero if theirs is None else theirs,
            rtol=1e-9,
            atol=1e-10,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def form(normalize: str) -> Exponential | None:
    text = f"block a {{ width = 6; heads = 3; param z[heads] = 0; normalize = {normalize} }}"
    mix = find(check(parse(text)), "a").mixings["o"].mix
    assert isinstance(mix, Pairwise)
    return exponential(mix.normalize)


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("1 + sum + 2", "3 + sum"),
        ("sum + 1 + 1", "sum + 2"),
        ("2 + sum - 1", "1 + sum"),
        ("sum + 1 - 1", "sum"),
        ("1 + sum + exp(z[h]) + 1", "2 + exp(z[h]) + sum"),
        ("max(1 + sum + 1, 3)", "max(2 + sum, 3)"),
        ("detach(sum + 1 + 1)", "detach(sum + 2)"),
    ],
)
def test_numbers_on_both_sides_of_the_sum(text: str, like: str) -> None:
    found = form(f"exp(s) / ({text})")
    assert found is not None
    assert found == form(f"exp(s) / ({like})")
    same(f"mask = causal; param z[heads] = 0.3; normalize = exp(s) / ({text})")


@pytest.mark.parametrize(
    "text",
    [
        "mask = causal; score = s + where(ispow2(i - j), j, i) / 3",
        "mask = causal and where(ispow2(i - j), 1, 2) / 3 < 0.5",
        "mask = causal; score = s * where(ispow2(j), 0.18, sin(i - j))",
        "score = s + (where(i % 2 == 0 and not ispow2(j // 2), i // 2, h % 2) + 1) ** 0.5",
        "score = s + where(i / 2 < j, 1, j % 3) / 3",
        "score = s - clip(0.5, 0, h)",
    ],
)
def test_truths_inside_fractions(text: str) -> None:
    same(text)


DIVIDED = {  # how a block reads what is divided, called `e` here: what that is
    "score = s + e": "s",
    "score = s * (e + t[h])": "t[h]",
    "weights = p + e": "p",
    "out = (o + e) | merge | linear": "o",
    "q = x | linear | split | moved": "x",
    "mix = kept; mask = causal": "v",
}


@pytest.mark.parametrize("text", DIVIDED)
def test_whole_division_has_no_gradient(text: str) -> None:
    found = []
    for division in (f"({DIVIDED[text]} // 0.3)", f"floor({DIVIDED[text]} / 0.3)"):
        block = f"block a {{ width = 6; heads = 3; param t[heads] = 0.7; {text} }}"
        if "moved" in text:
            block = f"stage moved = x + e\n{block}"
        if "kept" in text:
            state = "state S[head_dim, value_dim] = 0"
            block = f"mix kept {{ {state}; S <- S + outer(k, v + e); o <- q @ S }}\n{block}"
        checked = find(check(parse(re.sub(r"\be\b", division, block))), "a")
        module = build_module(checked, Target("torch"), dtype=torch.float64, seed=0)
        oracle = reference(checked, dtype=torch.float64)
        oracle.load_state_dict(module.state_dict())
        for each in (module, oracle):
            x = tokens().requires_grad_()
            y = each(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)


def test_a_sum_over_later_keys_keeps_its_digits() -> None:
    """Next to a large total, the difference of two sums would lose those of what comes last."""
    far = "where(j < 3, 30000.1 * (j + 1), s)"
    text = f"mask = causal; score = s - (sum_keys({far}) - running_keys({far}))"
    module, oracle = both(text)
    expected = oracle(tokens())
    torch.testing.assert_close(
        module.float()(tokens().float()).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_values_that_read_what_is_mixed_of_them_at_any_positions() -> None:
    """Where tokens do not stand in their order, the system is no triangle."""
    module, oracle = both("mask = j < i; let w = x | linear | split; v = w - 2 * o")
    places = torch.tensor([3, 0, 9, 4, 1])
    found, expected = (each(tokens(), positions=places) for each in (module, oracle))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["read_by_its_values", "read_by_its_values_in_a_window"])
def test_values_that_read_what_is_mixed_some_queries_at_a_time(name: str) -> None:
    found = CHECKS["in tiles"](Subject.of(battery_block(name)))
    assert not isinstance(found, str)
    assert found[0] > 20
    assert found[1] < 1e-9


def test_functions_of_the_map_are_made_once() -> None:
    ranks = "where(rank_keys(p) < 2, p, 0)"
    text = f"mask = causal; weights = {ranks} / sum_keys({ranks}) + coin(1) * coin(1)"
    block = find(check(parse(f"block a {{ width = 6; heads = 3; {text} }}")), "a")
    written = generate(block, Target("torch")).text.partition("def attend_weights")[2]
    assert (written.count("rank_keys("), written.count("coin(")) == (1, 2)
    same(text)
