"""Layers, feed-forwards, norms and ends as text: their meaning, their names, what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.facts.cost import cost
from headloom.compiler.facts.parameters import model_weights
from headloom.compiler.meaning.reference import ReferenceBlock, ReferenceModel, reference
from headloom.compiler.model import Block, Model
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.reports.figure import figure
from headloom.compiler.verify.verify import verify
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

TEXT = """
block a { heads = 2; mask = causal and window(4); position = rope }
block d { heads = 2; mask = causal; mix = gated_delta; k = x | linear | split | l2_norm }
stage dyt { param a = 0.5; param g[features] = 1; param b[features] = 0;  g * tanh(a * x) + b }
ffn shifted { let up = x | conv(2) | linear(24) | silu; out = up | linear }
ffn summed { let near = x | shift(1); out = ((x | running(mean)) + near) | linear }
layer both(p, q, ffn) {
  let y = x | norm
  let z = x + (y | p) + 0.5 * (y | q)
  out   = z + (z | norm | ffn | norm)
}
layer nested(part, ffn = none) { out = x | pre(part, ffn) | rezero(part) }
layer only(part) { out = x | part }
layer tokened(part) { out = x + (x | part) + (tokens | embed(16)) }
layer embedding(part) { out = x + (x | part | embed(16, 4)) }
"""


def model(settings: str) -> Model:
    return check(parse(f"{TEXT}model m {{ width = 16; {settings} }}")).models["m"]


def names(settings: str) -> list[str]:
    """Return the parameters of a model, those of its blocks left out."""
    found = [each.name for each in model_weights(model(settings))]
    inner = ("q_proj.", "k_proj.", "v_proj.", "o_proj.")
    return [each for each in found if not any(f".{part}" in each for part in inner)]


def pair(what: Model | Block) -> tuple[nn.Module, nn.Module]:
    """Return a compiled module and the meaning with its weights, none of them 0 or 1."""
    module = build_module(what, Target("torch"), dtype="float64", seed=1).eval()
    with torch.no_grad():
        for each in module.parameters():
            each.add_(torch.randn_like(each), alpha=0.1)
    meaning = reference(what, dtype=torch.float64).eval()
    meaning.load_state_dict(module.state_dict())
    return module, meaning


def agree(what: Model | Block, x: Tensor) -> None:
    """Compare output and every gradient of the compiled module with those of the meaning."""
    for got, expected in zip(*(differentiated(each, x) for each in pair(what)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def differentiated(module: nn.Module, x: Tensor) -> list[Tensor]:
    leaves = [each for _, each in sorted(module.named_parameters())]
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        leaves.append(x)
    y = module(x)
    weigh = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), leaves)]


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYERS = {  # what a layer means, of its parts and norms
    "pre": lambda x, p: (y := x + p("attn", "attn_norm", x=x)) + p("ffn", "ffn_norm", x=y),
    "post": lambda x, p: p(
        "ffn_post", x=(y := p("attn_post", x=x + p("attn", x=x))) + p("ffn", x=y)
    ),
    "inner": lambda x, p: (
        (y := x + p("attn_post_norm", "attn", x=x)) + p("ffn_post_norm", "ffn", x=y)
    ),
    "sandwich": lambda x, p: (
        (y := x + p("attn_post_norm", "attn", "attn_norm", x=x))
        + p("ffn_post_norm", "ffn", "ffn_norm", x=y)
    ),
    "parallel": lambda x, p: x + p("attn", "y_norm", x=x) + p("ffn", "y_norm", x=x),
    "parallel_normed": lambda x, p: x + p("attn", "attn_norm", x=x) + p("ffn", "ffn_norm", x=x),
    "macaron": lambda x, p: (
        (z := (y := x + p("ffn_0", "ffn_norm_0", x=x) / 2) + p("attn", "attn_norm", x=y))
        + p("ffn_1", "ffn_norm_1", x=z) / 2
    ),
    "scaled(start = 0.1)": lambda x, p: (
        (y := x + 0.1 * p("attn", "attn_norm", x=x)) + 0.1 * p("ffn", "ffn_norm", x=y)
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_the_layers_of_the_library_mean(layer: str) -> None:
    meaning = reference(model(f"layer = {layer}; layers = [a]"), dtype=torch.float64)
    whole = cast(ReferenceModel, meaning).layers[0]

    def parts(*chain: str, x: Tensor) -> Tensor:
        for name in reversed(chain):
            if "norm" in name or name.endswith("_post"):
                x = functional.rms_norm(x, (16,), eps=1e-6)
            else:
                x = cast(ReferenceBlock, whole.get_submodule(name))(x)
        return x

    torch.testing.assert_close(whole(X), LAYERS[layer](X, parts))


@pytest.mark.parametrize("layer", [*LAYERS, "both(d)"])
def test_a_compiled_layer_is_its_meaning(layer: str) -> None:
    agree(model(f"layer = {layer}; layers = [a]; norm = layer"), X)


def test_ends_norms_and_sharing_of_weights() -> None:
    tied = model(
        "vocab = 7; layers = [both(a, d, gelu(2)), rezero(a), nested(a)]; norm = dyt; tie = true;"
        "embed = x | rms_norm | scale(width ** 0.5); head = x | norm | linear(vocab) | softcap(3)"
    )
    agree(tied, torch.tensor([[1, 2, 6, 0], [3, 3, 1, 4]]))
    agree(model("layers = [a]; head = x | norm | gelu(2) | linear(5, bias = true)"), X)
    agree(model("layers = [swiglu, pre(a, none), shifted]; head = classify(3)"), X)


def test_names_are_as_they_were_for_the_default() -> None:
    assert names("vocab = 7; layers = [a]; norm = layer") == [
        "embed_tokens.weight", "layers.0.attn_norm.weight", "layers.0.attn_norm.bias",
        "layers.0.ffn_norm.weight", "layers.0.ffn_norm.bias", "layers.0.ffn.gate_proj.weight",
        "layers.0.ffn.up_proj.weight", "layers.0.ffn.down_proj.weight", "norm.weight",
        "norm.bias", "lm_head.weight",
    ]  # fmt: skip


def test_a_part_bears_the_name_it_has_in_the_layer() -> None:
    found = names("norm = dyt; layers = [both(a, d, ffn = none)]; head = none")
    assert [each for each in found if not each.startswith("layers.0.q.")] == [
        f"{module}.{tensor}" for module in ("layers.0.y_norm", "norm") for tensor in "agb"
    ]
    assert "layers.0.q.alpha_proj.weight" in found
    assert names("layers = [nested(a)]; norm = none; head = none") == ["layers.0.rezero.g"]
    assert names("layers = [macaron(a, gelu(2))]; norm = none; head = none") == [
        f"layers.0.ffn_{at}.{name}_proj.weight" for at in range(2) for name in ("up", "down")
    ]


def test_none_takes_away_the_term_it_stands_in() -> None:
    alone = model("layers = [pre(a, none)]; head = none").layers[0]
    assert [each.module for each in alone.parts] == ["attn"]
    torch.testing.assert_close(
        reference(alone, dtype=torch.float64)(X),
        reference(model("layers = [a]; ffn = none").layers[0], dtype=torch.float64)(X),
    )


PARTS = {  # feed-forwards and stages with tensors among the pipelines of a block
    "alike for every head": "q = x | linear | split | dyt; k = x | linear | split | dyt",
    "a tensor of all heads": "q = x | linear | split | opened",
    "all earlier tokens": "k = x | summed | linear | split",
    "one pipeline read twice": "q = (x | linear) / norm(x | linear) | split",
    "earlier tokens": "k = x | shifted | linear | split; v = x | shifted | linear | split",
    "around it": "out = o | merge | dyt | swiglu(1) | linear",
    "in another": "out = o | merge | doubled | linear",
    "of one token": "out = o | merge | gate(x | mean_tokens | drawn) | linear",
}
STAGES = """
stage opened { param g[heads, features] = 1;  g * tanh(x) }
stage drawn { let u = (x | noise(0.1)) * x;  sigmoid(u) }
stage doubled { let u = x | linear(3) | dyt | silu;  u | linear(features) }
"""


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_block(name: str) -> None:
    text = f"{TEXT}{STAGES}block b {{ heads = 2; width = 16; mask = causal; {PARTS[name]} }}"
    what = check(parse(text)).blocks["b"]
    assert [each for each in verify(what) if each.ok is False] == []
    modules = [each.module for each in what.parts]
    assert len(modules) == len(set(modules))


def test_a_model_that_adds_to_the_loss_is_proved_in_training_too() -> None:
    text = "block r { heads = 2; mask = causal; regularize = mean(entropy(o)) }\n"
    text += "model m { width = 8; layers = [r]; ffn = none }"
    what = check(parse(text)).models["m"]
    found = {each.check: each.ok for each in verify(what)}
    assert found["training"] is True


def test_a_stage_that_reads_heads_takes_none() -> None:
    stage = "stage s { let u = x | conv(2);  u }"
    text = f"{TEXT}{stage}\nblock b {{ heads = 2; q = x | linear | split | s }}"
    with pytest.raises(LoomError) as caught:
        check(parse(text))
    assert {each.code for each in caught.value.diagnostics} == {"L206"}


def test_equal_layers_are_one_class() -> None:
    text = generate(model("layers = [a, d, a, pre(d, none)]"), Target("torch")).text
    classes = [line.split()[1].split("(")[0] for line in text.splitlines() if "Layer(nn" in line]
    assert len(classes) == 1  # the other one is `Pre2Layer`
    assert text.count("class SwigluFeedForward(") == 1
    text = generate(model("layers = [a] * 3"), Target("torch")).text
    assert "*(PreLayer(A()) for _ in range(3))" in text


def test_a_layer_and_a_feed_forward_stand_alone() -> None:
    arch = check(parse(f"{TEXT}layer whole {{ out = x + (x | norm | a) | swiglu }}"))
    for name in ("whole", "shifted"):
        what = find(arch, name, width=16)
        agree(what, X)
        assert all(each.ok is not False for each in verify(what))


def test_models_of_layers_hold_in_every_way() -> None:
    what = model("layers = [both(a, d, shifted), sandwich(a, summed)]; vocab = 11; norm = dyt")
    assert [each for each in verify(what) if each.ok is False] == []


def test_what_layers_cost() -> None:
    plain = cost(model("layers = [a]; ffn = none; head = none; norm = none"))
    fed = cost(model("layers = [a]; ffn = gelu(4); head = none; norm = none"))
    assert fed.params - plain.params == 2 * 16 * 64
    assert fed.flops(10) - plain.flops(10) >= 10 * 2 * 2 * 16 * 64
    assert fed.cache_bytes(10) == plain.cache_bytes(10)
    kept = cost(model("layers = [both(a, d, shifted)]; head = none")).cache_bytes(10)
    assert kept > plain.cache_bytes(10)


WRONG = {
    "L231": "layers = [only(none)]",
    "L218": "layers = [a]; layer = sandwhich",
    "L209": "layers = [pre(a)]",
    "L226": "layers = [a]; embed = x | a",
    "L207": "layers = [a]; embed = x | linear(8)",
    "L222": "layers = [a]; tie = true",
    "L208": "layers = [a]; norm = rmz",
    "L224": "layers = [tokened(a)]",
    "L206": "layers = [embedding(a)]",
}


@pytest.mark.parametrize("code", WRONG)
def test_what_is_wrong_is_said(code: str) -> None:
    with pytest.raises(LoomError) as caught:
        model(WRONG[code])
    assert {each.code for each in caught.value.diagnostics} == {code}


MISPLACED = {
    "layer l(p) { heads = 2; out = x | p }": "L202",
    "layer l(p) { let y = x | p }": "L202",
    "layer l(p) : l(p) { out = x }": "L212",
    "layer l(p) { let y = x; let y = x; out = y }": "L211",
    "layer l(p) { out = x | split(2) | swiglu | merge }": "L207",
    "layer l(p) { out = x | linear(8) }": "L207",
    "layer l(p) { out = x }\nblock b { heads = 2; q = x | a | split }": "L232",
}


@pytest.mark.parametrize("text", MISPLACED)
def test_what_does_not_belong_in_a_layer(text: str) -> None:
    with pytest.raises(LoomError) as caught:
        check(parse(f"{TEXT}{text}\nmodel m {{ width = 16; layers = [l(a)] }}"))
    assert {each.code for each in caught.value.diagnostics} == {MISPLACED[text]}


DEPTH = {  # layers that read more than what comes in
    "lanes": """
        layer lane(part) {
          let w    = x | merge | rms_norm | linear(lanes)
          let pre  = w | sigmoid
          let post = x | merge | linear(lanes) | sigmoid
          let comb = x | merge | linear(lanes * lanes) | split(lanes) | softmax | sinkhorn(3)
          let y    = (pre * x) | sum_heads | norm | part
          out      = (x | combine(comb)) + post * (y | repeat(lanes))
        }
        model m { width = 16; lanes = 3; vocab = 7; layers = [lane(a), lane(swiglu), lane(d)] }""",
    "earlier": """
        layer over_depth(part) {
          let logits = earlier | rms_norm | linear(1)
          let read   = (earlier * (logits | softmax(over = heads))) | sum_heads
          out        = x + (read | norm | part)
        }
        model m { width = 16; vocab = 7; layers = [pre(a, none), over_depth(a), over_depth(d)] }""",
    "first": """
        block reading { heads = 2; mask = causal; v = (earlier | pick(0)) + x | linear | split }
        layer again(part) { out = x + (x | norm | part) + (earlier | pick(0) | linear) }
        model m { width = 16; layers = [reading, again(a), again(reading)] }""",
    "first and below": """
        block lent { heads = 2; mask = causal; let f = x | linear(4) }
        block read : lent {
          let f = (earlier | pick(0) | linear(4)) + previous.f
          v     = f | linear | split
        }
        layer anew(part) { let y = earlier | pick(0);  out = y + (y | norm | part) }
        layer moved(part) { let y = x | shift(1);  out = y + (y | norm | part) }
        model m { width = 16; layers = [lent, anew(read), moved(read)] }""",
    "tokens": """
        layer named(part) {
          let e = tokens | embed(6) | rms_norm
          let y = x + (x | norm | part)
          out   = y + ((y | linear(6) | gelu) * e | linear)
        }
        model m { width = 16; vocab = 7; layers = [named(a), pre(d, none), named(swiglu)] }""",
    "condition": """
        layer adaptive(part) {
          let shift = condition | silu | linear(width)
          let scale = condition | silu | linear(width)
          let gate  = condition | silu | linear(width)
          out = x + gate * ((x | norm) * (1 + scale) + shift | part)
        }
        model m { width = 16; condition_width = 5; layers = [adaptive(a), adaptive(swiglu)] }""",
}


@pytest.mark.parametrize("name", DEPTH)
def test_layers_that_read_more_than_what_comes_in(name: str) -> None:
    what = check(parse(f"{TEXT}{DEPTH[name]}")).models["m"]
    assert [each for each in verify(what) if each.ok is False] == []


FIRST = "layer first { const kept[lanes, 1] = 1 - h; out = kept * x }\n"
LAST = "layer last { out = (earlier * (earlier | linear(1))) | sum_heads }\n"


def test_layers_without_parts_may_read_what_a_model_alone_has() -> None:
    wide = "model m { width = 16; lanes = 2; layers = [first] }"
    agree(check(parse(f"{TEXT}{FIRST}{wide}")).models["m"], X)
    deep = "model m { width = 16; layers = [a, last] }"
    agree(check(parse(f"{TEXT}{LAST}{deep}")).models["m"], X)


@pytest.mark.parametrize("read", ["earlier | pick(0)", "condition | linear(16)"])
def test_the_ends_read_no_other_inputs(read: str) -> None:
    stage = f"stage reading {{ let y = x | linear(16); y + ({read}) }}\n"
    with pytest.raises(LoomError) as caught:
        check(parse(f"{TEXT}{stage}model m {{ width = 16; layers = [a]; head = x | reading }}"))
    assert {each.code for each in caught.value.diagnostics} == {"L224"}


def test_a_stage_that_reads_x_in_several_operations_takes_it_once() -> None:
    """One part, and one linear map, however often the stage's text says `x`."""
    text = "stage plain = x / sqrt(mean(x ** 2) + 1e-6)\nlayer l(p) { out = x + (x | p | plain) }\n"
    block = "block b { heads = 2; q = x | linear | plain | split }\n"
    arch = check(parse(f"{TEXT}{text}{block}model m {{ width = 16; layers = [l(a), l(b)] }}"))
    found = [each.name for each in model_weights(arch.models["m"])]
    assert [each for each in found if "q_proj" in each] == [
        f"layers.{at}.p.q_proj.weight" for at in range(2)
    ]
    agree(arch.models["m"], X)


