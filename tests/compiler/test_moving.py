"""What training moves without a gradient: `NAME <- expression` beside a `param`."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import headloom as hl
from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.pipeline import generate, lower
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify.cases import Difference, Subject
from headloom.compiler.verify.verify import CHECKS
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.format import format_loom, format_yaml
from headloom.grammar.from_yaml import parse_yaml
from headloom.grammar.parse import parse

from .battery import compiled, oracle

BLOCK = """block b {
  width = 16; heads = 4; mask = causal
  let r = x | linear(heads) | sigmoid
  param t[heads] = 0.5
  t <- 0.9 * t + 0.1 * mean_each(r)
  score = s * t[h]
  out   = o | gate(r * t) | merge | linear
}"""
LAYER = """block a { heads = 2; mask = causal }
stage centred { param c[features] = 0; c <- c + 0.5 * mean_each(x - c); x - c }
ffn counted { param steps = 0; steps <- steps + 1; out = steps * x | linear }
layer both(attn, ffn) { out = x + (x | centred | attn | ffn) }
model m { width = 8; layers = [both(a, counted)] * 2 }"""


def made(text: str, name: str | None = None):
    """Return a module and its meaning, with the same weights, in training."""
    what = find(check(parse(text)), name)
    module = compiled(what).train()
    return module, oracle(what, module).train()


def tokens(*size: int, seed: int = 0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_buffer_of_the_state_dict():
    module, _ = made(BLOCK)
    assert "t" in module.state_dict()
    assert "t" not in dict(module.named_parameters())
    assert not module.t.requires_grad
    y = module(tokens(1, 3, 16))
    y.sum().backward()
    assert module.t.grad is None
    assert hl.explain(parse_and_check(BLOCK), "b").params == sum(
        each.numel() for each in module.parameters()
    )


def parse_and_check(text: str):
    return check(parse(text))


def test_a_step_of_training_moves_it_after_what_it_gives():
    module, _ = made(BLOCK)
    x = tokens(2, 5, 16)
    before = module.t.clone()
    expected = copy.deepcopy(module).eval()(x)
    torch.testing.assert_close(module(x), expected)
    r = torch.sigmoid(module.r_proj(x)).mean((0, 1))
    torch.testing.assert_close(module.t, 0.9 * before + 0.1 * r)


def test_in_evaluation_it_is_a_constant():
    module, meaning = made(BLOCK)
    for each in (module.eval(), meaning.eval()):
        before = each.t.clone()
        each(tokens(2, 5, 16))
        assert torch.equal(each.t, before)


@pytest.mark.parametrize("seen", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("text", "name"), [(BLOCK, "b"), (LAYER, "m")])
def test_it_moves_as_its_meaning_does_by_real_tokens(text, name, seen):
    module, meaning = made(text, name)
    given = {}
    if seen == "padded":
        given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    if seen == "packed":
        given["segments"] = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    for step in range(3):
        x = tokens(2, 5, 16 if name == "b" else 8, seed=step)
        if seen == "padded":
            x[given["attention_mask"] == 0] = torch.nan
        torch.testing.assert_close(module(x, **given), meaning(x, **given))
    for key, value in meaning.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, msg=key)


def test_each_layer_moves_its_own():
    module, _ = made(LAYER, "m")
    for step in range(3):
        module(tokens(1, 4, 8, seed=step))
    state = module.state_dict()
    assert [float(state[f"layers.{at}.ffn.steps"]) for at in range(2)] == [3, 3]
    one, two = (state[key] for key in state if key.endswith(".c"))
    assert not torch.allclose(one, two)


def test_means_stand_in_means():
    text = "block b { width = 4; heads = 1; param c[width] = 0; out = (o | merge | linear) * c; "
    text += "c <- mean_each((x - mean_each(x)) ** 2) }"
    for module in made(text):
        x = tokens(2, 5, 4)
        module(x, segments=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]))
        torch.testing.assert_close(module.c, x.flatten(0, 1).var(0, unbiased=False))


def steps(call, module, count: int = 3):
    """Return what is moved and every gradient after each step of training."""
    found = []
    for step in range(count):
        x = tokens(2, 5, 16, seed=step).requires_grad_()
        call(x).square().sum().backward()
        grads = [each.grad.clone() for each in module.parameters()]
        found.append([module.t.clone(), x.grad, *grads])
        module.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_made_again_for_its_gradients_moves_nothing(reentrant):
    module, _ = made(BLOCK)
    again = copy.deepcopy(module)
    expected = steps(module, module)
    got = steps(lambda x: checkpoint(again, x, use_reentrant=reentrant), again)
    torch.testing.assert_close(got, expected)
    assert all(not torch.equal(one[0], two[0]) for one, two in pairwise(expected))


READ = {
    "a score": "score = s * t[h]",
    "a similarity": "similarity = dot(q, k) - t[h] * norm(q - k)",
    "a mask": "mask = causal and (i - j) * t[h] < 2",
    "a distance": "score = s - t[h] * abs(i - j)",
    "a normaliser": "normalize = exp(s) / max(sum, t[h])",
    "weights": "weights = p * t[h]",
    "a number of rows": "out = (o | merge | linear) + (rows(o, p * t[h]) | mean_heads)",
    "sums over queries": "weights = p / (1 + t[h] * running_queries(p))",
    "a selection": "select = top(3, s * t[h])",
    "what is carried": "let a = x | linear | split | l2_norm; carry = k - t[h] * a * dot(a, k)",
    "a recurrence": "mix = fading",
    "a recurrence by tokens": "mix = bent",
    "a term of the loss": "let r = x | linear(heads) | sigmoid; "
    "out = o | gate(r * t) | merge | linear; regularize = mean(t * r) ** 2",
}
MIXERS = """
mix fading { state S[head_dim, value_dim] = 0; S <- sigmoid(t) * S + outer(k, v); o <- q @ S }
mix bent { state S[head_dim, value_dim] = 0; S <- tanh(t * S + outer(k, v)); o <- q @ S }
"""


@pytest.mark.parametrize("reads", READ)
def test_whatever_reads_it_has_what_it_was_in_the_backward_pass(reads):
    mask = "" if "mask" in READ[reads] else "mask = causal; "
    text = f"block b {{ width = 16; heads = 4; {mask}"
    text += "param t[heads] = 0.5; t <- t + 0.1 * mean_each(x | slice(0, 4)); "
    text += READ[reads] + "}" + MIXERS
    module, meaning = made(text, "b")
    for step in range(2):
        found = []
        for each in (module, meaning):
            x = tokens(2, 5, 16, seed=step).requires_grad_()
            y = each(x)
            loss = y.square().sum() + each.auxiliary_loss() if "loss" in reads else y.square().sum()
            found.append([y, *torch.autograd.grad(loss, [x, *each.parameters()])])
        torch.testing.assert_close(*found)
    torch.testing.assert_close(module.t, meaning.t)


@pytest.mark.parametrize("reads", ["score = s * t[h]", "mix = fading", "mix = bent"])
def test_kernels_read_what_it_was(reads):
    text = f"block b {{ width = 16; heads = 2; mask = causal; param t[heads] = 0.5; {reads}; "
    text += "t <- t + 0.1 * mean_each(x | slice(0, 2)) }" + MIXERS
    what = find(check(parse(text)), "b")
    assert {each.path for each in lower(what, Target("triton")).lowerings.values()} == {"triton"}
    module = build_module(what, Target("triton"), dtype=torch.float32, seed=0).train()
    meaning = reference(what, dtype=torch.float64).train()
    meaning.load_state_dict(module.state_dict())
    for step in range(2):
        x = tokens(1, 5, 16, seed=step)
        found = []
        for each, own in ((module, x.float()), (meaning, x)):
            y = each(own)
            grads = torch.autograd.grad(y.square().sum(), list(each.parameters()))
            found.append([each.double() for each in (y, *grads)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.t.double(), meaning.t)


def test_torch_compile_moves_it_too():
    module, _ = made(BLOCK)
    again = copy.deepcopy(module)
    expected = steps(module, module, 1)
    got = steps(torch.compile(again, fullgraph=True, backend="eager"), again, 1)
    torch.testing.assert_close(got, expected)


def test_verify_holds_it_to_its_meaning():
    what = find(check(parse(BLOCK)), None)
    code = generate(what, Target("torch"))
    wrong = replace(code, text=code.text.replace("0.9 * t_exact", "0.8 * t_exact"))
    assert wrong != code
    cases, _ = CHECKS["training"](Subject.of(what, code))
    assert cases > 0
    with pytest.raises(Difference, match="what t is moved to differs"):
        CHECKS["training"](Subject.of(what, wrong))


def test_a_copy_goes_on_by_itself():
    module, _ = made(BLOCK)
    module(tokens(1, 3, 16))
    other = copy.deepcopy(module)
    before = module.t.clone()
    other(tokens(1, 3, 16, seed=1))
    assert torch.equal(module.t, before)
    assert not torch.equal(other.t, before)


def test_small_steps_are_kept_in_a_module_of_less():
    text = "block b { width = 8; heads = 2; param t[heads] = 1; t <- t + 0.001; score = s * t[h] }"
    module = compiled(find(check(parse(text)), None)).to(torch.bfloat16).train()
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    for _ in range(3):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert module.t.dtype == torch.float32
    torch.testing.assert_close(module.t, torch.full((2,), 1.003))
    module.load_state_dict(module.state_dict())
    assert module.double().t.dtype == torch.float64


def test_autocast_moves_it_in_its_own_precision():
    module = compiled(find(check(parse(BLOCK)), None)).float().train()
    before = module.t.clone()
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 3, 16)).sum().backward()
    assert module.t.dtype == torch.float32
    assert not torch.equal(module.t, before)


def test_what_is_exported_holds_it_still():
    module = made(BLOCK)[0].eval()
    program = torch.export.export(module, (tokens(2, 5, 16),))
    assert not program.graph_signature.buffers_to_mutate


def test_one_made_on_no_device_takes_it_up():
    module, _ = made(BLOCK)
    other = hl.compile(check(parse(BLOCK)), "b", device="meta", dtype="float64")
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    torch.testing.assert_close(other.eval()(tokens(1, 3, 16)), module.eval()(tokens(1, 3, 16)))


def test_who_inherits_says_otherwise():
    text = BLOCK + "\nblock slower : b { t <- 0.5 * t }"
    module, _ = made(text, "slower")
    before = module.t.clone()
    module(tokens(1, 3, 16))
    torch.testing.assert_close(module.t, before / 2)


@pytest.mark.parametrize("text", [BLOCK, LAYER])
def test_it_is_written_in_both_forms(text):
    file = parse(text)
    assert parse(format_loom(file)) == file
    assert parse_yaml(format_yaml(file)) == file


WRONG = {
    "t <- t + 1": "training moves a `param`",
    "const t[heads] = 0; t <- t + 1": "training moves a `param`",
    "let t = x; t <- 0.5 * t": "training moves a `param`",
    "param t[heads] = 0; t <- t + (x | linear(heads))": "what is moved has no gradient",
    "let r = x | linear(heads); param t[heads] = 0; t <- t + r": "not one number for the whole",
    "param t[width] = 0; t <- t + (x | mean_tokens)": "not one number for the whole batch",
    "param t[heads] = 0; t <- mean(x)": "does not have the shape",
    "param t[heads, 2, 2] = 0; t <- t * 2": "training moves numbers and features",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_moved_is_said(text):
    with pytest.raises(LoomError) as problem:
        check(parse(f"block b {{ width = 16; heads = 4; mask = causal; {text} }}"))
    (found,) = problem.value.diagnostics
    assert found.code == "L244"
    assert WRONG[text] in found.message


def test_what_runs_several_times_is_not_moved():
    ffn = "ffn f { param w = 0; w <- w + 1; out = w * x }\nblock a { heads = 2 }\n"
    for model in (
        "model m { width = 8; layers = loop(2, [a]); ffn = f }",
        "model m { width = 8; layers = [a] * 2; ffn = once(f) }",
    ):
        with pytest.raises(LoomError) as problem:
            check(parse(ffn + model))
        assert [each.code for each in problem.value.diagnostics] == ["L244"]


def test_experts_branches_and_scores_move_nothing():
    experts = (
        "block a { heads = 2 }\nffn f { param c = 1; c <- c + 1; out = c * x }\n"
        "ffn g { let w = x | linear(4) | softmax; out = x | mixture(f, w) }\n"
        "model m { width = 8; layers = [a]; ffn = g }"
    )
    branch = "block b { heads = 2; param t = 1; branch c { t <- t + 1 }; out = (o + c) | merge }"
    score = "score f { param t = 1; t <- t + 1; s * t }\nblock b { heads = 2; score = f }"
    for text, code in ((experts, "L236"), (branch, "L202"), (score, "L244")):
        with pytest.raises(LoomError) as problem:
            check(parse(text))
        assert {each.code for each in problem.value.diagnostics} == {code}


def test_it_is_said_once():
    text = "block b { heads = 2; param t = 1; t <- t + 1; t <- t + 2; score = s * t }"
    with pytest.raises(LoomError) as problem:
        check(parse(text))
    assert [each.code for each in problem.value.diagnostics] == ["L211"]
