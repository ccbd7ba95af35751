"""What a block keeps: one value, from which cost, `init_cache` and the updates are made."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.facts import decoding
from headloom.compiler.facts.cost import cost
from headloom.compiler.facts.kept import Keys, State, Tails, kept

from .battery import block, compiled, inputs

NAMED = {
    "keys": "branch keys { k = o | merge | linear | split }; out = (o + keys) | merge | linear",
    "tails": "k = x | linear | conv(3) | split; branch tails { mix = linear }; "
    "out = (o + tails) | merge | linear",
    "module": "branch module { mix = linear }; out = (o + module) | merge | linear",
}


def of(settings: str, mask: str = "causal"):
    return block(f"block b {{ heads = 4; head_dim = 4; mask = {mask}; {settings} }}")


def test_equal_streams_are_kept_once():
    (keys,) = kept(of("let w = x | linear | split; k = w; v = w")).parts
    assert isinstance(keys, Keys)
    assert keys.early
    assert keys.readers == ("o",)
    assert [each.shape.features for each in keys.streams] == [16]


def test_what_is_mixed_of_what_was_mixed_is_kept_apart():
    branches = (
        "k = x | linear | conv(3) | split; branch two { k = o | merge | linear | split }; "
        "branch three { mix = linear; mask = causal }; out = (o + two + three) | merge | linear"
    )
    early, late, state, tails = kept(of(branches, "causal and (window(3) or sink(2))")).parts
    assert (early.readers, early.early, early.ring, early.prefix) == (("o",), True, 3, 2)
    assert (late.readers, late.early) == (("two",), False)
    assert state == State("three", 4 * (4 * 4 + 4))
    assert isinstance(tails, Tails)
    assert [numbers for _, numbers in tails.stages] == [2 * 16]


@pytest.mark.parametrize("name", NAMED)
def test_a_branch_may_be_called_as_a_part_of_the_cache(name):
    what = of(NAMED[name])
    module = compiled(what)
    x = inputs(what, n=4)["x"]
    cache = module.init_cache(2, 4)
    steps = [module(x[:, at : at + 1], cache=cache) for at in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), module(x), rtol=1e-9, atol=1e-9)
    assert cache.nbytes == 2 * cost(what).cache_bytes(4, "float64")


def test_what_is_gathered_of_a_context_is_kept():
    what = of(
        "context_width = 8; source = seeds | merge; "
        "branch seeds { q = latents(3) | linear | split; source = context }",
        mask="all",
    )
    module = compiled(what)
    cache = module.init_cache(2, 7)
    module(**inputs(what, n=7), cache=cache)
    assert cache.nbytes == 2 * cost(what).cache_bytes(7, "float64") == 2 * 8 * 2 * 3 * 16


WIDE = {
    "carried": ["k"],
    "running_twice_over_queries": ["o_sums_0", "o_sums_1"],
    "read_by_its_values": [],
}


@pytest.mark.parametrize("name", WIDE)
def test_what_later_tokens_change_is_kept_in_float32(name):
    what = block(name)
    module = compiled(what, torch.bfloat16)
    cache = module.init_cache(2, 9)
    x = inputs(what, n=9)["x"].bfloat16()
    for at in range(9):
        module(x[:, at : at + 1], cache=cache)
    wide = [each.name for part in kept(what).keys for each in part.streams if each.changing]
    assert wide == WIDE[name]
    found = [each for part in cache for each, x in part.kept.items() if x.dtype == torch.float32]
    assert found == wide
    assert cache.nbytes == 2 * cost(what).cache_bytes(9, "bfloat16")


OF_ROWS = {
    "rows(o, p * sum_queries(p))": "`sum_queries` in `rows` reads other queries",
    "rows(o, running_queries(p))": "`running_queries` in `rows` reads other queries",
    "rows(o, convolve(p, c))": "`convolve` in `rows` may read the queries before",
    "rows(o, running_keys(p))": None,
}


@pytest.mark.parametrize("asked", OF_ROWS)
def test_numbers_of_rows_that_are_not_known_token_by_token(asked):
    what = of(f"param c[2, 3] = 1; out = (o + {asked}) | merge | linear")
    assert decoding.obstacle(what) == OF_ROWS[asked]
