from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headloom.compiler.checking.check import check
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse
from headloom.search.choosers import First, Random
from headloom.search.space import alternatives, draw, has_holes, holes, size

BLOCKS = """
block base { heads = choose(2, 4, weights = [3, 1]); mask = causal }
block global : base { q = x | linear | split | maybe(rms_norm) | choose(rope, identity) }
block local(w) : base { mask = causal and window(w) and maybe(sink(pow2(1..4))) }
block delta { heads = 2; mask = causal; mix = gated_delta }
block unused { heads = choose(1, 2) }
"""
SPACE = parse(
    BLOCKS
    + """
model probe {
  let w = pow2(16..64)
  vocab = 64; width = 32; dropout = maybe(uniform(0..0.5)); ffn = none
  layers = each(2, choose(local(w), global, delta)) + each(1, local(w = pow2(2..4)))
}
search { model = probe; task = mqar; maximize = accuracy
  train = adamw(lr = loguniform(1e-4..1e-2)) }
"""
)


def model(
    layers: str, lets: str = "", blocks: str = "block a { heads = 2 }\nblock b { heads = 4 }"
):
    return parse(f"{lets}\n{blocks}\nmodel m {{ width = 8; layers = {layers} }}\n")


def drawn(file, chooser=None) -> str:
    return format_loom(draw(file, chooser or First()))


# ── drawing ──────────────────────────────────────────────────────────────────────────────


LAYERED = parse("""
block a { heads = 2; mask = causal }
stage opened(c) { param g[features] = 1;  g * tanh(c * x) }
layer mine(attn, ffn) { param g = uniform(0.1..1)
  out = x + g * (x | norm | choose(attn, ffn)) + (x | norm | ffn) }
model m {
  width = 16; lanes = none
  layer  = choose(pre, sandwich, parallel, mine)
  ffn    = choose(swiglu(2), gelu(integer(1..3)), none)
  norm   = choose(rms, layer, opened(uniform(0.5..2)))
  layers = each(2, choose(a, pre(a, none), maybe(gelu(2)))) + loop(integer(1..3), [a])
}
""")


@pytest.mark.parametrize("seed", range(12))
def test_layers_and_what_they_are_made_of_are_drawn(seed):
    file = draw(LAYERED, Random(seed))
    assert not has_holes(file)
    assert parse(format_loom(file)) == file
    assert 1 <= len(check(file).models["m"].layers) <= 3


