"""Learned tokens in front of each sequence: seen by all, and gone before the head."""

from __future__ import annotations

import pytest
import torch

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Model, Pairwise
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.verify import verify
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse
from headloom.grammar.show import show

from .battery import compiled, oracle

TEXT = """
block near { heads = 2; mask = causal and window(4); position = rope }
block full { heads = 2; mask = causal; position = rope }
block state { heads = 2; mask = causal; mix = gated_delta; k = x | linear | split | l2_norm }
block conv { heads = 2; mask = causal; k = x | linear | conv(3) | split }
block around { heads = 2; mask = window(3) }
block papers { heads = 2; mask = causal and window(3) and document }
block marked { heads = 2; mask = causal; score = where(doc[i] == doc[j], s, s / 2) }
block cross { heads = 2; source = context }
block strict { heads = 2; mask = causal; let w = x | linear | split; v = w - u
               branch u { mask = j < i and window(4) } }
block mapped { heads = 4; mask = causal; grid = (2, 3); score = s + row(i) - row(j) }
layer down(part) { out = x + (x | norm | part) }
layer up(part) { out = x + (x | norm | part) + at(0).out }
layer lane(part) { let y = x | sum_heads | norm | part; out = x + (y | repeat(lanes)) }
layer embedding(part) { out = x + (x | part) + (tokens | embed(16)) }
model far { vocab = 7; width = 12; memory = 3; layers = [around]; head = none }
"""
MODELS = {
    "windows": "vocab = 9; memory = 3; layers = [near, full]",
    "states": "memory = 2; layers = [state, conv, near]; embed_position = learned(40)",
    "a class": "memory = 2; layers = [around]; head = classify(3)",
    "a context": "vocab = 7; memory = 2; layers = [near, cross]; encoder = far",
    "lanes": "vocab = 9; memory = 2; lanes = 2; layers = [lane(near), lane(full)]",
    "depth": "vocab = 9; memory = 2; layers = [down(near), down(full), up(near)]",
    "documents": "memory = 2; layers = [papers, near]",
    "marks": "memory = 2; layers = [marked, papers]",
    "values of themselves": "memory = 2; layers = [strict]",
}  # fmt: skip


def model(settings: str) -> Model:
    return check(parse(f"{TEXT}model m {{ width = 16; {settings} }}")).models["m"]


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_is_its_meaning(name: str) -> None:
    what = model(MODELS[name])
    assert [each for each in verify(what) if each.ok is False] == []
    module = build_module(what, Target("torch"), dtype="float64", seed=0)
    assert module.state_dict().keys() == reference(what).state_dict().keys()
    assert cost(what).params == sum(each.numel() for each in module.parameters())


def test_memory_is_tokens_in_front() -> None:
    what, plain = model("memory = 3; layers = [full, state]"), model("layers = [full, state]")
    one, two = (reference(each, dtype=torch.float64) for each in (what, plain))
    memory = one.state_dict()["memory"]
    two.load_state_dict({k: v for k, v in one.state_dict().items() if k != "memory"})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    whole = torch.cat([memory.expand(2, -1, -1), x], 1)
    torch.testing.assert_close(one(x), two(whole)[:, 3:])


def test_a_cache_holds_the_memory_too() -> None:
    what = model("memory = 3; layers = [full, full]")
    module = compiled(what)
    cache = module.init_cache(2, 8)
    assert sum(each.nbytes for each in cache) == 2 * cost(what).cache_bytes(8, "float64")
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    module(x[:, :4], attention_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [2, 4]
    cache.reset([0])
    module(x[:, 4:], cache=cache)
    assert cache.lengths.tolist() == [4, 8]
    with pytest.raises(ValueError, match="the cache holds 8 tokens"):
        module(x[:, :1], cache=cache)
    cache.crop(2)
    got = module(x[:, :3], cache=cache)
    alone = oracle(what, module)(torch.cat([x[:1, 4:6], x[:1, :3]], 1))
    torch.testing.assert_close(got[0], alone[0, 2:])


def test_positions_count_from_behind_the_memory() -> None:
    what = model("memory = 2; layers = [near]")
    module, x = compiled(what), torch.randn(2, 5, 16, dtype=torch.float64)
    positions = torch.stack([torch.arange(5), 2 * torch.arange(5)])
    got = module(x, positions=positions)
    torch.testing.assert_close(got, oracle(what, module)(x, positions=positions))
    torch.testing.assert_close(got[0], module(x)[0])


@pytest.mark.parametrize(
    ("block", "mask"),
    [
        ("full", "j <= i"),
        ("near", "j <= i and abs(i - j) < 4 or j < 2 and j <= i"),
        ("around", "abs(i - j) < 3 or j < 2"),
        ("papers", "(j <= i and abs(i - j) < 3 or j < 2 and j <= i) and doc[i] == doc[j]"),
    ],
)
def test_masks_show_the_memory(block: str, mask: str) -> None:
    (use,) = model(f"memory = 2; layers = [{block}]").uses
    (mixing,) = use.mixings.values()
    assert isinstance(mixing.mix, Pairwise)
    assert show(mixing.mix.mask) == mask


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_with_memory_can_be_traced(backend: str) -> None:
    what = model("vocab = 9; memory = 2; layers = [near, full]")
    module = build_module(what, Target(backend), dtype="float32", seed=0).eval()
    tokens = torch.randint(9, (2, 6))
    expected = module(tokens)
    torch._dynamo.reset()
    whole = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ("memory = 2; layers = [mapped]", "L226", "(2, 3)"),
        ("vocab = 9; memory = 2; layers = [embedding(near)]", "L224", "tokens"),
        ("memory = 0; layers = [near]", "L203", "0"),
    ],
)
def test_what_is_refused(settings: str, code: str, words: str) -> None:
    text = f"{TEXT}model m {{ width = 16; {settings} }}"
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    problem = caught.value.diagnostics[0]
    assert (problem.code, text[problem.span.start : problem.span.end]) == (code, words)
