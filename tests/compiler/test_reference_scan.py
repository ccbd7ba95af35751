"""The meaning of recurrent mixers against loops and quadratic forms written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import ReferenceBlock, reference
from headloom.grammar.parse import parse

H, D, E, N = 4, 6, 5, 9
WIDTH = H * D


def made(text: str, body: str, dtype: torch.dtype = torch.float64) -> ReferenceBlock:
    sizes = f"heads = {H}; head_dim = {D}; value_dim = {E}"
    arch = check(parse(f"{text}\nblock b {{ {sizes}; {body} }}"))
    module = reference(find(arch, "b", WIDTH), dtype=dtype, seed=1)
    assert isinstance(module, ReferenceBlock)
    return module


X = torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CAUSAL = torch.ones(N, N).tril().bool()


def projected(module: ReferenceBlock, name: str) -> Tensor:
    """A stream of the block, [b, N, features]."""
    return X @ module.get_parameter(f"{name}_proj.weight").T


def heads(x: Tensor, count: int = H) -> Tensor:
    x = torch.stack(x.chunk(count, -1), 1)
    return torch.stack([x[:, h // (H // count)] for h in range(H)], 1)


def finished(module: ReferenceBlock, o: Tensor) -> Tensor:
    return torch.cat(o.unbind(1), -1) @ module.get_parameter("o_proj.weight").T


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def quadratic(module: ReferenceBlock, visible: Tensor) -> Tensor:
    """Linear attention as a matrix (Katharopoulos et al. 2020, equation 5)."""
    q, k, v = (heads(projected(module, name)) for name in "qkv")
    a = (functional.elu(q) + 1) @ (functional.elu(k) + 1).mT * visible
    return finished(module, a @ v / a.sum(-1, keepdim=True))


def test_linear_attention_is_its_quadratic_form() -> None:
    module = made("", "mix = linear; mask = causal")
    close(module(X), quadratic(module, CAUSAL))


def test_bidirectional_linear_attention() -> None:
    module = made("", "mix = linear")
    close(module(X), quadratic(module, torch.ones(N, N)))


@pytest.mark.parametrize("mask", ["document", "causal and document"])
def test_documents_start_the_state_anew(mask: str) -> None:
    module = made("", f"mix = linear; mask = {mask}")
    segments = torch.tensor([[0] * 4 + [1] * 5, [2, 2, 7, 7, 7, 7, 3, 3, 3]])
    visible = (segments[:, :, None] == segments[:, None])[:, None]
    visible = visible & CAUSAL if "causal" in mask else visible
    close(module(X, segments=segments), quadratic(module, visible))
    close(module(X), quadratic(module, CAUSAL if "causal" in mask else torch.ones(N, N)))
    free = made("", "mix = linear; mask = causal")
    alone = (segments[:, :, None] == segments[:, None])[:, None] & CAUSAL
    close(free(X, segments=segments), quadratic(free, alone))


@pytest.mark.parametrize("kv_heads", [H, 2])
def test_gated_delta(kv_heads: int) -> None:
    """Yang et al. 2024, equation 10: S ← α (I − β k kᵀ) S + β k vᵀ, one pair at a time."""
    module = made("", f"mix = gated_delta; mask = causal; kv_heads = {kv_heads}")
    counts = H, kv_heads, kv_heads
    q, k, v = (heads(projected(module, n), c) for n, c in zip("qkv", counts, strict=True))
    alpha, beta = (projected(module, name).sigmoid() for name in ("alpha", "beta"))
    o = torch.zeros(2, H, N, E, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            state = torch.zeros(D, E, dtype=torch.float64)
            for t in range(N):
                key, gate, step = k[b, h, t], alpha[b, t, h], beta[b, t, h]
                erase = torch.eye(D).double() - step * key[:, None] * key
                state = gate * erase @ state + step * key[:, None] * v[b, h, t]
                o[b, h, t] = state.T @ q[b, h, t]
    close(module(X), finished(module, o))


EVERYTHING = """
mix everything {
  let g = x | linear(heads * head_dim) | sigmoid
  param decay[heads, head_dim] = 0.1 * h - 0.2
  param shared[value_dim] = normal(1)
  param rate = 0.3
  const unit[heads] = 2 ** -h
  state S[head_dim, value_dim] = 0
  state z[head_dim] = 1
  state count = 0
  o <- (q * g) @ S + shared
  w <- exp(-decay) * z
  S <- w * S + outer(k, v) * unit - rate
  z <- where(k > 0, min(k, z), z / (1 + norm(z)))
  count <- count + 1
  o <- o / count + (S @ v) @ S / (2 + mean(S)) * true_one(dot(k, q)) + sum(z)
}
stage true_one = where(0 <= x < 1 or not (x < 1), 1, 1)
"""


def test_every_form_of_statement() -> None:
    module = made(EVERYTHING, "mix = everything; mask = causal")
    q, k, v = (heads(projected(module, name)) for name in "qkv")
    g = heads(projected(module, "g").sigmoid())
    decay, shared = module.get_parameter("decay"), module.get_parameter("shared")
    close(decay.detach(), 0.1 * torch.arange(H)[:, None].double().expand(-1, D) - 0.2)
    o = torch.zeros(2, H, N, E, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            state, z = torch.zeros(D, E).double(), torch.ones(D).double()
            for t in range(N):
                key, value = k[b, h, t], v[b, h, t]
                before = (q[b, h, t] * g[b, h, t]) @ state + shared
                scaled = ((-decay[h]).exp() * z)[:, None] * state
                state = scaled + torch.outer(key, value) * 2.0**-h - 0.3
                z = torch.where(key > 0, torch.minimum(key, z), z / (1 + z.norm()))
                after = state @ value @ state / (2 + state.mean())
                o[b, h, t] = (before / (t + 1) + after + z.sum()).detach()
    close(module(X), finished(module, o))
    assert {name for name, _ in module.named_buffers()} == {"unit"}
    assert "unit" not in module.state_dict()


def test_a_statement_before_the_update_reads_the_old_state() -> None:
    late = "mix late { state S[head_dim, value_dim] = 0; o <- q @ S; S <- S + outer(k, v) }"
    module = made(late, "mix = late; mask = causal")
    q, k, v = (heads(projected(module, name)) for name in "qkv")
    close(module(X), finished(module, (q @ k.mT * CAUSAL.tril(-1)) @ v))


def test_gradcheck() -> None:
    arch = check(parse("block b { heads = 2; mix = gated_delta; mask = causal }"))
    module = reference(find(arch, "b", 4), dtype=torch.float64, seed=3)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        assert isinstance(y, Tensor)
        return y

    x = X[:1, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mix", ["linear", "gated_delta"])
def test_other_dtypes_stay_near(mix: str, dtype: torch.dtype) -> None:
    exact, module = (made("", f"mix = {mix}; mask = causal", each) for each in (X.dtype, dtype))
    y = module(X.to(dtype))
    assert y.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact(X), rtol=tolerance, atol=tolerance)