@given(st.integers(0, 10**9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_draw_prints_parses_and_checks(seed):
    file = draw(SPACE, Random(seed))
    assert not has_holes(file)
    assert parse(format_loom(file)) == file
    assert list(check(file).models) == ["probe"]


def test_weights_of_levels_may_be_drawn():
    mixer = """mix m {
  let lam = x | linear(heads * choose(3, 5)) | split
  state S[head_dim] = 0 by choose(exp(lam), lam)
  S <- S + k
  o <- q * S
}
"""
    file = model("[a]", mixer, "block a { heads = 2; mix = m; mask = causal }")
    text = drawn(file)
    assert "heads * 3" in text
    assert "= 0 by exp(lam)" in text
    assert not has_holes(parse(text))


def test_a_draw_keeps_only_what_the_model_uses():
    names = [each.name for each in draw(SPACE, First()).items]
    assert names == ["base", "local", "probe"]


def test_the_same_seed_draws_the_same():
    assert draw(SPACE, Random(7)) == draw(SPACE, Random(7))
    assert len({drawn(SPACE, Random(seed)) for seed in range(20)}) > 5


def test_names_of_draws_follow_the_text():
    assert [each.name for each in holes(SPACE)] == [
        "base.heads",
        "global.q[2]",
        "global.q[3]",
        "local.mask",
        "local.mask.sink",
        "unused.heads",
        "probe.dropout",
        "probe.dropout[0]",
        "probe.layers[0]",
        "probe.w",
        "probe.layers[1]",
        "probe.layers[2].local.w",
        "search.train.lr",
    ]


def test_a_hole_in_a_choice_that_is_not_taken_is_never_drawn():
    asked = []

    class Asked(First):
        def category(self, name, *_):
            asked.append(name)
            return 1 if name == "m.layers[0]" else 0

    draw(model("each(1, choose(a(pow2(2..8)), b))", "let w = pow2(1..4)"), Asked())
    assert asked == ["m.layers[0]"]


def test_a_let_is_drawn_once_and_each_draws_anew():
    file = model(
        "each(6, a(w)) + each(6, a(pow2(1..1024)))",
        "let w = pow2(1..1024)",
        "block a(h) { heads = h }",
    )
    layers = next(
        each.value for each in draw(file, Random(1)).items[-1].body if each.name == "layers"
    )
    values = [each.args[0].value for each in layers.items]
    assert len(set(values[:6])) == 1
    assert len(set(values[6:])) > 1


def test_a_repeated_list_is_drawn_once():
    assert "[b] * 3" in drawn(model("[choose(b, a)] * 3"))


def test_what_may_be_left_out():
    class Absent(First):
        def category(self, _, choices, *__):
            return len(choices) - 1

    file = model(
        "[a, maybe(b)]",
        blocks="""
block a { dropout = maybe(0.1); mask = causal and maybe(window(4)); q = x | maybe(linear) | split
          position = rope(theta = maybe(1e6)) }
block b { heads = 4 }""",
    )
    text = drawn(file, Absent())
    assert "dropout" not in text
    assert "mask     = causal\n" in text
    assert "q        = x | split" in text
    assert "position = rope()" in text
    assert "layers = [a]" in text


def test_arithmetic_of_drawn_numbers_is_worked_out():
    text = drawn(model("[a(2 * w)]", "let w = integer(3..3)", "block a(h) { heads = h }"))
    assert "a(6)" in text


def test_a_model_that_inherits_may_change_what_is_drawn():
    file = parse("""
block a(h) { heads = h }
model small(n = 1) { let h = pow2(2..8); width = 8; layers = [a(h)] * n }
model large : small(n = 3) { let h = 8 }
search { model = large; task = mqar; maximize = accuracy }
""")
    text = drawn(file)
    assert "layers = [a(8)] * 3" in text
    assert "model small" not in text
    assert ":" not in text


def test_bounds_may_read_what_is_drawn():
    file = model(
        "[a(w, pow2(1..w))]", "let w = pow2(4..8)", "block a(h, g) { heads = h; kv_heads = g }"
    )
    assert {each.name for each in holes(file)} == {
        "w",
        "m.layers[0].a.g(1..4)",
        "m.layers[0].a.g(1..8)",
    }


# ── every alternative, and how many ──────────────────────────────────────────────────────


def test_every_alternative_occurs():
    files = list(alternatives(SPACE))
    text = "".join(map(format_loom, files))
    for each in (
        "rms_norm",
        "sink(4)",
        "identity",
        "local(64)",
        "local(w = 2)",
        "dropout = 0.5",
        "dropout = 0.0",
        "heads = 1",
        "heads = 4",
    ):
        assert each.replace(" ", "") in text.replace(" ", "")
    assert len(files) == len(set(files)) <= sum(len(each.choices) for each in holes(SPACE))
    for file in files:
        assert not has_holes(file)
        check(parse(format_loom(file)))


@pytest.mark.parametrize(
    ("layers", "lets", "count"),
    [
        ("[a, b]", "", 1),
        ("each(3, choose(a, b))", "", 8),
        ("[choose(a, b)] * 3", "", 2),
        ("[choose(a, maybe(b))]", "", 3),
        ("each(2, choose(a(w), b))", "let w = pow2(16..256)", 16),
        ("each(integer(1..3), choose(a, b))", "", 14),
        ("[a(uniform(0..1))]", "", None),
        ("[a(pow2(1..w))]", "let w = pow2(4..8)", None),
    ],
)
def test_size_counts_the_draws(layers, lets, count):
    file = model(layers, lets)
    assert size(file) == count
    if count is not None:
        seen = {draw(file, Random(seed)) for seed in range(400)}
        assert len(seen) <= count
        assert len(seen) == count or count > 10


def test_holes_of_a_block_count_once_and_only_where_it_is_used():
    blocks = (
        "block a { heads = choose(1, 2, 4) }\nblock b : a { mask = causal }\n"
        "block c { heads = 2; dropout = maybe(0.1) }"
    )
    file = model("each(2, choose(a, b, c))", blocks=blocks)
    file = parse(format_loom(file) + "search { model = m; task = mqar; maximize = accuracy }\n")
    # 4 pairs without c, 1 with c alone, 4 with both
    assert size(file) == 4 * 3 + 1 * 2 + 4 * 6
    seen = {draw(file, Random(seed)) for seed in range(2000)}
    assert len(seen) == 38


def test_what_cannot_be_drawn_is_refused_with_its_place():
    with pytest.raises(LoomError) as caught:
        draw(parse("block a {\n  heads = pow2(5..7)\n}"), First())
    assert caught.value.diagnostics[0].span.where == "<text>:2:16"


def test_a_space_is_light():
    code = (
        "import sys; import headloom.search.space, headloom.search.plan; "
        "print([m for m in ('torch', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_kept():
    file = model("[a]", blocks="block a { heads = choose(1, 2, weights = [1, 0]) }")
    assert {drawn(file, Random(seed)) for seed in range(20)} == {drawn(file)}
    assert list(islice(alternatives(file), 3))[1:]
