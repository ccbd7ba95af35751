"""What only training does: terms of the loss, stages that draw, and that both forms agree on it."""

from __future__ import annotations

import copy

import pytest
import torch

from headloom.compiler.api import build_module
from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import reference
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

from .battery import CAUSAL, SETTINGS, block, compiled, inputs, oracle

DRAWING = {
    "tokens": "heads = 4; let keep = x | bernoulli(0.6); let own = x | bernoulli(0.5); "
    "mask = causal and (keep[i] > 0 and keep[j] > 0 or keep[i] <= 0 and own[i] > 0 and i == j)",
    "heads": f"{CAUSAL}; out = o | drop_heads(2) | merge | linear",
    "noise": f"{CAUSAL}; q = x | linear | noise(0.5) | split; "
    "out = o | noise(0.1) | merge | linear",
    "pairs": f"{CAUSAL}; score = where(rank_keys(s) < 3, coin(0.5) * s, s)",
}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("regularized")])
def test_the_terms_of_the_loss_agree(name):
    what = block(name)
    module = compiled(what).train()
    meaning = oracle(what, module).train()
    given = inputs(what)
    losses = []
    for each in (module, meaning):
        each(**given)
        loss = each.auxiliary_loss()
        grads = torch.autograd.grad(loss, list(each.parameters()), allow_unused=True)
        losses.append((loss.detach(), dict(zip(dict(each.named_parameters()), grads, strict=True))))
    (one, got), (two, expected) = losses
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    assert float(one) != 0
    for key, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(got[key], grad, rtol=1e-8, atol=1e-9)
        assert (grad is None) == (got[key] is None), key
    assert float(module.auxiliary_loss()) == 0  # it is given once
    copy.deepcopy(module)


@pytest.mark.parametrize("name", DRAWING)
def test_one_seed_draws_the_same(name):
    what = find(check(parse(f"block b {{ width = 16; {DRAWING[name]} }}")), None)
    module = compiled(what)
    meaning = oracle(what, module)
    given = inputs(what)
    torch.testing.assert_close(module(**given), meaning(**given), rtol=1e-9, atol=1e-9)
    outputs = []
    for each in (module.train(), meaning.train()):
        torch.manual_seed(5)
        outputs.append(each(**given))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(outputs[0], module.eval()(**given))


def test_a_model_adds_up_its_layers():
    text = """
    block a { heads = 2; mask = causal; regularize = 0.5 * mean(entropy(o)) }
    block b { heads = 2; mask = causal }
    model m { width = 16; layers = [a, b, a] }
    """
    what = find(check(parse(text)), "m")
    module = build_module(what, Target("torch"), dtype=torch.float64).train()
    meaning = reference(what, dtype=torch.float64).train()
    meaning.load_state_dict(module.state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    module(x), meaning(x)
    torch.testing.assert_close(module.auxiliary_loss(), meaning.auxiliary_loss())


def test_keys_in_two_sets_are_one_softmax():
    """Joining attention to near keys with attention to the others is attention to all."""
    text = """
    block whole { width = 16; heads = 4; mask = causal }
    block parts : whole {
      branch near { mask = causal and window(3) }
      branch far { mask = j <= i - 3 }
      out = joint(near, far) | merge | linear
    }
    """
    arch = check(parse(text))
    whole, parts = (compiled(find(arch, name)) for name in ("whole", "parts"))
    parts.load_state_dict(whole.state_dict())
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(parts(x), whole(x))
