"""Logits and a number of each key, by scaled_dot_product_attention: what it takes and gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.pieces.tiles import with_bias

CAUSAL = "heads = 4; head_dim = 4; mask = causal; let c = x | linear(heads); let d = x | linear(1)"
TAKEN = {
    "a difference": "score = s + c[i, h] - c[j, h]",
    "both terms of keys": "score = -c[i, h] - (d[j] - s) + c[j, 2] * tanh(d[j])",
    "for all heads": "score = s + d[j]",
    "a tensor": "param t[heads] = 1; score = s + t[h] * c[j, h] + h * d[j]",
    "grouped": "kv_heads = 2; score = s - c[j, h]",
    "wide values": "kv_heads = 2; value_heads = 4; value_dim = 9; score = s + c[j, h]; scale = 3",
    "a vector of a head": "let w = x | linear | split; score = s + norm(w[h, j])",
    "a feature of the key": "score = s + d[j] * k[h, j, 0]",
    "a factor": "score = 2 * s + c[j, h]",
    "not scaled": "scale = 1; score = s + d[j]",
}
REFUSED = {
    "score = tanh(s) + c[j, h]": "`tanh(s) + c[j, h]` adds to no logit as it is",
    "score = s + c[i, h] * c[j, h]": "`c[i, h] * c[j, h]` is a number of a pair",
    "score = s + mean_keys(s)": "is a number of a pair",
    "score = s - 0.1 * j": "reads more than streams at the key's own token",
    "score = s + norm(k[h, j])": "reads more than streams at the key's own token",
    "score = s + c[j // 4 * 4, h]": "reads more than streams at the key's own token",
    "score = s + c[i, h]": "what it adds is of queries alone",
    "score = s + c[i, h] + d[j]": "what it adds is of queries alone",
    "score = s + c[j, h]; mask = causal and window(3)": "it takes `causal` and `all`",
    "score = s + c[j, h]; normalize = sink": "normalises by softmax only",
    "score = where(d[j] > 0, s, log(0))": "adds to no logit as it is",
    "score = s + c[j, h]; weights = 2 * p": "it cannot change the weights",
}


def arch(body: str) -> hl.Loaded:
    own = [each for each in ("mask", "heads") if f"; {each} = " in body]
    text = CAUSAL.replace("mask = causal; ", "") if "mask" in own else CAUSAL
    return hl.load(f"block a {{ width = 16; {text}; {body} }}", format="loom")


@pytest.mark.parametrize("body", REFUSED)
def test_what_it_does_not_take(body: str) -> None:
    (found,) = hl.explain(arch(body), "a", backend="torch").lowerings
    assert REFUSED[body] in dict(found.obstacles)["keyed"]


def outcome(module: torch.nn.Module, x: Tensor, **given: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x, **given)
    weights = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y.sin().sum(), weights, materialize_grads=True)]


@pytest.mark.parametrize("mask", ["causal", "all"])
@pytest.mark.parametrize("name", TAKEN)
def test_it_is_what_the_score_means(name: str, mask: str) -> None:
    file = arch(TAKEN[name] if mask == "causal" else f"{TAKEN[name]}; mask = all")
    (found,) = hl.explain(file, "a", backend="torch").lowerings
    assert found.path == "keyed"
    assert found.needs == (("plain", "exact") if mask == "causal" else ("plain", "run", "exact"))
    module = hl.compile(file, "a", backend="torch", dtype=torch.float64, seed=0)
    meaning = hl.reference(file, "a", dtype=torch.float64)
    meaning.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padding = torch.ones(2, 9).index_fill(1, torch.tensor([0, 5]), 0)
    for given in ({}, {"attention_mask": padding}):
        for mine, theirs in zip(
            outcome(module, x, **given), outcome(meaning, x, **given), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_half_precision_goes_the_general_way() -> None:
    """A sum of a thousand gates would be rounded to eights, were it a feature of keys."""
    gates = "let g = x | slice(0, 1) | running(sum); score = s + g[i] - g[j]"
    file = arch(gates)
    module = hl.compile(file, "a", backend="torch", dtype=torch.bfloat16, seed=0)
    exact = hl.compile(file, "a", backend="torch", dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0))
    x[..., 0] = -8 + 0.5 * x[..., 0]  # sums to 2,000 and more
    x = x.bfloat16()
    with torch.no_grad():
        assert (module(x).double() - exact(x.double())).abs().max() < 0.05


@pytest.mark.parametrize("features", [(6, 6), (8, 3), (8, 16)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_features_are_as_many_as_a_device_takes(features: tuple[int, int], device: str) -> None:
    d, e = features
    q = torch.ones(2, 4, 5, d, device=device)
    k, v = torch.ones(2, 2, 7, d, device=device), torch.ones(2, 1, 7, e, device=device)
    bias = torch.ones(2, 1, 7, device=device)
    found = with_bias(q, k, v, bias, 0.5)
    (size,) = {each.shape[-1] for each in found}
    assert size == max(d, e) + 1 if device == "cpu" else size % 8 == 0
    assert [each.shape[:3] for each in found] == [(2, 4, 5), (2, 4, 7), (2, 4, 7)]
    if device == "cpu":
        q, k, _ = found
        assert torch.equal(0.5 * (q @ k.mT), torch.full((2, 4, 5, 7), d / 2 + 1))
