"""What a block says is what its holes may read."""

from __future__ import annotations

from headloom.grammar.parse import parse
from headloom.search.reads import reads


def test_a_tensor_that_training_moves_is_read_as_any_other():
    plain = "block b { heads = 2; param t[heads] = 0; score = s + any(bias) }"
    moved = plain.replace("; score", "; t <- 0.5 * t; score")
    one, two = (reads((parse(text).items[0].body,)) for text in (plain, moved))
    assert one == two
    assert [production.name for _, production in two] == ["t"]
