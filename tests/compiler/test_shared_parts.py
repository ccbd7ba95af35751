"""Parts that several places share, turns, ids of several tokens, what is left out in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.meaning.reference import ReferenceModel, reference
from headloom.compiler.model import Model
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.verify import verify
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom, format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse
from headloom.ops.bucket import factors

TEXT = """
block a { heads = 2; mask = causal and window(4); position = rope }
block low(up) { heads = 2; mask = causal; q = ((x | up) + (x | linear(3) | linear(16))) | split }
block lent(q_, k_) { heads = 2; mask = causal; q = x | q_ | split; k = x | k_ | split
                     v = x | k_ | split; out = o | merge | q_ }
block scaled { heads = 2; mask = causal; scale = layer + 1 }
block turning { heads = 2; mask = causal; v = x * (1 + turn) | linear | split
                out = o * sigmoid(turn) | merge | linear }
block hashed { heads = 2; mask = causal; let e = tokens | bucket(9, last = 1) | embed(16, 9)
               k = x + e | linear | split | drop_sequence(0.5, scaled = true) }
block spread { heads = 2; mask = causal; regularize = 0.1 * mean(entropy(o)) }
layer two(p, q, n) { let y = x + (x | n | p); out = y + (y | n | q) + (x | p) }
layer grams(part) { let e = (tokens | bucket(50) | embed(8, 50)) +
                            (tokens | bucket(31, 3, last = 3) | embed(8, 31))
                    out = x + (x | norm | part) + (e | linear(width)) }
layer dropping(part) { out = x + (x | norm | part | drop_sequence(0.4)) }
layer moved(part) { param step[width] = normal(1); let y = x + sin(turn * step)
                    out = y + where(turn > 1, detach(y), y | norm | part) }
