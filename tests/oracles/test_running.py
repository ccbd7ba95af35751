"""Mechanisms of the zoo that run along rows and columns of a map, against what others wrote.

Oracles: the references of flash-linear-attention, and whole layers of x-transformers. Compared are
the output and the gradients of the input and of every weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import headloom as hl
from headloom.compiler import zoo

from .others import Widened, file_beside, file_of, in_double

Layer = Callable[[nn.Module, Tensor], Tensor]
LENGTHS = (1, 9, 34)


def module_of(name: str, text: str | None = None) -> nn.Module:
    """Compile a mechanism of the zoo, or its text with changes, with weights of some size."""
    arch = hl.zoo(name).arch if text is None else hl.load(text, format="loom")
    module = hl.compile(arch, name, dtype=torch.float64, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.parameters():
            each += 0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
    return module


def tokens_in(tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def heads_of(x: Tensor, heads: int = 4) -> Tensor:
    """Return x [b, n, heads · d] as [b, n, heads, d]."""
    return x.unflatten(-1, (heads, -1))


def assert_same(module: nn.Module, layer: Layer, x: Tensor, tolerance: float = 1e-9) -> None:
    ours, theirs = module(x), layer(module, x)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).to(x)
    weights = dict(module.named_parameters())
    found = [
        torch.autograd.grad(y, [x, *weights.values()], upstream, materialize_grads=True)
        for y in (ours, theirs)
    ]
    for name, one, other in zip(["x", *weights], *found, strict=True):
        off = (one - other).abs().max().item() / max(1.0, other.abs().max().item())
        assert off <= tolerance, f"gradient of {name}: off by {off:.1e}"


# flash-linear-attention


def stick_breaking(module: nn.Module, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/stickbreaking_attn/naive.py")
    q, k, v = (heads_of(each(x)) for each in (module.q_proj, module.k_proj, module.v_proj))
    mixed, _ = naive.naive_stickbreaking_attn(q, k, v)
    return module.o_proj(mixed.flatten(2))


def deltaformer(module: nn.Module, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/deltaformer/naive.py")
    q, k, w = (heads_of(each(x)) for each in (module.q_proj, module.k_proj, module.w_proj))
    with Widened():
        mixed = naive.naive_deltaformer_attn(q, k, w, module.beta_proj(x).sigmoid())
    return module.o_proj(mixed.flatten(2))


def path(module: nn.Module, x: Tensor) -> Tensor:
    naive = file_of("fla-core", "fla/ops/path_attn/naive.py")
    q, k, v = (heads_of(each(x)) for each in (module.q_proj, module.k_proj, module.v_proj))
    w = functional.pad(module.w_proj_1(module.w_proj_0(x)).mT, (2, 0))
    w = heads_of(functional.conv1d(w, module.w_conv.weight[:, None], groups=w.shape[1]).mT)
    w = functional.silu(w)
    w = w * (w.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    beta, fades = 2 * module.b_proj(x).sigmoid(), x.new_zeros(*x.shape[:2], 4)
    if hasattr(module, "g_proj"):
        fades = functional.logsigmoid(module.g_proj(x))
    with in_double():
        mixed = naive.naive_path_attn(q, k, v, w, beta, fades, 8**-0.5)
    return module.o_proj(mixed.flatten(2))


def cyclic_flow(module: nn.Module, x: Tensor) -> Tensor:
    naive = file_beside("fla-core", "fla/ops/cyfa", "naive")
    q, k, v = (heads_of(each(x)) for each in (module.q_proj, module.k_proj, module.v_proj))
    with in_double():
        mixed, _ = naive.naive_recurrent_cyfa(
            q,
            k,
            v,
            functional.logsigmoid(module.gamma_proj(x)),
            module.time_proj(x),
            module.beta_proj(x).sigmoid(),
            module.readout,
            module.q_norm.weight,
            module.k_norm.weight,
            1e-6,
            1e-6,
        )
    return module.o_proj(mixed.flatten(2))


# x-transformers


@cache
def attention_of(**options: Any) -> nn.Module:
    """Return an attention layer of x-transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, as it is imported
        layers = pytest.importorskip("x_transformers.x_transformers")
    return layers.Attention(32, dim_head=8, heads=4, causal=True, **options).double()


def with_weights(layer: nn.Module, module: nn.Module, x: Tensor, **more: Tensor) -> Tensor:
    """Run their layer with our projections, and `more` of its weights."""
    weights = {name.replace("__", "."): each for name, each in more.items()}
    for theirs, ours in zip(("q", "k", "v", "out"), "qkvo", strict=True):
        weights[f"to_{theirs}.weight"] = getattr(module, f"{ours}_proj").weight
    assert weights.keys() == dict(layer.named_parameters()).keys()
    with Widened():
        return torch.func.functional_call(layer, weights, x)


def cope(module: nn.Module, x: Tensor) -> Tensor:
    layer = attention_of(use_cope=True, cope_max_pos=6)
    return with_weights(layer, module, x, attend__cope__pos_emb=module.table)


def selective(module: nn.Module, x: Tensor) -> Tensor:
    return with_weights(attention_of(selective=True), module, x)


def forget_pairs(module: nn.Module, x: Tensor) -> Tensor:
    layer = attention_of(data_dependent_alibi=True, data_dependent_alibi_per_row=True)
    gates = torch.cat([module.a_proj.weight, module.b_proj.weight])
    return with_weights(layer, module, x, data_dependent_alibi__to_forget_gates__0__weight=gates)


LAYERS: dict[str, Layer] = {
    "stick_breaking": stick_breaking,
    "deltaformer": deltaformer,
    "path": path,
    "cyclic_flow": cyclic_flow,
    "cope": cope,
    "selective": selective,
    "forget_pairs": forget_pairs,
}


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_their_layer(name: str, tokens: int) -> None:
    assert_same(module_of(name), LAYERS[name], tokens_in(tokens, 32))


def test_reflected_keys_that_fade() -> None:
    """Their gates add up from the key to the query, as a sum over the keys after it does."""
    text = zoo.entry("path").text.rstrip().removesuffix("}")
    text += "  let g = x | linear(heads) | sigmoid | log\n"
    text += "  score = s + 8 ** -0.5 * (sum_keys(g[j, h]) - running_keys(g[j, h]))\n}"
    assert_same(module_of("path", text), path, tokens_in(9, 32))


def test_what_is_left_of_a_stick() -> None:
    """It can go to the token's own value."""
    text = zoo.entry("stick_breaking").text.rstrip().removesuffix("}")
    text += "  out = (o + (1 - rows(o, p)) * v) | merge | linear\n}"

    def layer(module: nn.Module, x: Tensor) -> Tensor:
        naive = file_of("fla-core", "fla/ops/stickbreaking_attn/naive.py")
        q, k, v = (heads_of(each(x)) for each in (module.q_proj, module.k_proj, module.v_proj))
        mixed, rest = naive.naive_stickbreaking_attn(q, k, v)
        return module.o_proj((mixed + rest[..., None] * v).flatten(2))

    assert_same(module_of("stick_breaking", text), layer, tokens_in(9, 32))
