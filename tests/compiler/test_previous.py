"""Layers that read the layer below, models with an encoder, blocks that cannot be layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import block as block_of
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Model
from headloom.compiler.pipeline import generate, plans
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.verify import subjects, verify
from headloom.grammar.diagnostics import Diagnostic, LoomError
from headloom.grammar.parse import parse

from .battery import compiled, oracle
from .test_compile import gradients

BLOCKS = """
block full { heads = 4; kv_heads = 2; mask = causal }
block near { heads = 4; mask = causal and window(3); position = rope }
block reader : full { k = previous.k; v = previous.v }
block again : near { k = previous.k; v = previous.v; mask = causal and (window(5) or sink(2)) }
block keys : near { k = previous.k; mask = causal }
block thin : reader { mask = causal and window(2) }
block twice : near { let below = previous.k; k = below; v = below }
block further : full { k = previous.k | linear | silu; v = previous.v }
block papers : near { mask = causal and document }
block paper : papers { k = previous.k; v = previous.v }
block residual : near { score = s + previous.s }
block reused : near { weights = previous.p }
block both : near { score = s + 0.5 * previous.s; weights = 0.5 * p + previous.p }
block edited : near { score = s - abs(i - j) / 9; weights = 2 * p; normalize = sigmoid }
block gated : full { let g = x | linear(heads) | sigmoid; let t = x | linear(1); score = s + t[j] }
block gates : reader { let g = previous.g; let t = previous.t; out = o | gate(g) | merge | linear
                       score = s - t[j] }
block added : full { out = (o + previous.o) | merge | linear }
block queries : full { kv_heads = 4; q = previous.q; k = previous.q; score = s + previous_k[j]
                       let previous_k = x | linear(1) }
block halves { heads = 4; mask = causal; branch other { mask = causal and window(2)
               k = x | linear | split; v = x | linear | split }
               out = (o + other) | merge | linear }
block half { heads = 4; mask = causal and window(4); k = previous.other_k; v = previous.other_v
             branch other { k = previous.k; v = previous.v }; out = (o - other) | merge | linear }
block late { heads = 4; mask = causal; branch other { v = x | linear | split }; v = other
             out = o | merge | linear }
block sums : near { k = previous.k; v = previous.v; score = s - 0.1 * running_keys(s) }
block delta { heads = 4; mask = causal; let w = x | linear | split; v = w - u
              branch u { mask = j < i } }
block rest { heads = 4; mask = causal; k = previous.k; v = previous.w }
block state { heads = 4; mix = gated_delta; mask = causal }
block of_state { heads = 4; mix = gated_delta; mask = causal; k = previous.k | l2_norm
                 v = previous.v }
block conv { heads = 4; mask = causal; kv_heads = 2; v = previous.v | conv(3) }
block cross { heads = 4; source = context }
block crossed : cross { k = previous.k; v = previous.v }
block names { heads = 4; mask = causal; let y = x | linear; let shared = x | linear; k = y | split
              out = (y + shared) | linear }
block named { heads = 4; mask = causal; v = previous.y | split; let out_ = previous.shared
              out = (o | merge) + out_ }
"""
MODELS = {
    "two": "[full, reader] * 2",
    "three": "[full, reader, reader]",
    "windows": "[near, again, again, near]",
    "narrow": "[full, reader, thin]",
    "keys": "[near, keys, keys]",
    "further": "[full, further, further]",
    "documents": "[papers, paper, paper]",
    "documents_above": "[near, paper]",
    "residual": "[near, residual, residual]",
    "residual_of_window": "[near, residual, again]",
    "reused": "[near, reused, reused]",
    "both": "[edited, both]",
    "gates": "[gated, gates]",
    "added": "[full, added, added]",
    "queries": "[full, queries]",
    "branches": "[halves, half]",
    "branches_twice": "[halves, half, reader_of_half]",
    "late": "[full, late, reader_of_late]",
    "running": "[near, sums]",
    "values_of_themselves": "[delta, rest]",
    "states": "[state, of_state, state]",
    "conv": "[full, conv, conv]",
    "cross": "[cross, crossed, full]",
    "names": "[names, named]",
    "keys_as_values": "[papers, twice, again]",
}
MORE = """
block reader_of_half { heads = 4; mask = causal; k = previous.k; v = previous.v }
block reader_of_late { heads = 4; mask = causal; k = previous.k; v = previous.v }
"""


def model(layers: str, rest: str = "", blocks: str = "") -> Model:
    text = f"{BLOCKS}{MORE}{blocks}\nmodel m {{ width = 16; layers = {layers}; {rest} }}\n"
    return check(parse(text)).models["m"]


def found(text: str) -> list[Diagnostic]:
    try:
        return list(check(parse(text)).warnings)
    except LoomError as problem:
        return list(problem.diagnostics)


def contexts(what: Model, context: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the context as an argument of a model that reads one."""
    return {"context": context} if any(each.context_width for each in what.uses) else {}


