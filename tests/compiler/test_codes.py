"""Every code that is raised has an entry, and every entry's example raises it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import headloom.compiler.checking.codes
import headloom.grammar.codes
from headloom.compiler.checking.check import check
from headloom.compiler.checking.codes import CODES, OWN
from headloom.grammar.diagnostics import Diagnostic, LoomError
from headloom.grammar.parse import parse

TABLES = (headloom.compiler.checking.codes, headloom.grammar.codes)
FOLDERS = [Path(str(each.__file__)).parent for each in TABLES]
CODE = re.compile(r'"([LW]\d{3})"')


def findings(text: str) -> list[Diagnostic]:
    """Return the errors of a text, or its warnings where it has no errors."""
    try:
        return list(check(parse(text)).warnings)
    except LoomError as problem:
        return list(problem.diagnostics)


def raised() -> set[str]:
    return {
        code
        for folder in FOLDERS
        for path in folder.rglob("*.py")
        if path.name != "codes.py"
        for code in CODE.findall(path.read_text(encoding="utf-8"))
    }


def test_every_code_that_is_raised_has_an_entry_and_no_other_has():
    assert raised() == set(CODES)


@pytest.mark.parametrize("code", OWN.values(), ids=OWN)
def test_the_example_raises_its_code_alone(code):
    found = findings(code.example)
    assert {each.code for each in found} == {code.code}
    for each in found:
        assert each.message
        assert each.span.source.text == code.example
        assert 0 <= each.span.start < each.span.end <= len(code.example)
        assert each.severity == ("warning" if code.code.startswith("W") else "error")
        assert each.render()


@pytest.mark.parametrize("code", OWN.values(), ids=OWN)
def test_the_entry_reads_well(code):
    assert code.title[0].islower() or code.title[0] == "`"
    assert not code.title.endswith(".")
    assert code.explanation.endswith(".")
    assert CODES[code.code] is code
