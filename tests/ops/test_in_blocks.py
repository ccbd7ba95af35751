"""Stages inside of whole blocks: the emitted module against the reference, training too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import block as block_of
from headloom.compiler.checking.check import check
from headloom.compiler.meaning.reference import reference
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

SETTINGS = {
    "head_linear": "q = x | linear | split | head_linear; out = o | head_linear | merge | linear",
    "spectral": "q = x | linear(reparam = spectral) | split; out = o | merge |"
                " linear(reparam = weight_norm, bias = true)",
    "top_of_softmax": "let e = x | linear(8) | softmax | top(2); v = e | linear | split",
    "argmax": "let e = x | linear | split | argmax; mask = causal and e[h, i] == e[h, j]",
    "slices": "head_dim = 4; let a = x | linear(20); q = a | slice(0, 16) | split;"
              " k = a | slice(4) | split",
    "l1_norm": "q = x | linear | split | l1_norm",
    "conv": "mask = causal; q = x | linear | conv(3) | split; k = x | linear | split | conv(2)",
    "conv_both_ways": "v = x | conv(4, bias = true, causal = false) | linear | split",
    "one_latent": "let e = x | latents(1); v = (x * e) | linear | split; k = (e - x) | split",
    "one_latent_with_heads": "let e = x | latents(1) | split; q = ((x | linear | split) + e)",
    "turned_back": "q = x | linear | split | rope(inverse = true)",
    "step": "let g = x | linear(heads) | step; out = o | gate(g) | merge | linear",
    "straight_through": "let g = x | linear(1) | sigmoid; v = (x * (step(g - 0.5) + g - detach(g)))"
                        " | linear | split",
    "step_in_a_score": "mask = causal; score = s * step(s + 0.1) - detach(abs(s))",
    "recurrence": "mix = linear; mask = causal; k = x | linear | split | softmax",
    "vectors": "param a[head_dim] = normal(1); param b[head_dim] = normal(1);"
               " let c = exp(dot(a, b)) - norm(a - b); out = (c * o + mean(v)) | merge | linear",
    "vectors_of_heads": "param w[heads, head_dim] = normal(1);"
                        " let f = x | linear(heads * head_dim);"
                        " out = (o * dot(w, w) + q * dot(f, q) * norm(k)) | merge | linear",
    "noise": "let e = x | noise(0.5) | step; v = (x + e) | linear | split",
    "bernoulli": "let keep = x | linear | bernoulli(0.5); v = (x * keep) | linear | split",
    "drop_heads": "out = o | drop_heads(2) | merge | linear",
}  # fmt: skip


def pair(settings: str) -> tuple[nn.Module, nn.Module]:
    """Return the emitted module of a block and its meaning, with the same weights."""
    what = block_of(check(parse(f"block b {{ heads = 4; {settings} }}")), "b", 16)
    module = build_module(what, Target("torch"), dtype=torch.float64, seed=1)
    meaning = reference(what, dtype=torch.float64)
    meaning.load_state_dict(module.state_dict())
    return module, meaning


def test_functions_over_features_are_what_they_say() -> None:
    """`dot` of tensors is a number, of streams a number a token; a stage may use them too."""
    text = """
    stage unit = x / norm(x)
    block b { heads = 2; width = 8; param a[4] = 1 + h; param w[heads, head_dim] = h
      let one  = dot(a, a) * x
      let each = dot(w, q) + sum(a)
      let long = x | unit
      out = ((o * each) | merge) + one + long }
    """
    what = block_of(check(parse(text)), "b", 8)
    meaning = reference(what, dtype=torch.float64)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = (x @ dict(meaning.named_parameters())["q_proj.weight"].mT).unflatten(-1, (2, 4))
    found = meaning.layer(x, ())[1]
    a, w = torch.arange(1.0, 5).double(), torch.tensor([[0.0], [1.0]]).double()
    torch.testing.assert_close(found["one"], 30 * x)
    torch.testing.assert_close(found["each"][..., 0], ((q * w).sum(-1) + a.sum()).mT)
    torch.testing.assert_close(found["long"].square().sum(-1), torch.ones(1, 3).double())


def outcome(module: nn.Module, training: bool) -> dict[str, Tensor]:
    """Return the output and every gradient, by name."""
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(4)
    y = module.train(training)(x)
    wanted = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(y.cos().sum(), list(wanted.values()), materialize_grads=True)
    return {"output": y.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_block_is_what_it_means(name: str, training: bool) -> None:
    module, meaning = pair(SETTINGS[name])
    mine, theirs = outcome(module, training), outcome(meaning, training)
    assert mine.keys() == theirs.keys()
    for key, each in mine.items():
        torch.testing.assert_close(each, theirs[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_stage_reads_twice_is_one(training: bool) -> None:
    """Its weights are there once, and it draws once."""
    text = """
    stage unit = x / (1 + norm(x))
    block b { heads = 4; width = 16; mask = causal
      q = x | linear | noise(0.5) | split | unit | linear
      k = x | linear | conv(3) | split | unit }
    """
    what = block_of(check(parse(text)), "b", 16)
    module = build_module(what, Target("torch"), dtype=torch.float64, seed=1)
    meaning = reference(what, dtype=torch.float64)
    names = ["q_proj_0", "q_proj_1", "k_proj", "k_conv", "v_proj", "o_proj"]
    assert list(module.state_dict()) == [f"{name}.weight" for name in names]
    meaning.load_state_dict(module.state_dict())
    mine, theirs = outcome(module, training), outcome(meaning, training)
    for key, each in mine.items():
        torch.testing.assert_close(each, theirs[key], rtol=1e-9, atol=1e-9, msg=key)
    cache = module.eval().init_cache(2, 7)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [module(token, cache=cache) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), module(x))


def test_two_draws_are_two() -> None:
    module, _ = pair("let a = x | noise(1); let b = x | noise(1); v = (a - b) | split")
    assert outcome(module, training=True)["output"].abs().max() > 0.01
    assert outcome(module, training=False)["output"].abs().max() == 0