def kept(what: Model, length: int) -> int:
    module = compiled(what)
    cache = module.init_cache(1, length)
    for step in (3, 1, length - 4):
        x = torch.zeros(1, step, 16, dtype=torch.float64)
        module(x, cache=cache, **contexts(what, torch.zeros(1, length, 16, dtype=torch.float64)))
    return sum(each.nbytes for each in cache)


# ── meaning, text, cache ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_read_the_layer_below(name):
    what = model(MODELS[name])
    for finding in verify(what):
        assert finding.ok or finding.check in ("training", "in tiles"), finding
    assert kept(what, 12) == cost(what).cache_bytes(12, "float64")
    assert {each.name for each in subjects(what) if each is not what} == {
        each.name for each in what.uses if not each.below
    }


def test_what_only_the_layer_above_reads_is_not_part_of_a_block_alone():
    text = """
        block lower { heads = 4; mask = causal; let g = x | linear(heads) | sigmoid }
        block upper : lower { out = o | gate(previous.g) | merge | linear }
        model m { width = 32; layers = [lower, upper] }
    """
    what = check(parse(text)).models["m"]
    alone, whole = subjects(what)
    assert whole is what
    assert "g" not in {each.name for each in alone.streams}
    assert all(each.ok is not False for each in verify(alone))


@pytest.mark.parametrize("name", ["two", "windows", "documents", "gates", "branches", "cross"])
def test_a_reader_keeps_nothing_of_its_own(name):
    what = model(MODELS[name])
    module = compiled(what)
    for block, cache in zip(what.uses, module.init_cache(1, 8), strict=True):
        assert not block.below or cache.nbytes == 0


def test_the_cache_is_as_wide_as_the_widest_reader():
    cache = compiled(model(MODELS["windows"])).init_cache(1, 99)
    assert cache[0].kept["k"].shape == (1, 4, 5 + 2, 4)
    assert cache[3].kept["k"].shape == (1, 4, 3, 4)


def test_layers_that_share_a_map_keep_the_same_tokens():
    cache = compiled(model("[near, residual, again]")).init_cache(1, 99)
    assert [each.kept["k"].shape[2] if "k" in each.kept else 0 for each in cache] == [7, 7, 0]


def test_positions_may_be_given():
    what = model(MODELS["windows"])
    module, x = compiled(what), torch.randn(2, 9, 16, dtype=torch.float64)
    positions = torch.stack([torch.arange(9), torch.arange(9) * 2 + 3])
    torch.testing.assert_close(
        module(x, positions=positions), oracle(what, module)(x, positions=positions)
    )


@pytest.mark.parametrize(
    ("name", "kernels"), [("two", 2), ("windows", 4), ("residual", 0), ("gates", 1)]
)
def test_kernels_and_texts_beside_them(name, kernels):
    what = model(MODELS[name])
    assert generate(what, Target("triton")).text.count("_attention(\n") >= kernels
    paths = [
        each.path for plan in plans(what, Target("triton")) for each in plan.lowerings.values()
    ]
    assert paths.count("triton") == kernels
    module = build_module(what, Target("triton"), dtype=torch.float32, seed=0).eval()
    meaning = reference(what)
    meaning.load_state_dict(module.state_dict())
    x = torch.randn(2, 20, 16)
    mine, theirs = gradients(module, {"x": x}), gradients(meaning, {"x": x})
    for key, each in mine.items():
        torch.testing.assert_close(each, theirs[key], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["two", "residual", "cross"])
def test_what_pytorch_does_with_modules(name):
    what = model(MODELS[name])
    module = compiled(what)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    given = {"x": x, **contexts(what, x[:, :4])}
    y = module(**given)
    torch._dynamo.reset()
    whole = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(**given), y)
    program = torch.export.export(module, (), given)
    torch.testing.assert_close(program.module()(**given), y)


