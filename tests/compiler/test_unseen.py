"""Masks that show nothing to anyone are warned of (W005), and no others."""

from __future__ import annotations

import pytest

from headloom.compiler.algebra.masks import NOTHING, extent
from headloom.compiler.algebra.unseen import unseen
from headloom.compiler.checking.check import check
from headloom.grammar.parse import parse

from .test_masks import mask

NEVER = "no query sees a key"
SOON = "no query sees a key among the first {} tokens"


@pytest.mark.parametrize(("text", "label"), [
    ("causal and j > i", NEVER), ("window(-3)", NEVER), ("window(0)", NEVER), ("sink(0)", NEVER),
    ("causal and not causal", NEVER), ("not (causal or j > i)", NEVER),
    ("document and causal and j > i", NEVER), ("sink(4) and window(0)", NEVER),
    ("window(0) or causal and i + 2 < j", NEVER), ("blocks(4) and i - j > 3", NEVER),
    ("not (0 <= i - j <= 5) and i - j == 3", SOON.format(80)),
    ("strided(2) and (i - j) % 2 == 1", SOON.format(74)),
    ("blocks(8) and i // 8 != j // 8", SOON.format(128)),
    ("h < 0 and causal", SOON.format(64)),
])  # fmt: skip
def test_masks_that_show_nothing(text, label):
    assert unseen(mask(text), heads=2) == label


@pytest.mark.parametrize("text", [
    "all", "causal", "window(1)", "causal and not document", "i - j >= 3", "i - j == 100",
    "i - j >= 100_000", "sink(1)", "h == 1 and causal", "j < n - 40", "not window(3)",
    "causal and (doc[i] == doc[j] and j > i or window(2))", "document and not document",
    "prefix(0)", "not (i < j)", "window(0) or sink(1)", "j > i",
])  # fmt: skip
def test_masks_that_show_something_or_may(text):
    assert unseen(mask(text), heads=2) == ""


@pytest.mark.parametrize("text", ["causal and j > i", "sink(3) and window(0)", "window(0)"])
def test_what_shows_nothing_has_an_empty_extent(text):
    assert extent(mask(text)) == NOTHING


def test_a_branch_is_warned_of_where_its_mask_stands():
    text = (
        "block a { mask = causal; branch b { mask = window(0) }\n"
        "  branch c { heads = 2 }; out = (o + b) | merge | linear }"
    )
    warnings = [each for each in check(parse(text)).warnings if each.code == "W005"]
    assert [text[each.span.start : each.span.end] for each in warnings] == ["window(0)"]
