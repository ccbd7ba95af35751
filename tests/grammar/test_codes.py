from __future__ import annotations

import pytest

from headloom.grammar.codes import CODES
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse, read

FORMS = {"loom": parse, "yaml": parse_yaml, "file": read}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_example_raises_its_code(code):
    with pytest.raises(LoomError) as caught:
        FORMS[code.form](code.example)
    assert {each.code for each in caught.value.diagnostics} == {code.code}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_entry_reads_well(code):
    assert code.title[0].islower()
    assert not code.title.endswith(".")
    assert code.explanation.endswith(".")
    assert CODES[code.code] is code
