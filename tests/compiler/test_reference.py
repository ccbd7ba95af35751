"""Parameters by name, and models, against layers written out here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headloom.compiler.checking.check import check, find
from headloom.compiler.facts.parameters import constants, initial, model_weights, weights
from headloom.compiler.meaning.reference import ReferenceModel, reference, sinusoidal
from headloom.compiler.model import Block, Model
from headloom.grammar.expr import TRUE
from headloom.grammar.parse import parse, parse_expression
from headloom.ops import Weight

BLOCK = """
block b {
  heads = 4; kv_heads = 2
  let gate = x | linear(heads * value_dim, bias = true) | sigmoid
  param extra[heads, 3] = normal(0.5)
  q = x | linear(24) | rms_norm | linear | split
  k = x | linear | split | rms_norm
  position = alibi
  score = s + extra[h, 0]
  normalize = sink
  mask = causal
  out = o | merge | gate(gate) | linear
}
"""


def block(text: str = BLOCK, width: int = 16) -> Block:
    found = find(check(parse(text)), "b", width)
    assert isinstance(found, Block)
    return found


def model(body: str, text: str = BLOCK) -> Model:
    found = find(check(parse(f"{text}\nmodel m {{ {body} }}")), "m")
    assert isinstance(found, Model)
    return found


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def test_a_blocks_parameters_have_the_names_people_expect() -> None:
    shapes = {each.name: each.shape for each in weights(block())}
    assert shapes.pop("gate_proj.weight") == (16, 16)
    assert shapes.pop("gate_proj.bias") == (16,)
    assert shapes == {
        "q_proj_0.weight": (24, 16),
        "q_norm.weight": (24,),
        "q_proj_1.weight": (16, 24),
        "k_proj.weight": (8, 16),
        "k_norm.weight": (4,),
        "v_proj.weight": (8, 16),
        "extra": (4, 3),
        "z": (4,),
        "o_proj.weight": (16, 16),
    }
    assert list(shapes)[-1] == "o_proj.weight"
    assert [each.name for each in constants(block())] == ["slope"]


def test_the_state_dict_has_these_names_and_shapes() -> None:
    for what, names in (
        (block(), weights(block())),
        (m := model("vocab = 11; width = 16; layers = [b] * 2"), model_weights(m)),
    ):
        module = reference(what)
        state = {name: tuple(each.shape) for name, each in module.state_dict().items()}
        assert state == {each.name: each.shape for each in names}
        assert {name for name, _ in module.named_parameters()} == set(state)


def test_a_models_parameters() -> None:
    m = model("vocab = 11; width = 16; layers = [b]; embed_position = learned(32); norm = layer")
    names = [each.name for each in model_weights(m)]
    assert names[:2] == ["embed_tokens.weight", "embed_positions.weight"]
    assert [name for name in names if "attn." not in name][2:] == [
        "layers.0.attn_norm.weight",
        "layers.0.attn_norm.bias",
        "layers.0.ffn_norm.weight",
        "layers.0.ffn_norm.bias",
        "layers.0.ffn.gate_proj.weight",
        "layers.0.ffn.up_proj.weight",
        "layers.0.ffn.down_proj.weight",
        "norm.weight",
        "norm.bias",
        "lm_head.weight",
    ]
    m = model("width = 16; layers = [b]; ffn = gelu(4); norm = none; head = classify(3)")
    names = [each.name for each in model_weights(m)]
    assert [name for name in names if "attn." not in name] == [
        "layers.0.ffn.up_proj.weight",
        "layers.0.ffn.down_proj.weight",
        "head.weight",
        "head.bias",
    ]


# ── first values ─────────────────────────────────────────────────────────────────────────


def drawn(weight: Weight, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return initial(weight, torch.Generator().manual_seed(seed), dtype)


def test_first_values() -> None:
    linear = drawn(Weight("w", (200, 25), "linear"))
    assert linear.abs().max() <= 0.2
    assert math.isclose(linear.std(), 0.2 / math.sqrt(3), rel_tol=0.05)
    assert math.isclose(drawn(Weight("e", (100, 100), "embedding")).std(), 0.02, rel_tol=0.05)
    assert (drawn(Weight("a", (3,), "ones")) == 1).all()
    assert (drawn(Weight("a", (3,), "zeros")) == 0).all()
    with pytest.raises(ValueError, match="`strange` is not a way"):
        drawn(Weight("a", (3,), "strange"))


def test_first_values_by_expression() -> None:
    slope = drawn(Weight("slope", (8,), parse_expression("2 ** (-8 * (h + 1) / 8)")))
    torch.testing.assert_close(slope, torch.tensor([2.0**-h for h in range(1, 9)]).double())
    table = drawn(Weight("t", (3, 4), parse_expression("h + 0.25")))
    assert table.tolist() == [[h + 0.25] * 4 for h in range(3)]
    assert drawn(Weight("s", (), parse_expression("1 / 3"))).item() == 1 / 3
    assert drawn(Weight("t", (2, 2), TRUE)).tolist() == [[1, 1], [1, 1]]
    noise = drawn(Weight("n", (100, 100), parse_expression("3 + normal(0.5)")))
    assert math.isclose(noise.mean(), 3, abs_tol=0.02)
    assert math.isclose(noise.std(), 0.5, rel_tol=0.03)


def test_one_seed_gives_the_same_weights_in_every_dtype() -> None:
    exact = reference(block(), dtype=torch.float64, seed=5).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        for name, each in reference(block(), dtype=dtype, seed=5).state_dict().items():
            assert torch.equal(each, exact[name].to(dtype))
    other = reference(block(), dtype=torch.float64, seed=6).state_dict()
    assert not torch.equal(other["k_proj.weight"], exact["k_proj.weight"])


# ── models ───────────────────────────────────────────────────────────────────────────────


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def test_a_model_is_its_layers() -> None:
    """With blocks that attend plainly; everything around them by torch's own functions."""
    m = model(
        "vocab = 11; width = 16; layers = [b] * 2; embed_position = sinusoidal",
        "block b { heads = 4; mask = causal }",
    )
    module = reference(m, dtype=torch.float64, seed=2)
    w = module.state_dict()
    w = {name: each + 0.1 if "norm" in name else each for name, each in w.items()}
    module.load_state_dict(w)
    at = torch.arange(7)[:, None] / 10000 ** (2 * torch.arange(8).double() / 16)
    code = torch.empty(7, 16).double()
    code[:, 0::2], code[:, 1::2] = at.sin(), at.cos()
    x = w["embed_tokens.weight"][TOKENS] + code
    for n in range(2):
        y = rms(x, w[f"layers.{n}.attn_norm.weight"])
        q, k, v = (
            (y @ w[f"layers.{n}.attn.{each}_proj.weight"].T).unflatten(-1, (4, 4)).transpose(1, 2)
            for each in "qkv"
        )
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + o.transpose(1, 2).flatten(2) @ w[f"layers.{n}.attn.o_proj.weight"].T
        y = rms(x, w[f"layers.{n}.ffn_norm.weight"])
        gate = functional.silu(y @ w[f"layers.{n}.ffn.gate_proj.weight"].T)
        up = y @ w[f"layers.{n}.ffn.up_proj.weight"].T
        x = x + (gate * up) @ w[f"layers.{n}.ffn.down_proj.weight"].T
    logits = rms(x, w["norm.weight"]) @ w["lm_head.weight"].T
    torch.testing.assert_close(module(TOKENS), logits, rtol=1e-10, atol=1e-10)