"""
MODELS = {
    "a block": "let core = once(a); layers = [pre(core, swiglu), pre(core, swiglu), pre(a, none), "
               "two(core, once(gelu(2)), once(rms_norm))]",
    "feed-forwards and norms": "ffn = once(swiglu); norm = once(rms); layers = [a] * 3; vocab = 9",
    "a map within blocks": "let up = once(linear(16)); layers = [low(up)] * 2 + "
                           "[two(low(up), low(up), rms_norm)]",
    "all maps of a block": "let q_ = once(linear(16)); let k_ = once(linear(16)); "
                           "layers = [lent(q_, k_)] * 2",
    "a layer in layers": "let core = once(pre(a, swiglu)); layers = [rezero(core), rezero(core)]",
    "what runs again": "let up = once(linear(16)); layers = loop(2, [low(up), low(up)])",
    "turns": "layers = [a] + loop(3, [moved(a), pre(turning, none)])",
    "buckets": "vocab = 40; layers = [a, grams(a), grams(swiglu)]",
    "sequences": "layers = [dropping(a), dropping(swiglu)]",
    "both in a block": "vocab = 40; layers = [hashed]",
    "terms of a part": "let core = once(spread); layers = [pre(core, none), pre(core, gelu(2))]",
    "terms of turns": "layers = loop(3, [spread])",
    "dropout": "dropout = 0.2; layers = [a, a]",
}  # fmt: skip


def model(settings: str) -> Model:
    return check(parse(f"{TEXT}model m {{ width = 16; {settings} }}")).models["m"]


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_is_its_meaning(name: str) -> None:
    what = model(MODELS[name])
    findings = {each.check: each for each in verify(what)}
    trains = name in ("sequences", "both in a block", "dropout") or name.startswith("terms")
    wrong = [each for each in findings.values() if not each.ok and each.check != "training"]
    assert wrong == []
    assert findings["training"].ok is (True if trains else None)
    module = build_module(what, Target("torch"), dtype="float64", seed=0)
    assert cost(what).params == sum(each.numel() for each in module.parameters())
    assert module.state_dict().keys() == dict(module.named_parameters()).keys()


def test_a_part_has_one_home() -> None:
    module = build_module(model(MODELS["a block"]), Target("torch"), dtype="float64", seed=0)
    names = [name for name in module.state_dict() if "q_proj" in name]
    assert names == ["layers.0.attn.q_proj.weight", "layers.2.attn.q_proj.weight"]
    assert len(module.init_cache(1)) == 4


def tied(what: Model, apart: Model, home: str, places: list[str]) -> tuple[nn.Module, nn.Module]:
    """Return a meaning that shares a part, and one whose places have the weights of its home."""
    one, other = (reference(each, dtype=torch.float64) for each in (what, apart))
    state = {}
    for name in other.state_dict():
        found = next((place for place in places if name.startswith(place)), None)
        own = name if found is None else home + name.removeprefix(found)
        state[name] = one.state_dict()[own]
    other.load_state_dict(state)
    return one, other


def test_shared_is_copied() -> None:
    rest = "layers = [pre(core, swiglu), pre(core, gelu(2))]"
    one, other = tied(
        model(f"let core = once(a); {rest}"),
        model(f"let core = a; {rest}"),
        "layers.0.attn",
        ["layers.1.attn"],
    )
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x))


def test_what_runs_again_adds_to_the_loss_each_time() -> None:
    one, other = tied(
        model("layers = loop(2, [pre(spread, none)])"),
        model("layers = [pre(spread, none)] * 2"),
        "layers.0.",
        ["layers.1."],
    )
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for each in (one, other):
        each.train()
        each(x)
    torch.testing.assert_close(one.auxiliary_loss(), other.auxiliary_loss())


def test_turns_count() -> None:
    what = model("layers = loop(3, [moved(gelu(2))]); norm = none")
    meaning = reference(what, dtype=torch.float64)
    assert isinstance(meaning, ReferenceModel)
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    y, layer = x, meaning.layers[0]
    for turn in range(3):
        y = y + torch.sin(turn * layer.step)
        hidden = torch.nn.functional.gelu(y @ layer.part.up_proj.weight.mT)
        y = y + (y if turn > 1 else hidden @ layer.part.down_proj.weight.mT)
    torch.testing.assert_close(meaning(x), y)


@pytest.mark.parametrize("name", ["a block", "what runs again"])
def test_texts_of_shared_parts_come_back(name: str) -> None:
    text = f"{TEXT}model m {{ width = 16; {MODELS[name]} }}"
    what = model(MODELS[name])
    again = parse_yaml(format_yaml(parse(text)))
    for file in (again, parse(format_loom(again))):
        other = check(file).models["m"]
        assert cost(other).params == cost(what).params
        assert [each.name for each in other.layers] == [each.name for each in what.layers]


def bucket_of(ids: list[int], count: int, seed: int) -> int:
    mixed = 0
    for each, factor in zip(reversed(ids), factors(seed, len(ids)), strict=True):
        mixed ^= each * factor
    return mixed % count


def test_a_bucket_is_the_hash() -> None:
    what = model("vocab = 40; layers = [grams(gelu(2))]")
    meaning = reference(what, dtype=torch.float64)
    seen: list[Tensor] = []
    table = meaning.get_parameter("layers.0.e_embed_1.weight")
    with torch.no_grad():
        table.copy_(torch.arange(31.0)[:, None].expand(31, 8))
        meaning.get_parameter("layers.0.e_embed_0.weight").zero_()
    layer = meaning.layers[0]
    tokens = torch.tensor([[7, 39, 2, 2, 7]])
    _, made = layer.layer(torch.zeros(1, 5, 16).double(), (), offered={"tokens": tokens[..., None]})
    seen.append(made["e"][0, :, 0])
    padded = [0, 0, *tokens[0].tolist()]
    wanted = [bucket_of(padded[at : at + 3], 31, 3) for at in range(5)]
    assert seen[0].tolist() == wanted


WRONG = {
    "where it stands": ("let core = once(scaled); layers = [pre(core, none), pre(core, none)]",
                        "L240", "once(scaled)", "`scaled` reads where it stands"),
    "a layer of the list": ("let core = once(a); layers = [core, pre(core, none)]",
                            "L240", "once(a)", ""),
    "no stage": ("let core = once(a + 1); layers = [pre(core, none)]", "L208", "a + 1", ""),
    "no such stage": ("let core = once(lineer(3)); layers = [pre(core, none)]", "L208",
                      "lineer(3)", ""),
    "no ids": ("layers = [pre(a, bad)]", "L206", "bucket(3)", "these are none"),
    "buckets of buckets": ("vocab = 3; layers = [worse(a)]", "L206", "bucket(4)",
                           "these are none"),
}  # fmt: skip
MORE = {
    "bad": "ffn bad { out = x | bucket(3) }",
    "worse": "layer worse(p) { out = (x | p) + (tokens | bucket(3) | bucket(4) | embed(16, 4)) }",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    settings, code, words, label = WRONG[name]
    more = "\n".join(text for word, text in MORE.items() if word in settings)
    text = f"{TEXT}{more}\nmodel m {{ width = 16; {settings} }}"
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    (problem,) = {(e.code, e.span, e.label): e for e in caught.value.diagnostics}.values()
    assert (problem.code, text[problem.span.start : problem.span.end]) == (code, words)
    assert problem.label == label
