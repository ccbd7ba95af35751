from __future__ import annotations

import pytest

from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse
from headloom.search.codes import CODES
from headloom.search.holes import problems
from headloom.search.plan import read_plan
from headloom.search.space import alternatives

READ = [each for each in CODES.values() if each.form == "loom"]


@pytest.mark.parametrize("code", READ, ids=[each.code for each in READ])
def test_the_example_raises_its_code(code):
    file = parse(code.example)
    with pytest.raises(LoomError) as caught:
        read_plan(file) if code.code >= "L520" else list(alternatives(file))
    assert {each.code for each in caught.value.diagnostics} == {code.code}


@pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))
def test_the_entry_reads_well(code):
    assert code.title
    assert not code.title.endswith(".")
    assert code.explanation.endswith(".")


def test_all_problems_are_found_at_once():
    file = parse("block a { heads = integer(4..2); dropout = loguniform(0..1); mask = choose() }")
    assert [each.code for each in problems(file)] == ["L501", "L505", "L502"]


def test_all_mistakes_of_a_search_block_are_found_at_once():
    file = parse(
        "model m { vocab = 8; width = 8; layers = [b] }\nblock b { heads = 2 }\n"
        "search { model = n; task = mqr; minimize = flop(tokens = 8); trials = 0; train = sgd }"
    )
    with pytest.raises(LoomError) as caught:
        read_plan(file)
    found = [each.code for each in caught.value.diagnostics]
    assert found == ["L523", "L524", "L526", "L530"]
    assert "did you mean `mqar`" in str(caught.value)