def test_layers_that_run_again_share_their_weights() -> None:
    looped = model("vocab = 7; layers = [a] + loop(3, [pre(d, none), swiglu]) + [a]")
    assert looped.steps == (0, 1, 2, 1, 2, 1, 2, 3)
    assert len(looped.layers) == 4
    unrolled = model("vocab = 7; layers = [a] + [pre(d, none), swiglu] * 3 + [a]")
    assert cost(looped).cache_bytes(9) == cost(unrolled).cache_bytes(9)
    assert cost(looped).flops(9) == cost(unrolled).flops(9)
    shared, apart = reference(looped), reference(unrolled)
    state = {
        f"layers.{at}.{rest}": each
        for at, own in enumerate(looped.steps)
        for name, each in shared.state_dict().items()
        if name.startswith(f"layers.{own}.")
        for rest in [name.removeprefix(f"layers.{own}.")]
    }
    apart.load_state_dict(
        state | {k: v for k, v in shared.state_dict().items() if not k.startswith("layers.")}
    )
    tokens = torch.tensor([[1, 2, 6, 0]])
    torch.testing.assert_close(shared(tokens), apart(tokens))
    assert [each for each in verify(looped) if each.ok is False] == []
    once = model("let core = once(pre(a, swiglu)); layers = [core, d, core]")
    assert once.steps == (0, 1, 0)


