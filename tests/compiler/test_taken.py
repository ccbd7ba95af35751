"""Tokens that a part runs on alone: `take(chosen) | part | put`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.facts.decoding import obstacle
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Model
from headloom.compiler.verify.verify import verify
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

from .battery import compiled

TEXT = """
block near { heads = 2; mask = causal and window(3); position = rope }
block full { heads = 2; mask = causal; position = rope }
block state { heads = 2; mask = causal; mix = gated_delta; 
              k = x | linear | conv(3) | split | l2_norm }
block cross { heads = 2; source = context }
block marked { heads = 2; mask = causal; score = where(doc[i] == doc[j], s, s / 2) }
layer above(part) { let r = x | linear(1)
                    out = x + sigmoid(r) * (x | norm | take(r > 0) | part | put) }
layer several(part) {
  let r = x | linear(1)
  out = x + r * (x | take(r > 0) | norm | part | linear | norm | put)
}
layer shared(part) { out = x + (x | norm | take(r > 0) | once(full) | put); let r = x | linear(1) }
layer of_all(part) { let r = x | linear(1); out = x + r * (x | norm | part) }
layer few_of(part) { let r = x | linear(1); let t = r | largest_tokens(3)
                     out = x + r * (x | take(t) | part | put) }
layer named(part) { let r = x | linear(1); out = x + (x | take(r > 0) | part | put) }
ffn few_linear { out = x | linear }
ffn few { let r = x | linear(1); out = x | take(r > 0) | swiglu(1) | put }
model far { vocab = 7; width = 12; layers = [pre(cross_free, none)]; head = none }
block cross_free { heads = 2 }
ffn known { out = x + (tokens | embed(16)) | linear }
"""
MODELS = {
    "the best of a sequence": "vocab = 9; "
    "layers = [full, routed(near, 0.5), routed(swiglu(1), 0.3)]",
    "by a threshold": "vocab = 9; layers = [above(full), near, above(near)]",
    "several stages": "layers = [several(full), several(state)]",
    "feed-forwards": "vocab = 9; layers = [pre(full, few), above(known)]",
    "within what is taken": "layers = [above(named(full)), above(above(near))]",
    "shared": "layers = [shared(full), shared(full)]",
    "a context": "vocab = 9; layers = [above(cross), near]; encoder = far",
    "marks": "layers = [above(marked), above(full)]",
    "memory": "vocab = 9; memory = 2; layers = [above(full), routed(near, 0.5)]",
    "experts": "vocab = 9; layers = [pre(full, none), above(moe(4, 2, 1))]",
}  # fmt: skip


def model(settings: str) -> Model:
    return check(parse(f"{TEXT}model m {{ width = 16; ffn = none; {settings} }}")).models["m"]


def drawn(what: Model, seed: int = 0) -> nn.Module:
    """Return a compiled model whose scores lie on both sides of 0."""
    module = compiled(what)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(torch.randn(each.shape, generator=generator, dtype=each.dtype) / 3)
    return module.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_is_its_meaning(name: str) -> None:
    what = model(MODELS[name])
    assert [each for each in verify(what) if each.ok is False] == []
    assert cost(what).params == sum(each.numel() for each in compiled(what).parameters())


def test_a_share_of_one_is_the_layer_by_itself() -> None:
    whole = model("layers = [of_all(full)]; vocab = 9")
    some = model("layers = [routed(full, 1)]; vocab = 9")
    one, two = drawn(whole), drawn(some)
    two.load_state_dict(one.state_dict())
    tokens = torch.randint(9, (2, 7))
    torch.testing.assert_close(one(tokens), two(tokens))


def test_a_sequence_by_hand() -> None:
    what = model("layers = [routed(full, 0.5)]; head = x | scale(1)")
    meaning = reference(what, dtype=torch.float64)
    layer = meaning.layers[0]
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    r = x @ layer.get_parameter("r_proj.weight").mT
    best = r[0, :, 0].topk(4).indices.sort().values
    normed = nn.functional.rms_norm(x, (16,), layer.get_parameter("part_norm.weight"), 1e-6)
    y = layer.get_submodule("part")(normed[:, best], positions=best)
    whole = x.clone()
    whole[:, best] += r[:, best] * y
    torch.testing.assert_close(meaning(x), whole)


def stepped(module: nn.Module, x: Tensor, cache: object, sizes: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(each, cache=cache) for each in x.split(sizes, 1)], 1)


def test_a_cache_holds_the_tokens_that_were_taken() -> None:
    module = drawn(model("layers = [above(full)]"))
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    taken = (x @ module.layers[0].r_proj.weight.mT)[..., 0] > 0
    cache = module.init_cache(3)
    whole = stepped(module, x, cache, [4, 1, 1, 3])
    torch.testing.assert_close(whole, module(x))
    (part,) = cache[0].parts.values()
    assert part.cache.lengths.tolist() == taken.sum(1).tolist()
    held = part.cache.kept["k"]
    assert [int(row.any(-1).any(0).sum()) for row in held] == taken.sum(1).tolist()


@pytest.mark.parametrize("layer", ["above(full)", "above(near)", "above(state)"])
def test_a_cache_goes_back_and_its_rows_are_begun_anew(layer: str) -> None:
    module = drawn(model(f"layers = [{layer}, near]"))
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    cache = module.init_cache(3, 12)
    stepped(module, x[:, :4], cache, [3, 1])
    stored = cache.state_dict()
    cache.mark()
    later = stepped(module, x[:, 4:], cache, [2, 3])
    cache.crop(6)
    torch.testing.assert_close(stepped(module, x[:, 6:], cache, [1, 2]), later[:, 2:])
    other = module.init_cache(3, 12)
    other.load_state_dict(stored)
    other.reorder(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(stepped(module, x[[2, 0, 0], 4:], other, [5]), later[[2, 0, 0]])
    cache.reset([1])
    with torch.no_grad():
        again = module(x[:, :3], cache=cache)
        torch.testing.assert_close(again[1], module(x[1:2, :3])[0])


def test_a_cache_of_a_length_has_room_for_all_of_it() -> None:
    module = drawn(model("layers = [above(full)]"))
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    cache = module.init_cache(2, 24)
    torch.testing.assert_close(stepped(module, x, cache, [1] * 24), module(x))


def test_compiled_in_one_graph_and_exported_for_all_lengths() -> None:
    module = drawn(model("layers = [routed(full, 0.5), above(near)]"))
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    made = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    free = {"x": {1: torch.export.Dim("n", min=8, max=64)}}
    program = torch.export.export(module, (x,), dynamic_shapes=free).module()
    for each in (x, torch.randn(2, 11, 16, dtype=torch.float64)):
        torch.testing.assert_close(made(each), module(each))
        torch.testing.assert_close(program(each), module(each))


def test_a_share_costs_a_share() -> None:
    around, attention = cost(model("layers = [routed(few_linear, 1)]")), 2 * 16 * 16
    half = cost(model("layers = [routed(few_linear, 0.5)]"))
    assert around.flops(64) - half.flops(64) == 32 * attention
    three = cost(model("layers = [few_of(few_linear)]"))
    assert three.flops(65) - three.flops(64) == three.flops(64) - three.flops(63)


def test_choosing_of_a_sequence_looks_ahead() -> None:
    what = model("layers = [routed(full, 0.5)]").layers[0]
    assert "`largest_tokens` reads later tokens; a comparison" in str(obstacle(what))
    assert obstacle(model("layers = [above(full)]").layers[0]) is None


def test_explain_says_how_many_are_taken_and_what_cannot_decode() -> None:
    arch = hl.load(
        f"{TEXT}model m {{ width = 16; ffn = none; layers = [routed(full), above(full)] }}",
        format="loom",
    )
    share, threshold = (each for each in hl.explain(arch, "m").lowerings if each.path == "taken")
    assert (share.node, share.reason) == (
        "routed: full, taken",
        "rows hold the tokens that are taken, each at its position",
    )
    assert [what for what, _ in share.obstacles] == ["decoding"]
    assert [what for what, _ in threshold.obstacles] == ["static"]


WRONG = {
    "no put": ("layer bad(p) { out = x + (x | take(x | linear(1)) | p) }", "take"),
    "no take": ("layer bad(p) { out = x + (x | p | put) }", "put"),
    "nothing between": ("layer bad(p) { out = x + (x | take(x | linear(1)) | put) }", "take"),
    "features": ("layer bad(p) { out = x + (x | take(x | linear(2)) | p | put) }", "a number"),
    "layers that read others": (
        "layer bad(p) { out = x + (x | take(x | linear(1)) | full | put) + at(0).out }\n"
        "layer bad2(p) { out = x + (x | p) }",
        "at all tokens",
    ),
    "every layer": (
        "layer bad(p) { out = x + (x | take(x | linear(1)) | dense(p) | put) }\n"
        "layer dense(p) { out = x + (earlier | mean_heads) | p }",
        "alone",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    text, said = WRONG[name]
    settings = "width = 16; ffn = none; layers = [full, bad(full)]"
    with pytest.raises(LoomError) as caught:
        check(parse(f"{TEXT}{text}\nmodel m {{ {settings} }}"))
    assert ("L243", True) in [(each.code, said in str(each)) for each in caught.value.diagnostics]
