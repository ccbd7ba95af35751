from __future__ import annotations

import pytest

from headloom.grammar.parse import parse_expression
from headloom.search.objectives import read_objectives, read_requirement, violation


class Costs:
    params = 2_500_000

    def flops(self, tokens):
        return 10 * tokens

    def cache_bytes(self, tokens):
        return tokens

    def activation_bytes(self, tokens):
        return 3 * tokens


def broken(text):
    return violation(read_requirement(parse_expression(text)), Costs())


def test_objectives_are_measured_or_static():
    accuracy, cache = read_objectives(
        parse_expression("[accuracy, cache_bytes(tokens = 64)]"), True
    )
    assert accuracy.measured
    assert not cache.measured
    assert accuracy.of(Costs(), {"accuracy": 0.5}) == 0.5
    assert cache.of(Costs(), {}) == 64
    assert cache.label == "cache_bytes(tokens = 64)"


@pytest.mark.parametrize(
    "text",
    [
        "params < 3M",
        "params < 2M or flops(tokens = 1) <= 10",
        "1K <= cache_bytes(tokens = 4K) <= 4K",
    ],
)
def test_a_requirement_that_holds(text):
    assert broken(text) is None


def test_a_requirement_that_does_not_says_which_part_and_by_how_much():
    found = broken("params < 2M and flops(tokens = 8) <= 80 and activation_bytes(tokens = 8) > 48")
    assert found.reason == (
        "params < 2M does not hold: params = 2,500,000; activation_bytes(tokens = 8) > 48 "
        "does not hold: activation_bytes(tokens = 8) = 24"
    )
    assert found.by == pytest.approx(0.25 + 1.0, abs=1e-5)
    assert broken("params < 1M").by > broken("params < 2M").by