def test_the_figure_in_the_docs_is_the_one_that_is_drawn() -> None:
    text = (Path(__file__).parents[2] / "docs" / "language.md").read_text("utf-8")
    (shown,) = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    found = re.findall(r"```loom\n(.*?)```", text, re.DOTALL)
    (loom,) = (each for each in found if "model wide " in each)
    assert figure(check(parse(loom)).models["wide"]) == shown


@pytest.mark.parametrize("name", DEPTH)
def test_every_arrow_of_a_figure_ends_at_a_box(name: str) -> None:
    drawn = figure(check(parse(f"{TEXT}{DEPTH[name]}")).models["m"])
    places = [each.strip() for each in re.split(r"-->|\n", drawn) if each.strip()]
    boxes = {re.split(r"[(\[]", each)[0] for each in places if re.search(r"[(\[]", each)}
    assert {each for each in places if re.fullmatch(r"\w+", each)} - {"end"} <= boxes


OF_STREAMS = {  # stages and tensors that meet streams with heads, and the same in plain PyTorch
    "stage t { param w[features] = 0; x * (1 + w) }": lambda x, w: x * (1 + w["y_t.w"]),
    "stage t = (x - mean(x)) | rms_norm(eps = 1e-5)": lambda x, w: functional.rms_norm(
        x - x.mean(-1, keepdim=True), (4,), w["y_t.o_norm.weight"], 1e-5
    ),
    "stage t = elu1(x) * gelu_tanh(x - mean(x))": lambda x, w: (
        (functional.elu(x) + 1) * functional.gelu(x - x.mean(-1, keepdim=True), approximate="tanh")
    ),
}