def test_layers_can_be_computed_again_for_the_gradient():
    module, x = compiled(model(MODELS["windows"])), torch.randn(1, 9, 16, dtype=torch.float64)
    wanted = list(module.parameters())
    expected = torch.autograd.grad(module(x).sin().sum(), wanted)
    for layer in module.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    got = torch.autograd.grad(module(x).sin().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_who_reads_a_map_is_said():
    first, *_ = plans(model(MODELS["residual"]), Target("triton"))
    assert ("triton", "a layer above reads its map") in first.lowerings["o"].obstacles


def test_a_block_that_reads_nothing_is_the_same_everywhere():
    what = model("[full, full]")
    assert what.uses[0] == block_of(check(parse(BLOCKS + MORE)), "full", 16)


# ── identities ───────────────────────────────────────────────────────────────────────────


def test_readers_compute_with_the_keys_and_values_of_layer_zero():
    shared, ordinary = model("[full, reader]"), model("[full, full]")
    mine, theirs = reference(shared, dtype=torch.float64), reference(ordinary, dtype=torch.float64)
    theirs.load_state_dict(mine.state_dict(), strict=False)
    lower, upper = (theirs.get_submodule(f"layers.{at}.attn") for at in (0, 1))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    _, made = lower.layer(functional.rms_norm(x, (16,), eps=1e-6), ())
    plain = upper._flow

    def pretending(flow, given, *done):
        by_name = {upper.architecture.stream(name).flow: made[name] for name in ("k", "v")}
        return by_name[flow] if flow in by_name else plain(flow, given, *done)

    upper._flow = pretending
    torch.testing.assert_close(theirs(x), mine(x), rtol=0, atol=0)


def test_sharing_with_oneself_is_an_ordinary_model():
    texts = (
        "block a { heads = 4; mask = causal }",
        "block a { heads = 4; mask = causal }\nblock r : a { k = previous.k; v = previous.v }",
    )
    one, other = (
        check(parse(f"{text}\nmodel m {{ width = 16; layers = [a] * 2 }}")).models["m"]
        for text in texts
    )
    assert one == other
    assert generate(one, Target()) == generate(other, Target())


def test_a_map_used_again_is_the_map():
    what = model("[near, reused]")
    meaning = reference(what, dtype=torch.float64)
    with torch.no_grad():
        x = torch.randn(1, 6, 16, dtype=torch.float64)
        before = meaning(x)
        for part in ("q_proj", "k_proj"):
            meaning.get_parameter(f"layers.1.attn.{part}.weight").mul_(3)
        assert torch.equal(meaning(x), before)


# ── findings ─────────────────────────────────────────────────────────────────────────────

A = "block a { heads = 4; mask = causal }\n"
WRONG = {
    "lowest": (A + "block b : a { k = previous.k }\nmodel m { width = 8; layers = [b, a] }", "L224",
               "previous.k", "it is layer 0 of `m`, the lowest"),
    "lowest by a score": ("score r = s + previous.s\nblock b { heads = 4; score = r }\n"
                          "model m { width = 8; layers = [b, b] }", "L224", "previous.s",
                          "it is layer 0 of `m`, the lowest"),
    "no such stream": (A + "block b { heads = 4; k = previous.key }\n"
                       "model m { width = 8; layers = [a, b] }", "L201", "previous.key",
                       "it is `a`"),
    "the input": (A + "block b { heads = 4; k = previous.context }\n"
                  "model m { width = 8; layers = [a, b] }", "L201", "previous.context",
                  "it is `a`"),
    "a map as a stream": (A + "block b { heads = 4; k = previous.p }\n"
                          "model m { width = 8; layers = [a, b] }", "L208", "previous.p", ""),
    "a stream in a score": (A + "block b { heads = 4; score = s + previous.k }\n"
                            "model m { width = 8; layers = [a, b] }", "L214", "previous.k", ""),
    "another shape": (A + "block b { heads = 2; k = previous.k }\n"
                      "model m { width = 8; layers = [a, b] }", "L207", "previous.k",
                      "it is [4, n, 2], needed is [2, n, 4]"),
    "other heads": (A + "block b : a { heads = 2; weights = previous.p }\n"
                    "model m { width = 8; layers = [a, b] }", "L225", "previous.p",
                    "heads = 2, and 4 in `a`"),
    "another mask": (A + "block b : a { mask = all; score = s + previous.s }\n"
                     "model m { width = 8; layers = [a, b] }", "L225", "s + previous.s",
                     "mask = true, and j <= i in `a`"),
    "no map": ("block a { heads = 4; mix = linear; mask = causal }\n"
               "block b { heads = 4; mask = causal; score = s + previous.s }\n"
               "model m { width = 8; layers = [a, b] }", "L225", "s + previous.s",
               "`a` is not attention of queries and keys"),
    "masks of streams": ("block a { heads = 4; let g = x | linear(1); mask = g[j] > 0 }\n"
                         "block b : a { score = s + previous.s }\n"
                         "model m { width = 8; layers = [a, b] }", "L225", "s + previous.s",
                         "the mask reads streams or tensors, of which each layer has its own"),
    "latents as a layer": ("block a { heads = 4; q = latents(3) | linear | split }\n"
                           "model m { width = 8; layers = [a] }", "L226", "a",
                           "its output is [3, 8], a layer's [n, 8]"),
    "a head": (A + "model e { vocab = 4; width = 8; layers = [a] }\n"
               "model m { width = 8; layers = [a]; encoder = e }", "L227", "e",
               "the head of `e` gives [n, 4], needed is [n, 8]"),
    "a context": ("block a { heads = 4; source = context }\n"
                  "model e { width = 8; layers = [a] }\n"
                  "model m { width = 8; layers = [a]; encoder = e }", "L227", "e",
                  "a layer of `e` reads one"),
    "a ring": (A + "model m { width = 8; layers = [a]; encoder = m }", "L212", "m", "m → m"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    text, code, words, label = WRONG[name]
    (problem,) = {(each.code, each.span, each.label): each for each in found(text)}.values()
    assert problem.code == code
    assert text[problem.span.start : problem.span.end] == words
    assert problem.label == label


def test_a_block_above_others_may_be_in_the_file():
    text = A + "block b : a { k = previous.k }\n"
    assert [each.code for each in found(text)] == ["W004"]
    arch = check(parse(text + "model m { width = 8; layers = [a, b] }"))
    assert (set(arch.blocks), arch.warnings) == ({"a"}, ())
    with pytest.raises(LoomError, match="no layer below"):
        block_of(arch, "b", 8)
    wrong = found(A + "block b : a { k = previous.k; mask = casual }")
    assert [each.code for each in wrong] == ["L201"]


def test_latents_may_stand_alone():
    what = block_of(check(parse("block a { heads = 4; q = latents(3) | linear | split }")), "a", 16)
    module = compiled(what)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert module(x).shape == (2, 3, 16)
    torch.testing.assert_close(module(x), oracle(what, module)(x))


def test_a_let_for_the_layer_above_is_used():
    text = A + "block c : a { let g = x | linear }\nblock b : a { out = previous.g }\n"
    assert found(text + "model m { width = 8; layers = [c, b] }") == []


# ── encoders ─────────────────────────────────────────────────────────────────────────────

ENCODERS = {
    "tokens": "vocab = 9; width = 24; layers = [both_ways] * 2; head = none; norm = layer",
    "features": "width = 12; layers = [both_ways]; ffn = none; embed_position = sinusoidal",
    "sharing": "vocab = 9; width = 16; layers = [both_ways, read]; head = none; "
               "embed_position = learned(40)",
}  # fmt: skip
ENCODED = """
block both_ways { heads = 2; position = rope }
block read : both_ways { k = previous.k; v = previous.v }
block self { heads = 4; mask = causal; position = rope }
block cross { heads = 2; source = context }
"""


def encoded(name: str, rest: str = "vocab = 7; layers = [self, cross] * 2") -> Model:
    text = f"{ENCODED}\nmodel e {{ {ENCODERS[name]} }}\n"
    return check(parse(f"{text}model m {{ width = 16; encoder = e; {rest} }}")).models["m"]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_the_context(name):
    what = encoded(name)
    module = compiled(what)
    assert cost(what).params == sum(each.numel() for each in module.parameters())
    assert any(key.startswith("encoder.layers.0.attn.") for key in module.state_dict())
    for finding in verify(what):
        assert finding.ok or finding.check in ("training", "in tiles"), finding


def test_an_encoder_runs_once():
    module = compiled(encoded("tokens"))
    runs = []
    module.encoder.register_forward_hook(lambda *_: runs.append(1))
    tokens, context = torch.arange(6)[None], torch.arange(5)[None]
    whole = module(tokens, context=context)
    cache = module.init_cache(1, 6)
    parts = [
        module(tokens[:, :2], context=context, cache=cache),
        module(tokens[:, 2:3], context=context, cache=cache),
        module(tokens[:, 3:], cache=cache),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert len(runs) == 2
    with pytest.raises(ValueError, match=r"`context` is needed: tokens \[b, m\]"):
        module(tokens)


def test_an_encoder_costs_what_it_costs():
    what = encoded("tokens")
    own = encoded("features", "vocab = 7; layers = [self]")
    assert own.encoder is not None
    assert cost(own).cache_bytes(10) == cost(own.uses[0]).cache_bytes(10)
    assert what.encoder is not None
    assert cost(what).flops(10) > cost(what.encoder).flops(10)


def test_an_encoder_that_nothing_reads_is_warned_of():
    text = "block a { heads = 2 }\nmodel e { width = 8; layers = [a] }\n"
    (warning,) = found(text + "model m { width = 8; layers = [a]; encoder = e }")
    assert warning.code == "W002"
