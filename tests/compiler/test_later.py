"""Reads at another key's token: which may lie after the query, by trying all pairs."""

from __future__ import annotations

import pytest
import torch

import headloom as hl
from headloom.compiler.checking.check import check
from headloom.compiler.facts.decoding import obstacle
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Block
from headloom.grammar.parse import parse

NEVER = {
    "the token itself": "score = s + t[j / 1, h]",
    "before it": "score = s + t[j - 1, h]",
    "held at the first": "score = s + t[max(j - 1, 0), h]",
    "the start of its block": "score = s + t[j // 4 * 4, h]",
    "half as far": "score = s + t[j / 2, h]",
    "clipped": "score = s + t[clip(j, 0, 7) - 7, h]",
    "the rest of a division": "score = s + t[j % 4, h]",
    "strictly before": "mask = j < i; score = s + t[j + 1, h]",
    "complete blocks": "mask = causal and i // 4 > j // 4; score = s + t[j // 4 * 4 + 3, h]",
    "chosen by where": "score = where(i // 4 == j // 4, s, s + t[j // 4 * 4 + 3, h])",
    "beside or": "mask = causal and (i // 4 == j // 4 or t[j // 4 * 4 + 3, h] > 0)",
    "beside and": "mask = causal and (i - j > 2 and t[j + 3, h] > 0 or i == j)",
    "large blocks": "score = where(i // 1000 > j // 1000, s + t[j // 1000 * 1000 + 999, h], s)",
    "far back": "mask = i - j >= 64; score = s + t[j + 64, h]",
    "data beside it": "mask = causal and (t[i, h] > 0 or i == j); score = s + t[j - 2, h]",
    "its mirror": "score = s + t[-j, h]",
    "in weights": "weights = p * t[j // 3 * 3, h]",
    "over the row": "weights = p / sum_keys(p * t[j // 3 * 3, h])",
    "of rows": "out = rows(o, p * t[j - 1, h]) | merge | linear",
}
MAYBE = {
    "the end of its block": "score = s + t[j // 4 * 4 + 3, h]",
    "the next": "score = s + t[j + 1, h]",
    "twice as far": "score = s + t[2 * j, h]",
    "twice as far, later on": "score = s + t[max(j, 2 * j - 1000), h]",
    "a fixed token": "score = s + t[max(j, 3), h]",
    "in a mask": "mask = causal and (t[j + 2, h] > 0 or i == j)",
    "in the other choice": "score = where(i // 4 == j // 4, s + t[j // 4 * 4 + 3, h], s)",
    "blocks of another size": "score = where(i // 3 > j // 3, s + t[j // 4 * 4 + 3, h], s)",
    "one step short": "mask = i - j >= 63; score = s + t[j + 64, h]",
    "large blocks": "score = where(i // 1000 > j // 1000, s + t[j // 1000 * 1000 + 1001, h], s)",
    "chosen by data": "score = where(t[i, h] > 0, s + t[j + 1, h], s)",
    "over a row that was chosen": (
        "weights = where(i // 4 > j // 4, sum_keys(p * t[j // 4 * 4 + 3, h]), p)"
    ),
    "in a normaliser": "normalize = exp(s + t[j + 1, h]) / sum",
    "in a similarity": "similarity = dot(q, k) + t[j + 1, h]",
    "of rows": "out = rows(o, p * t[j + 1, h]) | merge | linear",
    "in a branch": "branch b { score = s + t[j + 1, h] }; out = b | merge | linear",
}  # fmt: skip


def made(body: str) -> tuple[Block, list[str]]:
    mask = "" if body.startswith("mask") else "mask = causal; "
    text = f"block a {{ width = 8; heads = 2; let t = x | linear(heads); {mask}{body} }}"
    arch = check(parse(text))
    return arch.blocks["a"], [each.code for each in arch.warnings]


@pytest.mark.parametrize("name", NEVER)
def test_it_is_never_later(name: str) -> None:
    block, warnings = made(NEVER[name])
    assert obstacle(block) is None
    assert warnings == []


@pytest.mark.parametrize("name", MAYBE)
def test_it_may_be_later(name: str) -> None:
    block, warnings = made(MAYBE[name])
    assert "may read a token after its query" in str(obstacle(block))
    assert warnings == ["W006"]


@pytest.mark.parametrize("name", ["the end of its block", "in a mask", "of rows"])
def test_what_is_flagged_leaks(name: str) -> None:
    block, _ = made(MAYBE[name])
    assert leaks(block)


@pytest.mark.parametrize("name", ["beside or", "chosen by where", "over the row", "of rows"])
def test_what_is_not_flagged_does_not_leak(name: str) -> None:
    block, _ = made(NEVER[name])
    assert not leaks(block)


def leaks(block: Block) -> bool:
    """Say whether an output changes with a token after it."""
    module = reference(block, dtype=torch.float64)
    x = torch.randn(1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = module(x)
    for t in range(1, 9):
        changed = x.clone()
        changed[:, t] += 3
        if not torch.allclose(module(changed)[:, :t], before[:, :t], rtol=0, atol=1e-12):
            return True
    return False


def test_a_mask_that_sees_later_keys_is_not_warned_of() -> None:
    block, warnings = made("mask = window(3); score = s + t[j + 1, h]")
    assert obstacle(block) == "its mask lets a query see later keys"
    assert warnings == []


def test_a_context_is_all_there() -> None:
    text = "block a { width = 8; heads = 2; source = context; let t = context | linear(heads); "
    arch = check(parse(f"{text} score = s + t[j + 1, h] }}"))
    assert obstacle(arch.blocks["a"]) is None
    assert arch.warnings == ()


def test_the_warning_shows_the_read_and_explain_the_obstacle() -> None:
    text = (
        "block a { heads = 2; mask = causal; let t = x | linear(heads); "
        "score = s + t[j // 4 * 4 + 3, h] }"
    )
    arch = hl.load(text, format="loom")
    (warning,) = arch.warnings
    assert text[warning.span.start : warning.span.end] == "t[j // 4 * 4 + 3, h]"
    (lowering,) = hl.explain(arch, backend="torch").lowerings
    said = "`t[j // 4 * 4 + 3, h]` may read a token after its query"
    assert dict(lowering.obstacles)["decoding"] == said
    with pytest.raises(ValueError, match="may read a token after its query"):
        hl.compile(arch).init_cache(1, 4)