@pytest.mark.parametrize("text", OF_STREAMS)
def test_stages_of_streams_with_heads(text: str) -> None:
    """There are as many heads as features, so that one can be taken for the other."""
    end = "let y = x | linear(heads * 4) | split | t; out = y | merge | linear"
    block = find(check(parse(f"{text}\nblock b {{ heads = 4; {end} }}")), "b", width=16)
    agree(block, X)
    module, meaning = pair(block)
    weights = dict(module.named_parameters())
    q = functional.linear(X, weights["y_proj.weight"]).unflatten(-1, (4, 4)).transpose(1, 2)
    q = OF_STREAMS[text](q, weights).transpose(1, 2).flatten(2)
    wanted = functional.linear(q, weights["o_proj.weight"])
    torch.testing.assert_close(module(X), wanted)
    torch.testing.assert_close(meaning(X), wanted)


@pytest.mark.parametrize(("dims", "along"), [("head_dim", -1), ("heads", -3)])
def test_a_tensor_meets_heads_by_what_it_is_written_for(dims: str, along: int) -> None:
    text = f"param w[{dims}] = h + 1; let y = (x | split) * w; out = y | gate(w) | merge"
    block = find(check(parse(f"block b {{ heads = 4; {text} }}")), "b", width=16)
    module, meaning = pair(block)
    scale = dict(module.named_parameters())["w"]
    scale = scale if along == -1 else scale[:, None, None]
    y = X.unflatten(-1, (4, 4)).transpose(1, 2)
    wanted = (y * scale**2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(X), wanted)
    torch.testing.assert_close(meaning(X), wanted)


