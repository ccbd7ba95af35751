"""Feed-forwards that tokens are sent to: their meaning, their names, batches, what is wrong."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import headloom as hl
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.model import Model
from headloom.compiler.pieces.experts import Sent, largest, largest_tokens
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

TEXT = """
block a { heads = 2; mask = causal; position = rope }
ffn fired { let w = x | linear(4) | relu; out = x | mixture(geglu(1), w) }
ffn hashed { out = x | mixture(swiglu(1), tokens | bucket(4, 3, last = 1) | one_hot(4)) }
ffn taking { let t = x | linear(4) | sigmoid; let w = t * (t | largest_tokens(2))
  out = x | mixture(gelu(1), w) }
ffn shared_out { let t = x | linear(4) | sigmoid; let w = t * (t | largest_tokens(share = 0.5))
  out = x | mixture(gelu(1), w) }
ffn own(hidden) {
  param g[width] = 1; param b = 0.5
  let y = x | rms_norm(scale = false)
  out = b * (g * y | linear(hidden, bias = true) | silu | linear(width, bias = true))
}
ffn skipping { let w = x | linear(5) | softmax | top(2)
  out = (x | mixture(own(16), w | slice(0, 4))) + (w | slice(4)) * x }
ffn sharing { let w = x | linear(4) | softmax | top(2); out = x | mixture(once(gelu(1)), w) }
ffn grouped : moe(8, 2, 1, router = sigmoid, balance = none) {
  let open   = sum(score | split(4) | top(2)) | largest(2, over = heads)
  let chosen = where(open > 0, score | split(4), -1) | merge | largest(2)
}
"""
FEED_FORWARDS = ("moe(8, 2, 1)", "moe(4, 1, 1, shared = swiglu, router = sigmoid)", "fired",
                 "hashed", "taking", "shared_out", "skipping", "grouped", "sharing",
                 "once(moe(4, 2, 1))")  # fmt: skip
TOKENS = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(0))


def text(ffn: str, layers: int = 2) -> str:
    own = f"vocab = 31; width = 16; layers = [a] * {layers}; ffn = {ffn}"
    return f"{TEXT}model m {{ {own} }}"


def model(ffn: str) -> Model:
    return check(parse(text(ffn))).models["m"]


def pair(ffn: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a compiled model and its meaning with the same weights."""
    arch = hl.load(text(ffn), format="loom")
    module, meaning = (
        hl.compile(arch, "m", dtype=dtype, seed=1),
        hl.reference(arch, "m", dtype=dtype),
    )
    with torch.no_grad():
        for each in module.parameters():
            each.add_(torch.randn_like(each), alpha=0.2)
    meaning.load_state_dict(module.state_dict())
    return module, meaning


def found(module: nn.Module, **given: Tensor) -> dict[str, Tensor]:
    """Return the logits and every gradient, of them and of what training adds to the loss."""
    y = module.train()(TOKENS, **given)
    added = getattr(module, "auxiliary_loss", torch.zeros_like(y).sum)()
    weigh = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    leaves = dict(module.named_parameters())
    grads = torch.autograd.grad((y * weigh).sum() + added, list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(each) for each in leaves.values())
    grads = (z if g is None else g for z, g in zip(zeros, grads, strict=True))
    return {
        "y": y.detach(),
        "added": added.detach().double(),
        **dict(zip(leaves, grads, strict=True)),
    }


MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 4 + [0] * 2 + [1] * 3, [1] * 9])
BATCHES = {
    "whole": {},
    "padded": {"attention_mask": MASK},
    "packed": {"segments": torch.tensor([0] * 4 + [1] * 5)},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ffn", FEED_FORWARDS)
def test_they_are_what_they_mean(ffn: str, batch: str) -> None:
    module, meaning = pair(ffn)
    expected = found(meaning, **BATCHES[batch])
    for name, each in found(module, **BATCHES[batch]).items():
        torch.testing.assert_close(each, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("ffn", ["moe(8, 2, 1)", "fired", "skipping"])
def test_in_float32_and_step_by_step(ffn: str) -> None:
    module, _ = pair(ffn, torch.float32)
    wide, cache = pair(ffn)[0].eval(), module.eval().init_cache(batch=3)
    with torch.no_grad():
        whole = module(TOKENS)
        steps = [module(each, cache=cache) for each in TOKENS.split([4, 1, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
        wide.load_state_dict(module.state_dict())
        torch.testing.assert_close(whole.double(), wide(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["y", "gate_proj", "route_proj"])
def test_two_experts_by_hand(name: str) -> None:
    module, _ = pair("moe(4, 2, 1, balance = none)")
    ffn = module.layers[0].ffn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    w = dict(ffn.named_parameters())

    def by_hand(x: Tensor) -> Tensor:
        p = linear(x, w["route_proj.weight"]).softmax(-1)
        values, chosen = p.topk(2, -1)
        values = values / values.sum(-1, keepdim=True)
        rows = []
        every = (each.flatten(0, 1) for each in (x, chosen, values))
        for token, at, weight in zip(*every, strict=True):
            gate, up, down = (w[f"experts.{each}_proj.weight"] for each in ("gate", "up", "down"))
            own = (weight[k] * (down[e] @ (silu(gate[e] @ token) * (up[e] @ token)))
                   for k, e in enumerate(at.tolist()))  # fmt: skip
            rows.append(sum(own))
        return torch.stack(rows).view_as(x)

    got, expected = ffn(x), by_hand(x)
    if name != "y":
        leaf = w["route_proj.weight" if name == "route_proj" else "experts.gate_proj.weight"]
        got, expected = (torch.autograd.grad(y.sin().sum(), leaf)[0] for y in (got, expected))
    torch.testing.assert_close(got, expected)


def test_all_of_one_expert_are_the_dense_feed_forward() -> None:
    one, dense = pair("moe(1, 1, 1, balance = none)")[0], pair("swiglu(1)")[0]
    own = {
        name.replace(".experts", ""): each[0] if "experts" in name else each
        for name, each in one.state_dict().items()
        if "route" not in name
    }
    dense.load_state_dict(own)
    torch.testing.assert_close(one(TOKENS), dense(TOKENS))


def test_equal_experts_are_one_however_tokens_are_sent() -> None:
    module, dense = pair("moe(8, 3, 1, balance = none)")[0], pair("swiglu(1)")[0]
    own = dict(dense.state_dict())
    with torch.no_grad():
        for name, each in module.named_parameters():
            each.copy_(own[name.replace(".experts", "")]) if "route" not in name else None
    torch.testing.assert_close(module(TOKENS), dense(TOKENS))


def test_tensors_are_stacked_and_named_as_people_have_them() -> None:
    shapes = {name: tuple(each.shape) for name, each in pair("moe(8, 2, 1)")[0].named_parameters()}
    assert shapes["layers.0.ffn.experts.gate_proj.weight"] == (8, 16, 16)
    assert shapes["layers.0.ffn.route_proj.weight"] == (8, 16)


def test_the_first_of_equal_scores_is_chosen() -> None:
    x = torch.tensor([[2.0, 1, 2, 2], [0, 0, 0, 0]])
    assert largest(x, 2, dim=-1).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    x = torch.tensor([1.0, 3, 3, 3, 1, 1])[None, :, None]
    run = torch.tensor([[0, 0, 0, 0, 1, -1]])
    assert largest_tokens(x, 2, None, None)[0, :, 0].tolist() == [0, 1, 1, 0, 0, 0]
    assert largest_tokens(x, 2, None, run)[0, :, 0].tolist() == [0, 1, 1, 0, 1, 0]
    assert largest_tokens(x, None, 0.5, run)[0, :, 0].tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("most", [2, None])
def test_nothing_is_sent_where_nothing_weighs(most: int | None) -> None:
    weights = torch.tensor([[[0.0, 0, 0], [0, 3, 0], [0, 0, 0]]]).double().requires_grad_()
    sent = Sent(weights, most)
    rows = torch.full((1, len(sent.token), 2), 7.0, dtype=torch.float64)
    y = sent.put(rows)
    assert y.tolist() == [[[0, 0], [21, 21], [0, 0]]]
    y.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[[0, 0, 0], [0, 14, 0], [0, 0, 0]]]


def test_no_token_may_be_left() -> None:
    module, meaning = pair("fired")
    for each in (module, meaning):
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if "w_proj" in name:
                    weight.zero_()
    torch.testing.assert_close(module(TOKENS), meaning(TOKENS))
    module(TOKENS).sum().backward()
    found = [each.grad for each in module.parameters() if each.grad is not None]
    assert all(bool(torch.isfinite(each).all()) for each in found)


def test_means_of_what_training_adds_are_over_the_whole_batch() -> None:
    mask = MASK.bool()
    module, _ = pair("moe(4, 2, 1, balance = 0.5)")
    own = module.layers[0].ffn
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    own.train()(x, attention_mask=mask)
    p = linear(x[mask], own.route_proj.weight).softmax(-1)
    chosen = largest(p, 2, dim=-1)
    expected = 0.5 * 4 / 2 * (chosen.mean(0) * p.mean(0)).sum()
    torch.testing.assert_close(own.auxiliary_loss(), expected)


def test_a_bias_learns_from_the_load_alone() -> None:
    ffn = """
    ffn biased : moe(4, 1, 1, router = sigmoid) {
      param bias[4] = 0
      let chosen = score + bias | largest(1)
      regularize = 0.1 * sum((bias - detach(bias)) * sign(mean_each(chosen) - 1 / 4))
    }
    """
    module = hl.compile(hl.load(ffn + text("biased", 1), format="loom"), "m", seed=0).train()
    module(TOKENS)
    added = module.auxiliary_loss()
    assert float(added.detach()) == 0
    added.backward()
    own = module.layers[0].ffn.bias.grad
    assert set((own / 0.1).round().tolist()) <= {-1, 0, 1}
    assert float(own.abs().sum()) > 0


@pytest.mark.parametrize("ffn", ["moe(8, 2, 2)", "fired"])
def test_what_it_costs_is_what_runs_for_a_token(ffn: str) -> None:
    layer = model(ffn).layers[0]
    dense = check(parse(text("swiglu(2)"))).models["m"].layers[0]
    tokens = 8
    experts, one = (cost(each).flops(tokens) for each in (layer, dense))
    if ffn == "moe(8, 2, 2)":
        expert = 3 * 2 * 16 * 32 * tokens
        assert 2 * expert - expert < experts - (one - expert) - expert + 1
        assert cost(layer).params - cost(dense).params == 7 * 3 * 16 * 32 + 8 * 16
    else:  # all four may
        assert experts > 4 * 3 * 2 * 16 * 16 * tokens


def test_explain_says_how_many_rows_and_what_looks_ahead() -> None:
    arch = hl.load(text("moe(8, 2, 1)"), format="loom")
    own = hl.explain(arch, "m", backend="torch").lowerings[-1]
    assert (own.node, own.path) == ("moe: 8 × swiglu", "grouped")
    assert "at most 2" in own.reason
    assert own.obstacles == ()
    arch = hl.load(text("taking"), format="loom")
    own = hl.explain(arch, "m", backend="torch").lowerings[-1]
    assert dict(own.obstacles).keys() == {"static", "decoding"}
    with pytest.raises(ValueError, match="`largest_tokens` reads later tokens; a comparison"):
        hl.compile(arch, "m").init_cache(1)


def test_compiled_in_one_graph_and_exported_for_all_lengths() -> None:
    module = pair("moe(4, 2, 1, balance = none)", torch.float32)[0].layers[0].ffn.eval()
    x, size = torch.randn(2, 7, 16), torch.export.Dim
    free = {"x": {0: size("b", min=2, max=64), 1: size("n", min=2, max=64)}}
    program = torch.export.export(module, (x,), dynamic_shapes=free).module()
    torch.testing.assert_close(program(x[:, :5]), module(x[:, :5]), rtol=1e-4, atol=1e-5)
    made = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(made(x), module(x), rtol=1e-4, atol=1e-5)
    made(x).sum().backward()


@pytest.mark.parametrize(
    ("part", "weights", "why"),
    [
        ("near", "x | linear(4)", "`conv` in it"),
        ("holding", "x | linear(4)", "`held` in it is a part of its own"),
        ("counted", "x | linear(4)", "begins with reads `h`"),
        ("swiglu(1)", "x | linear(4) | split(2)", "they are [2, n, 2]"),
        ("a", "x | linear(4)", "a block"),
    ],
)
def test_what_is_no_expert_is_refused(part: str, weights: str, why: str) -> None:
    more = f"""
    stage held {{ param g[features] = 1; g * x }}
    ffn near {{ out = x | conv(2) | linear }}
    ffn holding {{ out = x | held | linear }}
    ffn counted {{ param g[width] = h; out = g * x | linear }}
    ffn mixed {{ out = x | mixture({part}, {weights}) }}
    """
    with pytest.raises(LoomError) as caught:
        check(parse(more + text("mixed")))
    (found,) = cast(LoomError, caught.value).diagnostics
    assert found.code in ("L236", "L232")
    assert why in f"{found.message} {found.label}"
