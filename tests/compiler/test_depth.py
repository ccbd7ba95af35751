"""Layers that read any layer below: its blocks, its own streams, what came in and went out."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Model
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.verify import verify
from headloom.grammar.parse import parse

from .battery import compiled
from .test_previous import found, kept

TEXT = """
block full { heads = 4; kv_heads = 2; mask = causal }
block near { heads = 4; mask = causal and window(3); position = rope }
block papers : near { mask = causal and document }
block reader : full { k = previous.k; v = previous.v }
block further : full { k = previous.k | linear | silu; v = previous.v }
block far(e) : full { k = at(e).k; v = at(e).v }
block back(d) : near { k = at(layer - d).k; v = at(layer - d).v; mask = causal and window(6) }
block residual_of_first : full { v = (x | linear(8) | split(2)) + 0.5 * first.v }
block logits(d) : near { score = s + at(layer - d).s; weights = p + 0.1 * at(0).p }
block which : full { k = at(0).one.k; v = at(0).two.v }
block other_of_one : full { k = at(layer - 2).one.k; v = at(layer - 2).one.v }
block of_two : full { k = previous.two.k; v = previous.two.v
                      out = (o + at(0).one.o) | merge | linear }
block gated_by_layer : full { let g = previous.gate; out = (o | merge | gate(g)) | linear }
block of_inputs : full { q = previous.x | linear | split; v = first.out | linear | split }
block marked(e) : papers { k = at(e).k; v = at(e).v; mask = causal and window(3) and document }
block later : full { let k2 = at(layer - 2).k; k = k2; v = at(layer - 2).v }
block third : full { kv_heads = 4; q = previous.pre.attn.q; k = previous.part.q }
block fourth : full { v = at(1).pre.attn.v }
block twice : full { let u = first.v | silu; k = u; v = at(1).v }
layer pair(one, two) { let y = x + (x | norm | one); out = y + (y | norm | two) }
layer with_gate(part) { let gate = x | linear | sigmoid; let two = x | linear
                        out = x + (x | norm | part) + two }
layer down(part) { out = x + (x | norm | part) }
layer up(part) { let z = x | concat(at(depth - 1 - layer).out) | linear(width)
                 out = z + (z | norm | part) + 0.1 * first.x }