def test_a_layer_of_lanes_is_checked_where_a_model_has_them() -> None:
    text = "layer one { out = x | merge | linear(lanes * width) | split(lanes) }"
    found = check(parse(f"{text}\nmodel m {{ width = 4; lanes = 3; layers = [one] }}"))
    assert found.models["m"].layers[0].out.shape.heads == 3
    with pytest.raises(LoomError):
        check(parse(text))


def test_a_misspelt_norm_is_known() -> None:
    layer = "layer l(p) { out = x + (x | nrm | p) }"
    with pytest.raises(LoomError) as caught:
        check(parse(f"{TEXT}{layer}\nmodel m {{ width = 16; layers = [l(a)] }}"))
    (found,) = caught.value.diagnostics
    assert (found.code, found.help) == ("L208", "did you mean `norm` or `l2_norm`?")


def test_a_name_of_the_file_comes_before_another_kind_of_the_library() -> None:
    """`routed` is a layer of the library; here it is a feed-forward."""
    arch = check(
        parse(
            """
            block a { heads = 2 }
            ffn routed(hidden) { out = x | linear(hidden) | linear }
            model m { width = 8; layers = [a]; ffn = routed(3) }
            """
        )
    )
    model = find(arch, "m")
    assert isinstance(model, Model)
    assert [each.what.kind for each in model.layers[0].parts if each.module == "ffn"] == ["ffn"]
