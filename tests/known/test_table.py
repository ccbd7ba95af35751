"""The table of known kinds: what `docs/known.md` says of it, and that it is kept tidy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headloom.known.definitions import DEFINITIONS
from headloom.known.kind import Kind
from headloom.known.readers import READERS
from headloom.known.table import KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "known.md").read_text(encoding="utf-8")
READ, MISSING = TEXT.split("## What can be read")[1].split("## What is missing")
ROWS = [
    (name, row)
    for name, rows in KINDS.items()
    for row in (rows if isinstance(rows, tuple) else (rows,))
]


def texts(row: Kind) -> str:
    """Return all texts of a row."""
    found = [*row.ffns.values(), *row.model.values(), *row.defs.values(), *row.around.values()]
    for each in row.blocks.values():
        found += [each] if isinstance(each, str) else list(each.values())
    return "\n".join([*found, row.mixers, row.parts])


def test_the_document_has_a_row_for_every_kind() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", READ, re.MULTILINE))
    assert set(rows) == set(KINDS)
    for name, kinds in KINDS.items():
        first = kinds[0] if isinstance(kinds, tuple) else kinds
        title, _, rest = first.about.partition("; ")
        who, _, what = rest.partition(": ")
        assert rows[name] == f"{title}, {who} | {what}"
    assert f"of every weight: {len(KINDS)} kinds." in READ


def test_what_is_missing_is_known_to_transformers_and_not_read() -> None:
    pytest.importorskip("transformers", reason="needs Hugging Face Transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as THEIRS

    missing = set(re.findall(r"^\| `(\w+)` \|", MISSING, re.MULTILINE))
    assert missing
    assert not missing & set(KINDS)
    assert (missing | set(KINDS)) <= set(THEIRS)


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[row.about for _, row in ROWS])
def test_a_row_names_what_there_is(name: str, row: Kind) -> None:
    text = texts(row)
    assert re.fullmatch(r"[^;]+; [^:]*\d{4}(: .*)?", row.about), name
    assert set(re.findall(r"\{\{(\w+)\(", text)) <= set(READERS)
    assert "" not in row.ffns


def test_shared_definitions_and_readers_are_used() -> None:
    whole = "\n".join([*(texts(row) for _, row in ROWS), *DEFINITIONS.values()])
    words = set(re.findall(r"\w+", whole))
    assert set(DEFINITIONS) <= words | {"xielu", "gated", "plain_moe", "biased", "grouped"}
    assert set(READERS) <= words