def test_positions_of_a_model() -> None:
    code = sinusoidal(torch.arange(4)[None], 5)
    assert code.shape == (1, 4, 5)
    assert math.isclose(code[0, 3, 4], math.sin(3 / 10000 ** (4 / 5)))
    assert math.isclose(code[0, 3, 3], math.cos(3 / 10000 ** (2 / 5)))
    learned = reference(model("vocab = 11; width = 16; layers = [b]; embed_position = learned(8)"))
    shifted = torch.arange(7) + 1
    assert not torch.equal(learned(TOKENS), learned(TOKENS, positions=shifted))
    with pytest.raises(ValueError, match="position 9 is past the 8 learned"):
        learned(TOKENS, positions=torch.arange(7) + 3)


def test_tied_embeddings() -> None:
    m = model("vocab = 11; width = 16; layers = [b]; tie = true")
    module = reference(m, dtype=torch.float64)
    assert "lm_head.weight" not in module.state_dict()
    features = copy.deepcopy(module)
    assert isinstance(features, ReferenceModel)
    hidden = reference(
        model("vocab = 11; width = 16; layers = [b]; head = none"), dtype=torch.float64
    )
    hidden.load_state_dict(module.state_dict())
    table = module.get_parameter("embed_tokens.weight")
    torch.testing.assert_close(features(TOKENS), hidden(TOKENS) @ table.T)


