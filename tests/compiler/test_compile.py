"""Compiled modules against the reference, and against what PyTorch does with modules."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler import api
from headloom.compiler.checking.check import check
from headloom.compiler.emit.caches import begins_within
from headloom.compiler.facts import decoding
from headloom.compiler.facts.cost import cost
from headloom.compiler.model import Block, Model
from headloom.compiler.pipeline import generate, load
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

from .battery import EXAMPLES, SETTINGS, block, compiled, inputs, oracle

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SEGMENTS = torch.tensor([[0] * 4 + [1] * 7, [2] * 5 + [7] * 3 + [1] * 3])
MODELS = {
    "lm": "vocab = 11; width = 16; layers = [b, c] * 2",
    "tied": "vocab = 11; width = 16; layers = [b]; tie = true; ffn = gelu(2); norm = layer",
    "learned": "vocab = 11; width = 16; layers = [c]; embed_position = learned(12); ffn = none",
    "sinusoidal": "vocab = 11; width = 16; layers = [b]; embed_position = sinusoidal; norm = none",
    "classify": "vocab = 11; width = 16; layers = [b]; head = classify(3)",
    "features": "width = 16; layers = [b, r]",
}
LAYERS = """
block b { heads = 4; kv_heads = 2; position = rope; mask = causal }
block c : b { mask = causal and window(2 + layer) }
block r { heads = 2; mix = gated_delta; mask = causal }
"""


def row(op: str, term: str, count: int = 120) -> str:
    return f" {op} ".join(term.format(each) for each in range(3, count + 3))


LONG = {
    "or": f"mask = causal and ({row('or', 'i - j == {0} and j % {0} != 1')})",
    "and": f"mask = {row('and', '(i - j) % {0} != 1')}",
    "+": f"mask = causal; score = s + {row('+', 'sin(s / {0})')}",
    "*": f"mask = causal; score = s * {row('*', 'cos(s / {0})', 40)}",
}


def can_decode(what: Block) -> bool:
    return decoding.obstacle(what) is None


def reads_lengths(name: str) -> bool:
    return name == "reads_n"


def model(name: str) -> Model:
    return check(parse(f"{LAYERS}\nmodel m {{ {MODELS[name]} }}")).models["m"]


def arguments(what: Model, n: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if what.vocab is None:
        return torch.randn(2, n, what.width, generator=generator, dtype=torch.float64)
    return torch.randint(what.vocab, (2, n), generator=generator)


def gradients(module: nn.Module, given: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    """Return the output, and its gradient for a fixed cotangent, by name."""
    given = {name: each.detach().requires_grad_() for name, each in given.items()}
    y = module(**given, **more)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    wanted = {**given, **dict(module.named_parameters())}
    found = torch.autograd.grad((y * cotangent).sum(), list(wanted.values()), allow_unused=True)
    zeros = (torch.zeros_like(each) for each in wanted.values())
    made = {
        name: zero if each is None else each
        for name, each, zero in zip(wanted, found, zeros, strict=True)
    }
    return {"output": y.detach(), **made}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_block_is_what_it_means(name):
    what = block(name)
    module = compiled(what)
    meaning = oracle(what, module)
    assert set(module.state_dict()) == set(meaning.state_dict())
    given = inputs(what)
    for more in ({}, {"segments": SEGMENTS}):
        mine, theirs = gradients(module, given, **more), gradients(meaning, given, **more)
        assert mine.keys() == theirs.keys()
        for key, each in mine.items():
            assert (each - theirs[key]).abs().max() <= 1e-9, key


@pytest.mark.parametrize("name", SETTINGS)
def test_positions_may_be_given(name):
    what = block(name)
    module = compiled(what)
    meaning = oracle(what, module)
    given = inputs(what)
    shared = torch.arange(5, 16)
    own = torch.stack([torch.arange(11), torch.arange(30, 41)])
    for positions in (shared, own):
        mine, theirs = module(**given, positions=positions), meaning(**given, positions=positions)
        torch.testing.assert_close(mine, theirs, **TIGHT)


DECODING = [name for name in SETTINGS if name != "no_weights" and can_decode(block(name))]


@pytest.mark.parametrize("name", DECODING)
def test_decoding_repeats_the_whole(name):
    what = block(name)
    module = compiled(what)
    given = inputs(what, n=23, m=23)
    segments = torch.arange(23).repeat(2, 1) // 6
    if not begins_within(what):
        segments = torch.zeros_like(segments)
    whole = module(**given, segments=segments)
    for cuts in ([23], [11, 3, 1, 1, 7], [1] * 23, [2, 21]):
        cache = module.init_cache(2, 23)
        parts = []
        for count in cuts:
            at = slice(cache.length, cache.length + count)
            now = {**given, "x": given["x"][:, at]}
            parts.append(module(**now, segments=segments[:, at], cache=cache))
        assert cache.length == 23
        if not reads_lengths(name):
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TIGHT)
    assert cache.nbytes == 2 * cost(what).cache_bytes(23, "float64")


@pytest.mark.parametrize("name", [name for name in SETTINGS if not can_decode(block(name))])
def test_what_cannot_decode_says_so(name):
    module = compiled(block(name))
    with pytest.raises(ValueError, match="cannot decode"):
        module.init_cache(1, 8)


def test_a_ring_forgets_what_no_mask_reaches():
    module = compiled(block("sink"))
    cache = module.init_cache(1, 1000)
    assert cache.kept["k"].shape == (1, 4, 2 + 3, 4)


@pytest.mark.parametrize("name", ["causal", "alibi", "one_key_head"])
def test_decoding_with_positions_of_ones_own(name):
    what = block(name)
    module = compiled(what)
    given = inputs(what, n=9)
    positions = torch.stack([torch.arange(9), 2 * torch.arange(9) + 3])
    whole = module(**given, positions=positions)
    cache = module.init_cache(2, 9)
    parts = [
        module(given["x"][:, at : at + 3], positions=positions[:, at : at + 3], cache=cache)
        for at in (0, 3, 6)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TIGHT)


def test_the_context_is_read_once():
    what = block("cross_bias")
    module = compiled(what)
    given = inputs(what)
    whole = module(**given)
    cache = module.init_cache(2, 11)
    first = module(given["x"][:, :4], context=given["context"], cache=cache)
    rest = module(given["x"][:, 4:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, **TIGHT)
    with pytest.raises(ValueError, match="`context`"):
        module(given["x"])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_parameters_are_counted(name):
    what = block(name)
    module = compiled(what)
    assert cost(what).params == sum(each.numel() for each in module.parameters())


def test_embeddings_are_drawn_once():
    module = api.build_module(model("learned"), Target(), seed=3)
    torch.manual_seed(3)
    for table in (module.embed_tokens, module.embed_positions):
        assert table.weight.requires_grad
        assert torch.equal(table.weight, torch.empty(table.weight.shape).normal_(std=0.02))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_means(name):
    what = model(name)
    module = compiled(what)
    meaning = oracle(what, module)
    assert set(dict(module.named_parameters())) == set(dict(meaning.named_parameters()))
    first = arguments(what)
    y, z = module(first), meaning(first)
    torch.testing.assert_close(y, z, **TIGHT)
    assert cost(what).params == sum(each.numel() for each in module.parameters())
    theirs = dict(meaning.named_parameters())
    mine = dict(module.named_parameters())
    got = torch.autograd.grad(y.sin().sum(), list(mine.values()))
    expected = torch.autograd.grad(z.sin().sum(), [theirs[key] for key in mine])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    if name == "classify":
        return
    cache = module.init_cache(2, 9)
    parts = [module(first[:, at], cache=cache) for at in (slice(0, 5), slice(5, 6), slice(6, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), y, **TIGHT)
    assert sum(each.nbytes for each in cache) == 2 * cost(what).cache_bytes(9, "float64")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_what_it_means(path):
    arch = check(parse(path.read_text()))
    for what in (*arch.blocks.values(), *arch.models.values()):
        module = compiled(what, torch.float32)
        meaning = oracle(what, module)
        given = {"x": arguments(what, 20)} if isinstance(what, Model) else inputs(what, 20)
        given = {
            name: each.float() if each.is_floating_point() else each for name, each in given.items()
        }
        x = given.pop("x")
        torch.testing.assert_close(module(x, **given), meaning(x, **given), rtol=1e-3, atol=1e-3)


# ── what PyTorch does with modules ────────────────────────────────────────────────────────

SOME = [
    "window",
    "sink",
    "alibi",
    "learned_sink",
    "grouped",
    "rope",
    "gate",
    "delta",
    "leaky",
    "levels",
]


@pytest.mark.parametrize("name", SOME)
def test_copies_and_saved_weights_compute_the_same(name):
    what = block(name)
    module = compiled(what)
    given = inputs(what)
    y = module(**given)
    torch.testing.assert_close(copy.deepcopy(module)(**given), y, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = compiled(what, seed=1)
    assert not torch.equal(other(**given), y)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(**given), y, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # nn.RMSNorm's own, under autocast
@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_stays_close(name):
    what = block(name)
    exact = compiled(what, torch.float32)
    half = copy.deepcopy(exact).bfloat16()
    given = {key: each.float() for key, each in inputs(what).items()}
    meaning = oracle(what, exact)(**given)
    small = half(**{key: each.bfloat16() for key, each in given.items()})
    assert small.dtype == torch.bfloat16
    if name not in ("by_stream", "squared_relu"):  # steps and ratios of nearly nothing
        assert (small.float() - meaning).norm() <= 0.1 * meaning.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact(**given)
    assert mixed.isfinite().all()


@pytest.mark.parametrize("name", SOME)
def test_a_block_is_one_graph_for_torch_compile(name):
    what = block(name)
    module = compiled(what)
    given = inputs(what)
    torch._dynamo.reset()
    whole = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(**given), module(**given), **TIGHT)


@pytest.mark.parametrize("name", ["window", "alibi", "grouped", "gate", "delta", "levels"])
def test_a_block_can_be_exported(name):
    what = block(name)
    module = compiled(what)
    given = inputs(what)
    program = torch.export.export(module, (), given)
    torch.testing.assert_close(program.module()(**given), module(**given), **TIGHT)


def test_a_wrong_shape_names_the_argument():
    module = compiled(block("cross"))
    x, context = torch.zeros(2, 5, 16, dtype=torch.float64), torch.zeros(2, 3, 12)
    with pytest.raises(ValueError, match=r"`x` must be \[b, tokens, 16\], it is \[2, 5, 15\]"):
        module(x[..., :15], context=context)
    with pytest.raises(ValueError, match=r"`x` must be \[b, tokens, 16\], it is \[5, 16\]"):
        module(x[0], context=context)
    with pytest.raises(ValueError, match=r"`context` must be \[b, tokens, 12\]"):
        module(x, context=context[..., :11])
    tokens = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="`tokens` must be"):
        compiled(model("lm"))(tokens)


def test_a_full_cache_says_what_it_holds():
    module = compiled(block("causal"))
    cache = module.init_cache(1, 4)
    x = torch.zeros(1, 5, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="holds 4 tokens; 5 were given"):
        module(x, cache=cache)


def test_dropout_acts_in_training_alone():
    what = block("heads = 4; mask = causal; dropout = 0.5".join(("block b { ", " }")))
    module = compiled(what)
    given = inputs(what)
    torch.testing.assert_close(module(**given), oracle(what, module)(**given), **TIGHT)
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(**given), module(**given))
    without = compiled(what.remixed(lambda mix: replace(mix, dropout=0.0))).train()
    torch.testing.assert_close(without(**given), module.eval()(**given), **TIGHT)


def test_two_blocks_of_one_name_get_a_class_each():
    code = generate(model("lm"), Target("torch"))
    assert code.text.count("nn.Module):") == 1 + 2 + 3  # b, c at two windows; ffn, layer, model
    assert load(code) is load(code)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"segments": torch.zeros(2, 4, dtype=torch.int64)},
            r"`segments` must be \[5\] or \[2, 5\]",
        ),
        ({"positions": torch.arange(4)}, r"`positions` must be \[5\] or \[2, 5\], it is \[4\]"),
        ({"positions": torch.zeros(3, 5, dtype=torch.int64)}, "`positions` must be"),
    ],
)
def test_what_stands_for_each_token_has_one_number_a_token(
    given: dict[str, torch.Tensor], message: str
) -> None:
    text = "block a { width = 16; heads = 2; mask = causal and document }"
    module = api.compile(api.load(text, format="loom"))
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 5, 16), **given)


def test_a_cache_is_for_one_batch_size() -> None:
    module = api.compile(
        api.load("block a { width = 16; heads = 2; mask = causal }", format="loom")
    )
    with pytest.raises(ValueError, match="for a batch of 2; 3 sequences"):
        module(torch.randn(3, 5, 16), cache=module.init_cache(2, 8))


def test_kernels_without_a_gpu_say_what_to_do(tmp_path: Path) -> None:
    code = (
        "import torch, headloom as hl\n"
        "a = hl.load('block a { width = 16; heads = 2; mask = causal }', format='loom')\n"
        "hl.compile(a, backend='triton', device='cpu')(torch.randn(1, 5, 16))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert "these kernels need a GPU" in done.stderr


@pytest.mark.parametrize("op", LONG)
def test_long_chains_compile(op):
    block = check(parse(f"block a {{ width = 8; heads = 2; {LONG[op]} }}")).blocks["a"]
    module, given = compiled(block), inputs(block)
    torch.testing.assert_close(module(**given), oracle(block, module)(**given), **TIGHT)
    assert "triton" in generate(block, Target("triton")).text
