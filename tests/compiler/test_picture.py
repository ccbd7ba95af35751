"""Pictures of masks: what is pooled is drawn in no square, and stands in the way of none."""

from __future__ import annotations

import headloom as hl
from headloom.compiler.algebra.points import visible_pairs
from headloom.compiler.model import Block
from headloom.compiler.reports.picture import mask_picture

POOLED = """
block a {
  heads = 2; width = 8
  k = (x | linear | split) | pool(mean, size = 4)
  v = (x | linear | split) | pool(mean, size = 4)
  mask = 4 * j + 3 <= i
}
"""


def test_queries_see_whole_groups_that_have_passed() -> None:
    what = hl.load(POOLED, format="loom").blocks["a"]
    assert isinstance(what, Block)
    mixing = what.mixings["o"]
    seen = visible_pairs(mixing, 10, 10)
    assert seen is not None
    assert seen.shape == (1, 10, 3)
    assert seen[0].sum(1).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert mask_picture(mixing) == []