def test_heads_and_raw_features() -> None:
    m = model("width = 16; layers = [b]; ffn = gelu(2); norm = layer; head = classify(3)")
    module = reference(m, dtype=torch.float64)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).double()
    assert module(x).shape == (2, 3)
    bare = reference(
        model("width = 16; layers = [b]; ffn = gelu(2); norm = layer; head = none"),
        dtype=torch.float64,
    )
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if "head." not in k})
    head = module.get_parameter("head.weight"), module.get_parameter("head.bias")
    torch.testing.assert_close(module(x), functional.linear(bare(x).mean(1), *head))
    with pytest.raises(ValueError, match=r"`x` should be \[b, tokens, 16\]"):
        module(x[..., :4])


def test_segments_reach_every_layer() -> None:
    text = "block b { heads = 2; mask = causal and document; position = rope }"
    module = reference(model("vocab = 11; width = 16; layers = [b] * 2", text), dtype=torch.float64)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    whole = module(TOKENS, segments=segments)
    torch.testing.assert_close(whole[:, :3], module(TOKENS[:, :3]))
    torch.testing.assert_close(whole[:, 3:], module(TOKENS[:, 3:], positions=torch.arange(3, 7)))


def test_dropout_is_for_training_only() -> None:
    module = reference(model("vocab = 11; width = 16; layers = [b]; dropout = 0.5"))
    assert not torch.equal(module(TOKENS), module(TOKENS))
    module.eval()
    still = reference(model("vocab = 11; width = 16; layers = [b]"))
    assert torch.equal(module(TOKENS), still(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_models_in_other_dtypes_stay_near(dtype: torch.dtype) -> None:
    m = model("vocab = 11; width = 16; layers = [b] * 2")
    y = reference(m, dtype=dtype, seed=4)(TOKENS)
    assert y.dtype == dtype
    exact = reference(m, dtype=torch.float64, seed=4)(TOKENS)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_without_gradients_the_numbers_are_the_same() -> None:
    text = "block b { heads = 2; normalize = entmax(1.5); mask = causal }"
    module = reference(block(text), dtype=torch.float64)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        y = module(x)
    torch.testing.assert_close(y.clone(), module(x).detach(), rtol=1e-12, atol=1e-12)


def test_a_list_is_a_list_where_a_row_has_as_many_tokens():
    """What came out for a row of three tokens was laid out as if it were of these tokens."""
    text = "block a { width = 16; heads = 2; q = latents(3) | linear | split }"
    meaning = reference(find(check(parse(text)), "a"), dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    alone = torch.cat([meaning(x[:1, 2:]), meaning(x[1:, :4])])
    torch.testing.assert_close(meaning(x, attention_mask=mask), alone)
