"""What is drawn shares what its space shares."""

from __future__ import annotations

from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse
from headloom.search.choosers import First
from headloom.search.space import draw

SPACE = """
let wide = once(swiglu(choose(1, 2)))
block a(w = 4) { heads = 2; mask = causal and window(w) }
model probe {
  width = 16; ffn = wide
  let core = once(choose(a(2), a(8)))
  layers = [pre(core, wide), pre(core, none)] + each(2, a(integer(2..9)))
}
"""


def test_a_drawn_text_says_once_where_the_space_does() -> None:
    drawn = draw(parse(SPACE), First())
    text = format_loom(drawn)
    assert text.count("once(") == 2
    what = check(parse(text)).models["probe"]
    apart = text.replace("once(swiglu(1))", "swiglu(1)").replace("once(a(2))", "a(2)")
    assert cost(check(parse(apart)).models["probe"]).params > cost(what).params
    assert format_loom(parse(text)) == text