layer along(part) { let c = x | conv(2); out = x + (c | norm | part) }
layer inner(part) { out = (x | pre(part, none)) + (x | norm | part) }
ffn reading(r) { let up = x | linear(r); out = up | concat(previous.out) | linear }
"""
MODELS = {
    "any_distance": "[full, near, far(0), further, far(2), back(4)]",
    "windows": "[near, full, back(2), back(1), near]",
    "first": "[full, residual_of_first, residual_of_first]",
    "maps": "[near, near, logits(2), logits(2)]",
    "several_blocks": "[pair(full, full), pre(which, none), pair(which, other_of_one)]",
    "both_of_one_layer": "[pair(full, full), pair(of_two, near)]",
    "of_the_layer": "[with_gate(full), gated_by_layer, of_inputs]",
    "skips": "[down(near), down(full), pre(none, swiglu), up(near), up(full)]",
    "along_tokens": "[along(full), along(reader), down(reader)]",
    "nested": "[full, inner(full), inner(third), fourth]",
    "feed_forwards": "[full, pre(full, reading(8)), pre(none, reading(8))]",
    "documents": "[papers, full, marked(0), marked(2)]",
    "chains": "[full, far(0), later, reader, far(1)]",
    "in_part": "[full, far(0), twice]",
    "loops": "[with_gate(full)] + loop(2, [far(0), reader, with_gate(full), gated_by_layer])",
    "again": "[full, once(down(near)), reader_of_once, once(down(near)), far(0)]",
}


def model(layers: str, more: str = "") -> Model:
    text = f"{TEXT}\n{more}\nmodel m {{ width = 16; layers = {layers} }}\n"
    return check(parse(text)).models["m"]


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_read_layers_below(name: str) -> None:
    what = model(MODELS[name], "block reader_of_once : near { k = previous.k; v = previous.v }")
    for finding in verify(what):
        assert finding.ok or finding.check in ("training", "in tiles"), finding
    assert kept(what, 12) == cost(what).cache_bytes(12, "float64")


@pytest.mark.parametrize(
    ("layers", "keeps"),
    [
        ("[full, near, far(0), far(2)]", [2 * 2 * 4, 2 * 4 * 4, 0, 0]),
        ("[pair(full, full), pair(near, of_two)]", [32, 32]),
        ("[full] + loop(3, [far(0)])", [16, 0, 0, 0]),
    ],
)
def test_keys_are_kept_by_the_layer_that_makes_them(layers: str, keeps: list[int]) -> None:
    cache = compiled(model(layers)).init_cache(1, 2)
    found = [each.nbytes // 8 // 2 for each in cache]
    assert found == keeps


def test_a_value_residual_is_the_formula() -> None:
    what = model("[full, residual_of_first]")
    meaning = reference(what, dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    lower, upper = meaning.layers
    below, made = lower.layer(x, ())
    _, own = upper.layer(below, (made,))
    projected = upper.attn.v_proj.weight
    y = torch.nn.functional.rms_norm(below, (16,), upper.attn_norm.weight, 1e-6)
    mine = (y @ projected.mT).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(own["v"], mine + 0.5 * made["v"])


def test_layers_at_equal_distances_are_one_class() -> None:
    text = generate(model("[near, near] + [back(2)] * 6"), Target()).text
    assert text.count("class Back") == 2  # the last hands nothing on
    text = generate(model("[full, residual_of_first, residual_of_first, near]"), Target()).text
    assert text.count("class ResidualOfFirst") == 1


A = "block a { heads = 4; mask = causal }\nlayer two(p, q) { out = x + (x | p) + (x | q) }\n"
WRONG = {
    "itself": ("k = at(layer).k", "[a, a, b]", "L224", "at(layer).k",
               "it is layer 2, read in layer 2 of `m`"),
    "above": ("k = at(depth).k", "[a, a, b]", "L224", "at(depth).k",
              "it is layer 3, read in layer 2 of `m`"),
    "below the lowest": ("k = at(layer - 3).k", "[a, a, b]", "L224", "at(layer - 3).k",
                         "it is layer -1, read in layer 2 of `m`"),
    "in the lowest": ("k = first.k", "[b, a]", "L224", "first.k",
                      "it is layer 0 of `m`, the lowest"),
    "no stream": ("k = at(1).key", "[a, a, a, b]", "L201", "at(1).key", "it is `a`"),
    "no part": ("k = at(1).atn.k", "[a, a, b]", "L201", "at(1).atn.k", "it is `pre`"),
    "which block": ("k = previous.k", "[two(a, a), b]", "L224", "previous.k",
                    "layer 0, `two`, has 2"),
    "no number": ("k = at(n).k", "[a, b]", "L219", "n", "`n` has no value here"),
    "no whole number": ("k = at(1 / 2).k", "[a, b]", "L219", "1 / 2", "it is 0.5"),
    "other turns": ("k = at(0).k", "[c, d, c, a, d]", "L224", "at(0).k",
                    "layer 0 runs 2 times, at different distances below layer 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    body, layers, code, words, label = WRONG[name]
    lets = "let c = once(a); let d = once(b)"
    text = f"{A}block b : a {{ {body} }}\nmodel m {{ width = 8; {lets}; layers = {layers} }}"
    (problem,) = {(each.code, each.span, each.label): each for each in found(text)}.values()
    assert (problem.code, text[problem.span.start : problem.span.end]) == (code, words)
    assert problem.label == label


def test_a_stream_may_be_called_first() -> None:
    what = model("[full, named_first]", "block named_first : full { let first = x | linear\n"
                 "out = (o | merge | linear) + first }")  # fmt: skip
    assert not what.stacked
